"""`switchkd train`, or `python -m switchkd.train`: distil a teacher into a student; `switchkd sft`:
fine-tune the teacher beforehand, and the student for its first epochs.

Without arguments: the embedded demonstration. Otherwise `--config FILE.yaml` and flags; flags win.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers.trainer import TRAINER_STATE_NAME

from switchkd import adapters, metrics
from switchkd.calibration import print_calibration
from switchkd.checkpoint import COMPLETIONS, RUN_STATE, check_checkpoint, last_checkpoint
from switchkd.config import ScriptArguments, SwitchConfig, parse
from switchkd.console import GracefulStop, print_summary
from switchkd.data import Rows, read_examples, tokenize
from switchkd.models import (
    count_parameters,
    cut_layers,
    load_model,
    load_tokenizer,
)
from switchkd.quantization import quantization_config
from switchkd.trainer import SwitchTrainer

CONFIG = "config.yaml"

# Options that may differ between a run and its continuation; any other would change the result.
FREE_TO_CHANGE = {
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "output_dir",
    "log_completions",
    "disable_tqdm",
    "report_to",
    "run_name",
    "logging_dir",
    "save_total_limit",
    "rollout_batch_size",
    "eval_temperature",
    # Together with the number of processes they make the rows of a step, which must stay:
    # `SwitchTrainer.load_run_state`.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


def main(argv: list[str] | None = None) -> int:
    console = Console()
    try:
        script, config = parse(as_flags(sys.argv[1:] if argv is None else argv))
        console.quiet = config.process_index > 0
        return run(script, config, console)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print(
            "stopped at once; continue from the last checkpoint with --resume_from_checkpoint last"
        )
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # its threads abort a process that exits


def as_flags(argv: list[str]) -> list[str]:
    """The command line without its subcommand: `train`, which may be left out, or `sft`."""
    if not argv or argv[0].startswith("-"):
        return argv
    if argv[0] not in ("train", "sft"):
        raise ValueError(f"got the subcommand {argv[0]!r}, expected train, sft, or options")
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
    tokenizer, student, teacher_tokenizer, teacher = load_models(script, config)
    train_rows, eval_rows = load_data(script, config, tokenizer)
    for rows in (train_rows, eval_rows):
        console.print(str(rows.report), markup=False, highlight=False)

    base = None
    if script.use_peft and script.student_layers is not None:  # what the adapter will be loaded on
        student.name_or_path = str(Path(config.output_dir).resolve() / "base")
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
    if resume is None and config.process_index == 0:
        begin_output(script, config)
        for part in (base, tokenizer) if base is not None else ():
            part.save_pretrained(student.name_or_path)
    for note in trainer.vocabulary.notes:
        console.print(f"note: {note}", markup=False)
    sizes = f"student {count_parameters(student) / 1e6:.2f} M parameters"
    if trainer.teacher is not None:
        sizes = f"teacher {count_parameters(trainer.teacher) / 1e6:.2f} M, " + sizes
    rollouts = f"{config.rollout_policy} rollouts on {config.lmbda:.0%} of the rows"
    if config.adaptive_lmbda:
        rollouts += ", more when validation worsens"
    elif config.lmbda == 0:
        rollouts = "no rollouts"
    console.print(f"{sizes}; {rollouts}")

    stop = GracefulStop()
    stop.install()
    trainer.add_callback(stop)
    if resume is not None:
        trainer.load_run_state(resume)
        console.print(f"resuming from {resume}")
    elif config.eval_strategy != "no":
        trainer.before = scores(trainer.evaluate(metric_key_prefix="before"), "before")
    trainer.start_clock()
    trainer.train(resume_from_checkpoint=resume)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        console.print(
            f"stopped at step {trainer.state.global_step}; continue with "
            f"--resume_from_checkpoint last --output_dir {config.output_dir}"
        )
        return 130
    totals = trainer.run_state()["totals"]
    after = scores(trainer.evaluate(metric_key_prefix="after"), "after")
    trainer.save_model(config.output_dir)
    trainer.save_state()  # the whole log: a checkpoint holds it up to its own step
    summary = summarise(trainer, totals, after, eval_rows)
    if trainer.is_world_process_zero():
        path = Path(config.output_dir) / "summary.json"
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print_summary(summary, console)
        console.print(f"model and summary.json are in {config.output_dir}")
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still needs it
    return 0


def run_settings(script: ScriptArguments, config: SwitchConfig) -> dict:
    """Every option of a run."""
    return {**asdict(script), **config.to_dict()}


def begin_output(script: ScriptArguments, config: SwitchConfig) -> None:
    """Clear the folder of a run to overwrite and write config.yaml.

    Only once everything has been loaded: a wrong model name must not cost the run that is there.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    for name in (COMPLETIONS, "summary.json", TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    text = yaml.safe_dump(run_settings(script, config), sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def check_output(script: ScriptArguments, config: SwitchConfig) -> str | None:
    """Refuse the folder of another run; returns the checkpoint to resume from."""
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    record = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: got the file {folder}, expected a folder")
    if wanted in (None, False, "false", "False"):
        config.resume_from_checkpoint = None
        first = config.process_index == 0  # which writes into the folder while others start
        taken = first and (record.exists() or any(folder.glob("checkpoint-*")))
        if taken and not config.overwrite_output_dir:
            raise ValueError(
                f"output_dir: {folder} holds another run; expected a new folder, "
                "--resume_from_checkpoint last to go on with it, or --overwrite_output_dir true"
            )
        return None
    if str(wanted).lower() in ("true", "last"):
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint: got no intact checkpoint in {folder}")
    else:
        checkpoint = str(wanted)
        check_checkpoint(checkpoint)
    if config.target_teacher_share is not None:
        adopt_threshold(config, checkpoint)
    if record.exists():
        values = run_settings(script, config)
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        for key in sorted(before.keys() & values.keys() - FREE_TO_CHANGE):
            if before[key] != values[key]:
                raise ValueError(
                    f"{key}: got {values[key]!r}, expected {before[key]!r} as in the run to resume "
                    f"({record})"
                )
    config.resume_from_checkpoint = checkpoint
    return checkpoint


def adopt_threshold(config: SwitchConfig, checkpoint: str) -> None:
    """Go on with the threshold that the run to resume has chosen for its teacher's share."""
    chosen = json.loads((Path(checkpoint) / RUN_STATE).read_text()).get("calibration")
    if chosen is None:
        raise ValueError(
            f"target_teacher_share: got {config.target_teacher_share:g}, expected none, as in the "
            f"run to resume ({checkpoint})"
        )
    config.switch_tau0, config.switch_lambda = chosen["switch_tau0"], chosen["switch_lambda"]


def load_models(script: ScriptArguments, config: SwitchConfig):
    """(tokenizer, student, teacher's tokenizer, teacher); the last two are None if not needed."""
    shared = {"trust_remote_code": script.trust_remote_code}
    weights = dict(shared)
    if script.attn_implementation is not None:
        weights["attn_implementation"] = script.attn_implementation
    name, gguf = script.model_name_or_path, script.gguf_file
    tokenizer = load_tokenizer(name, gguf_file=gguf, revision=script.model_revision, **shared)
    student = load_model(
        name,
        dtype=script.dtype,
        gguf_file=gguf,
        revision=script.model_revision,
        **weights,
    )
    if script.student_layers is not None:
        cut_layers(student, script.student_layers)
    alone = config.teacher_is_base or not config.needs_teacher
    if alone and script.teacher_model_name_or_path is None:
        if script.teacher_quantization is not None:
            raise ValueError("teacher_quantization: expected teacher_model_name_or_path, too")
        return tokenizer, student, None, None
    if script.teacher_model_name_or_path is None:
        raise ValueError(
            "teacher_model_name_or_path: got None, expected a teacher "
            f"(rollout_policy {config.rollout_policy}, loss_type {config.loss_type})"
        )
    name, gguf = script.teacher_model_name_or_path, script.teacher_gguf_file
    revision = script.teacher_model_revision
    teacher_tokenizer = load_tokenizer(name, gguf_file=gguf, revision=revision, **shared)
    if script.teacher_quantization is not None:
        weights["quantization_config"] = quantization_config(script.teacher_quantization)
        weights["device_map"] = {"": config.device}  # such weights cannot be moved later
    teacher = load_model(
        name, dtype=script.teacher_dtype, gguf_file=gguf, revision=revision, **weights
    )
    return tokenizer, student, teacher_tokenizer, teacher


def load_data(script: ScriptArguments, config: SwitchConfig, tokenizer) -> tuple[Rows, Rows]:
    """Tokenised training and validation rows; validation is held out of training if not named."""
    limits = dict(
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_new_tokens,
        template=script.template,
    )
    examples, report = read_examples(
        script.dataset_name,
        split=script.dataset_train_split,
        limit=script.max_train_rows,
        skip_malformed=script.skip_malformed,
    )
    if script.eval_dataset_name is not None:
        held_out, eval_report = read_examples(
            script.eval_dataset_name,
            split=script.dataset_test_split,
            skip_malformed=script.skip_malformed,
        )
        held_out = held_out[: script.eval_size]
    else:
        count = min(script.eval_size, len(examples) // 2)
        if count < 1:
            raise ValueError(
                f"{report.source}: got {len(examples)} rows, expected at least 2 to hold out "
                "validation rows, or eval_dataset_name"
            )
        picked = set(random.Random(config.seed).sample(range(len(examples)), count))
        held_out = [e for i, e in enumerate(examples) if i in picked]
        examples = [e for i, e in enumerate(examples) if i not in picked]
        eval_report = type(report)(f"{report.source} (held out)", form=report.form)
    train = tokenize(examples, report, tokenizer, **limits)
    if config.lmbda < 1 and not all(row.completion_ids for row in train.rows):
        raise ValueError(
            f"{report.source}: got rows without a response, expected responses for the share "
            f"1 - lmbda = {1 - config.lmbda:g} of rows trained on data, or lmbda 1"
        )
    return train, tokenize(held_out, eval_report, tokenizer, **limits)


def peft_config(script: ScriptArguments):
    """A LoraConfig, or None."""
    if not script.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("use_peft: needs the package peft; pip install peft") from None
    target = script.lora_target_modules
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear" if target == ["all-linear"] else target,
        task_type="CAUSAL_LM",
    )


def scores(result: dict, prefix: str) -> dict:
    return {key.removeprefix(f"{prefix}_"): value for key, value in result.items()}


def summarise(trainer: SwitchTrainer, totals: dict, after: dict, eval_rows: Rows) -> dict:
    """The content of summary.json."""
    tokens = totals["tokens"]
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
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


if __name__ == "__main__":
    sys.exit(main())
