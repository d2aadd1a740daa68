"""`switchkd train`, or `python -m switchkd.train`: distil a teacher into a student; `switchkd sft`:
fine-tune the teacher beforehand, and the student for its first epochs.

Without arguments: the embedded demonstration. Otherwise `--config FILE.yaml` and flags; flags win.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from switchkd import adapters, metrics
from switchkd.arguments import ScriptArguments
from switchkd.calibration import print_calibration
from switchkd.checkpoint import SUMMARY, day_of, last_checkpoint, read_run_state
from switchkd.command_line import parse
from switchkd.config import SwitchConfig
from switchkd.console import GracefulStop, print_summary
from switchkd.data import Rows
from switchkd.loading import check_options, load_data, load_models, load_tokenizers, peft_config
from switchkd.models import count_parameters
from switchkd.run_folder import Forget, begin_output, begins, check_output, forget, reserved
from switchkd.trainer import SwitchTrainer


def main(argv: list[str] | None = None) -> int:
    console, config = Console(), None
    try:
        script, config = parse(as_flags(sys.argv[1:] if argv is None else argv))
        console.quiet = config.process_index > 0
        return run(script, config, console)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        where = f" in process {config.process_index}" if config and config.world_size > 1 else ""
        console.quiet = False  # it may be the only one that knows why all of them end
        console.print(f"[bold red]error{where}:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        last = config and last_checkpoint(config.output_dir)
        goes_on = f"; continue from {last} with --resume_from_checkpoint last" if last else ""
        console.print(f"stopped at once{goes_on}", markup=False)
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # its threads abort a process that exits


def as_flags(argv: list[str]) -> list[str]:
    """The command line without its subcommand: `train`, which may be left out, or `sft`."""
    if not argv or argv[0].startswith("-"):
        return argv
    if argv[0] not in ("train", "sft"):
        raise ValueError(
            f"got the subcommand {argv[0]!r}, expected train, sft, or options; switchkd also knows "
            "evaluate, report, plan and doctor"
        )
    command, *flags = argv
    if command == "train":
        return flags
    other = [a for a in flags if a.split("=")[0] == "--method"]
    if other:
        raise ValueError("got sft and --method, expected one of them: sft is --method sft")
    return ["--method", "sft", *flags]


def run(script: ScriptArguments, config: SwitchConfig, console: Console) -> int:
    """One training run; returns the exit code."""
    resume = check_output(script, config)
    tokenizers = load_tokenizers(script, config)
    check_options(script, config)
    train_rows, eval_rows = load_data(script, config, tokenizers[0], day_of(resume))
    for rows in (train_rows, eval_rows):
        console.print(str(rows.report), markup=False, highlight=False)
    if resume is not None:
        read_run_state(resume, train_rows.digest, config)  # which must be the same
    first = config.process_index == 0
    with reserved(Path(config.output_dir)) if first else contextlib.nullcontext():
        return distil(script, config, resume, (train_rows, eval_rows), tokenizers, console)


def distil(
    script: ScriptArguments,
    config: SwitchConfig,
    resume: str | None,
    rows: tuple[Rows, Rows],
    tokenizers: tuple,
    console: Console,
) -> int:
    """`run` with what it has read: from the models to the summary."""
    (train_rows, eval_rows), (tokenizer, teacher_tokenizer) = rows, tokenizers
    student, teacher = load_models(script, config)
    base = None
    if script.use_peft and script.student_layers is not None:  # what the adapter will be loaded on
        student.name_or_path = str(Path(config.output_dir).resolve() / adapters.BASE)
        base = adapters.view(student)
    trainer = SwitchTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        peft_config=peft_config(script),
    )
    if resume is None and config.target_teacher_share is not None:
        unit = "bits" if trainer.policy.base == 2 else "nats"
        print_calibration(trainer.calibrate(), unit, console)
    if begins(resume, config) and config.process_index == 0:
        begin_output(script, config)
        for part in (base, tokenizer) if base is not None else ():
            part.save_pretrained(student.name_or_path)
    sizes = f"student {count_parameters(student) / 1e6:.2f} M parameters"
    if trainer.teacher is not None:
        sizes = f"teacher {count_parameters(trainer.teacher) / 1e6:.2f} M, " + sizes
    rollouts = f"{config.rollout_policy} rollouts on {config.lmbda:.0%} of the rows"
    if config.adaptive_lmbda:
        rollouts += ", more when validation worsens"
    elif config.lmbda == 0:
        rollouts = "no rollouts"
    console.print(f"{sizes}; {rollouts}")

    stop = GracefulStop(quiet=config.process_index > 0)
    stop.install()
    trainer.add_callback(stop)
    trainer.add_callback(Forget())
    if resume is not None:
        console.print(f"resuming from {resume}", markup=False)
    elif config.eval_strategy != "no":
        trainer.before = scores(trainer.evaluate(metric_key_prefix="before"), "before")
    trainer.train(resume_from_checkpoint=resume)
    if stop.stopping:
        goes_on = f"continue with --resume_from_checkpoint last --output_dir {config.output_dir}"
        if config.save_only_model:
            goes_on = "it cannot be continued: save_only_model saves no optimizer"
        console.print(f"stopped at step {trainer.state.global_step}; {goes_on}", markup=False)
        return 130
    after = scores(trainer.evaluate(metric_key_prefix="after"), "after")
    trainer.save_model(config.output_dir)
    trainer.save_state()  # the whole log: a checkpoint holds it up to its own step
    summary = summarise(trainer, after, eval_rows)
    if trainer.is_world_process_zero():
        path = Path(config.output_dir) / SUMMARY
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        forget(config.output_dir)
        print_summary(summary, console)
        console.print(f"model and {SUMMARY} are in {config.output_dir}", markup=False)
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still needs it
    return 0


def scores(result: dict, prefix: str) -> dict:
    return {key.removeprefix(f"{prefix}_"): value for key, value in result.items()}


def summarise(trainer: SwitchTrainer, after: dict, eval_rows: Rows) -> dict:
    """The content of summary.json."""
    totals, args = trainer.totals, trainer.args
    tokens = totals["tokens"]
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    return {
        "before": trainer.before or {},
        "after": after,
        "floors": metrics.floors(eval_rows.rows),
        "calibration": trainer.calibration,
        "teacher_share": totals["teacher_tokens"] / tokens if tokens else None,
        "rollout_tokens": tokens,
        "tokens_per_second": tokens / totals["rollout_seconds"] if tokens else None,
        "seconds": totals["seconds"],
        "steps": trainer.state.global_step,
        "best_checkpoint": best,  # that of `after`; None: the last step
        "best_metric": best and args.metric_for_best_model.removeprefix("eval_"),
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


if __name__ == "__main__":
    sys.exit(main())
