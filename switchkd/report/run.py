"""What a training run left in its folder: configuration, log, scores, times."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from switchkd.checkpoint import (
    COMPLETIONS,
    CONFIG,
    RUN_STATE,
    STATE,
    SUMMARY,
    checkpoints,
    read_settings,
)
from switchkd.records import UNREADABLE


@dataclass(frozen=True)
class Run:
    """A run's folder, read. Whatever it does not hold is empty.

    log: the entries of `TrainerState.log_history`, of the longest log found; step, max_steps: where
    that log ends and where training would. before, after: scores of the student on held-out rows.
    totals: tokens, teacher_tokens, rollout_seconds, seconds, as far as known.
    """

    folder: Path
    config: dict
    log: list[dict]
    step: int
    max_steps: int
    summary: dict
    before: dict
    totals: dict

    @property
    def completions(self) -> Path | None:
        """The file of rollouts, None where none was written."""
        path = self.folder / COMPLETIONS
        return path if path.is_file() and path.stat().st_size else None

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every log entry that has a finite number of this name, by step."""
        found = [(entry["step"], entry[name]) for entry in self.log if name in entry]
        return sorted((s, v) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v))

    def eval_series(self, name: str) -> list[tuple[int, float]]:
        """The same of a validation score, beginning with the student before training."""
        start = [(0, self.before[name])] if name in self.before else []
        return start + self.series(f"eval_{name}")


def _json(path: Path) -> dict:
    """A JSON object; empty if the file is missing or was cut off by a kill."""
    with contextlib.suppress(OSError, *UNREADABLE):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run, finished or not; raises ValueError if it holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"RUN_DIR: got {folder}, expected the output folder of a training run")
    places = [folder, *checkpoints(folder)]
    known = (CONFIG, COMPLETIONS, SUMMARY, STATE)
    if len(places) == 1 and not any((folder / name).exists() for name in known):
        raise ValueError(
            f"RUN_DIR: got {folder} without {CONFIG}, {COMPLETIONS}, {SUMMARY} or a checkpoint, "
            "expected the output folder of python -m switchkd.train"
        )
    config = read_settings(folder)
    # A log is whole up to its own step: the longest tells most, wherever a resumed run left it.
    states = [_json(place / STATE) for place in places]
    state = max(states, key=lambda s: (s.get("global_step", 0), len(s.get("log_history", []))))
    summary = _json(folder / SUMMARY)
    saved = next((s for s in (_json(p / RUN_STATE) for p in places[1:]) if s), {})
    totals = dict(saved.get("totals", {}))
    if summary:
        tokens, speed = summary.get("rollout_tokens") or 0, summary.get("tokens_per_second")
        totals = {
            "tokens": tokens,
            "teacher_tokens": round(tokens * (summary.get("teacher_share") or 0)),
            "rollout_seconds": tokens / speed if speed else 0.0,
            "seconds": summary.get("seconds", 0.0),
        }
    run = Run(
        folder,
        config,
        [entry for entry in state.get("log_history", []) if "step" in entry],
        state.get("global_step", 0),
        state.get("max_steps", 0),
        summary,
        (summary.get("before") or saved.get("before") or {}),
        totals,
    )
    if not run.log and run.completions is None and not summary:
        raise ValueError(
            f"RUN_DIR: {folder} has no log and no rollouts yet; expected a run that reached its "
            "first checkpoint or its first rollout"
        )
    return run


def phases(run: Run) -> list[tuple[str, float]]:
    """(phase, seconds) of the training so far, the rest last; empty if its length is unknown.

    The log has the mean time of a micro-batch's loss over each stretch of steps between entries.
    """
    total = run.totals.get("seconds", 0.0)
    if total <= 0:
        return []
    accumulation = run.config.get("gradient_accumulation_steps", 1)
    losses, last = 0.0, 0
    for step, seconds in run.series("time/forward"):
        losses, last = losses + seconds * (step - last) * accumulation, step
    parts = [
        ("rollouts", run.totals.get("rollout_seconds", 0.0)),
        ("losses, forward", losses),
        ("validation", sum(seconds for _, seconds in run.series("eval_seconds"))),
    ]
    rest = max(0.0, total - sum(seconds for _, seconds in parts))
    return [*parts, ("backward, optimizer, saving, rest", rest)]
