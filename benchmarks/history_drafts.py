"""`python benchmarks/history_drafts.py`: do completions of the epoch before help as drafts?

Trains a pair for some epochs, all rows on rollouts, three times:

fresh noise    the default: each epoch draws its own noise, no drafts from before
same noise     --noise_per_epoch false: a completion changes only where the student has
history        the same with --draft_from_history true: it writes the same tokens, which is checked

and prints tokens a round and tokens a second of each epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rich.console import Console
from rich.table import Table

from switchkd import SwitchConfig, SwitchTrainer
from switchkd.checkpoint import COMPLETIONS
from switchkd.data import read_examples, tokenize
from switchkd.models import cut_layers, load_model, load_tokenizer

ARMS = {
    "fresh noise": {},
    "same noise": {"noise_per_epoch": False},
    "history": {"noise_per_epoch": False, "draft_from_history": True},
}
MEASURES = ("tokens_per_round", "tokens_per_second", "teacher_share")


def train(args: argparse.Namespace, arm: dict, folder: str) -> tuple[list[dict], list[str]]:
    """The measures of each epoch, and every completion in the order it was written."""
    tokenizer = load_tokenizer(args.teacher)
    student = load_model(args.student or args.teacher, dtype="float32")
    if args.student is None:
        cut_layers(student, args.student_layers)
    examples, report = read_examples(args.dataset_name, limit=args.rows)
    limits = dict(max_prompt_length=256, max_completion_length=args.max_new_tokens)
    rows = tokenize(examples, report, tokenizer, **limits)
    steps = -(-len(rows) // args.batch)
    config = SwitchConfig(
        output_dir=folder, lmbda=1.0, max_new_tokens=args.max_new_tokens,
        num_train_epochs=args.epochs, per_device_train_batch_size=args.batch,
        rollout_batch_size=args.batch, learning_rate=args.learning_rate, logging_steps=steps,
        eval_strategy="no", save_strategy="no", log_completions=False, report_to=[],
        disable_tqdm=True, **arm,
    )  # fmt: skip
    trainer = SwitchTrainer(
        model=student, teacher_model=load_model(args.teacher, dtype="float32"), args=config,
        train_dataset=rows, processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if "rollout/tokens_per_round" in log]
    epochs = [{name: log[f"rollout/{name}"] for name in MEASURES} for log in logged]
    with (Path(folder) / COMPLETIONS).open(encoding="utf-8") as file:
        records = map(json.loads, file)
        return epochs, [(r["step"], r["row"], r["tokens"]) for r in records]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--teacher", default="embedded", help="folder, Hub id or 'embedded'")
    add("--student", help="the same; default: the teacher with --student_layers")
    add("--student_layers", default="0", help="layers that the student keeps")
    add("--dataset_name", default="embedded")
    add("--rows", type=int, default=128)
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32)
    add("--max_new_tokens", type=int, default=64)
    add("--learning_rate", type=float, default=5e-4)
    add("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    rows, written = [], {}
    for name, arm in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            epochs, written[name] = train(args, arm, folder)
        rows += [{"arm": name, "epoch": i, **epoch} for i, epoch in enumerate(epochs, 1)]
    same = written["history"] == written["same noise"]

    table = Table(title="drafts from the epoch before")
    for i, column in enumerate(("arm", "epoch", "tokens/round", "tokens/s", "teacher's share")):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        cells = (
            f"{row[name]:.{digits}f}" for name, digits in zip(MEASURES, (2, 0, 3), strict=True)
        )
        last = row["epoch"] == args.epochs
        table.add_row(row["arm"], str(row["epoch"]), *cells, end_section=last)
    console = Console()
    console.print(table)
    tokens = sum(len(tokens) for _, _, tokens in written["history"])
    console.print(
        f"with and without history: {'the same' if same else 'NOT the same'} {tokens:,} tokens"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
