"""What a run shows in the terminal: coloured samples, the before/after table, a graceful stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from switchkd.checkpoint import checkpoint_step

TEACHER_STYLE = "black on bright_yellow"
ECHO = 1.0  # seconds in which a launcher passes on the signal that the terminal gave all processes


def print_completion(tokenizer, record: dict, console: Console | None = None) -> None:
    """One rollout, the teacher's tokens highlighted; under it, who wrote how much."""
    console = console or Console()
    body = Text()
    pending: list[int] = []
    for i, token in enumerate(record["tokens"]):
        pending.append(token)
        piece = tokenizer.decode(pending)
        if piece.endswith("\ufffd") and i + 1 < len(record["tokens"]):
            continue  # half a character: a byte-level token completes it
        body.append(piece, style=TEACHER_STYLE if record["from_teacher"][i] else "")
        pending.clear()
    teacher, total = sum(record["from_teacher"]), len(record["tokens"])
    console.rule(f"step {record['step']}, data row {record['row']}", align="left")
    console.print(Text(record["prompt"][-300:], style="dim"))
    console.print(body)
    share = Text(f"{total - teacher} tokens by the student, ", style="dim")
    console.print(share + Text(f" {teacher} by the teacher ", style=TEACHER_STYLE))


def print_summary(summary: dict, console: Console | None = None) -> None:
    """The before/after table that ends a run."""
    console = console or Console()
    names = {
        "cross_entropy": ("cross-entropy, nats per token", "lower"),
        "kl": ("KL(teacher || student), nats", "lower"),
        "jsd": ("JSD to the teacher, bits", "lower"),
        "rouge_l": ("Rouge-L of samples", "higher"),
    }
    table = Table(title="student on held-out rows")
    for column in ("", "before", "after", "better is"):
        table.add_column(column, justify="left" if column in ("", "better is") else "right")
    for key, (label, better) in names.items():
        if key in summary["after"]:
            values = [summary[when].get(key) for when in ("before", "after")]
            cells = ["-" if v is None else f"{v:.3f}" for v in values]
            table.add_row(label, *cells, better)
    if table.row_count:  # no score without references
        console.print(table)
    best = summary.get("best_checkpoint")
    if best and checkpoint_step(best) < summary["steps"]:
        metric = summary["best_metric"]
        console.print(f"after: {Path(best).name}, best {metric} on these rows", highlight=False)
    floors = ", ".join(
        f"{name.replace('_', ' ')} {value['rouge_l']:.2f}"
        for name, value in summary["floors"].items()
    )
    if floors:
        console.print(f"Rouge-L floors: {floors}")
    if summary["teacher_share"] is not None:
        console.print(
            f"rollouts: {summary['rollout_tokens']:,} tokens, "
            f"{100 * summary['teacher_share']:.1f} % written by the teacher, "
            f"{summary['tokens_per_second']:.0f} tokens/s"
        )
    console.print(f"training took {summary['seconds']:.0f} s")


class GracefulStop(TrainerCallback):
    """Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; twice stops at once.

    Processes get the signal in different steps, or only some of them: after each they agree.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.requested, self.stopping, self.saved = quiet, None, False, None

    def install(self) -> None:
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self._handle)

    def _handle(self, sig, frame):
        now = time.monotonic()
        if self.requested is None:
            self.requested = now
            if not self.quiet:
                text = "stopping after this step and saving; once more to stop at once"
                print(f"\n{text}", flush=True)
        elif now - self.requested > (ECHO if "WORLD_SIZE" in os.environ else 0):
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.requested is not None
        if args.world_size > 1:
            asked = bool(reduce(torch.tensor(float(asked), device=args.device)))
        self.stopping = asked and state.global_step < state.max_steps
        if self.stopping:
            control.should_training_stop = True
            if args.save_total_limit == 1:  # Trainer would end by deleting all but the best
                args.save_total_limit = 2

    def on_save(self, args, state, control, **kwargs):
        self.saved = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        """Trainer ends the epoch at a stop, too. In its middle, no validation is due."""
        if self.stopping:
            control.should_evaluate &= state.epoch % 1 == 0
            control.should_save = control.should_evaluate or self.saved != state.global_step
