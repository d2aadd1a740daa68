"""Aggregates of completions.jsonl, in one pass and in memory that does not grow with its text."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from switchkd.records import UNREADABLE
from switchkd.report.run import Run


@dataclass(frozen=True)
class Metric:
    """What a policy compares, and how it is counted.

    edges: ascending, of the bins that quantiles are read from; wide: those of the drawn histogram,
    a subset. Values outside are counted in the outermost bins. shades: where a token's colour
    deepens. offset: added to what is recorded (a rank is recorded from 0 and shown from 1).
    threshold: the symbol of what it is compared with.
    """

    name: str
    unit: str
    edges: np.ndarray
    wide: np.ndarray
    shades: tuple[float, ...]
    offset: int = 0
    threshold: str = "τ"

    def text(self, value: float) -> str:
        number = f"{value:.0f}" if self.offset else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()


def _decades(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """50 bins to the decade, so a quantile is known within 5 %; every tenth edge is drawn."""
    edges = 10.0 ** (np.arange(50 * low, 50 * high + 1) / 50)
    return edges, edges[::10]


_POWERS = 2.0 ** np.arange(21)
_RANKS = np.unique(np.concatenate([np.geomspace(1, 2**20, 240).round(), _POWERS]))
_NATS = (1e-3, 1e-2, 0.1, 0.5, 2.0)
METRICS = {
    "switch": Metric("JSD", "bits", *_decades(-10, 0), (1e-3, 1e-2, 0.1, 0.3, 0.6)),
    "adaswitch": Metric("KL(p‖q)", "nats", *_decades(-10, 3), _NATS),
    "skd": Metric("Rank", "", _RANKS, _POWERS, (2, 5, 25, 100, 1000), 1, "K"),
}
UNKNOWN = Metric("divergence", "", *_decades(-10, 6), _NATS)
COLUMNS = (
    "tokens", "from_teacher", "divergence", "threshold", "teacher_logprob", "student_logprob"
)  # fmt: skip


def metric_of(run: Run) -> Metric:
    """What the policy of a run compares."""
    metric = METRICS.get(run.config.get("rollout_policy"), UNKNOWN)
    nats = metric.unit == "bits" and str(run.config.get("jsd_base")) == "e"
    return replace(metric, unit="nats") if nats else metric


@dataclass(frozen=True)
class Buckets:
    """Neighbouring positions taken together. start, stop (N,): positions; tokens, share (N,);
    quantiles (N, 3): 10 %, 50 %, 90 % of the divergence; tau (N,): geometric mean. NaN: none."""

    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray
    share: np.ndarray
    quantiles: np.ndarray
    tau: np.ndarray


class Rollouts:
    """Counts over all tokens that were written, and where each completion stands in the file."""

    def __init__(self, metric: Metric):
        self.metric = metric
        bins = len(metric.edges) - 1
        self.length = self.broken = 0  # longest completion, unreadable lines
        self.replayed = 0  # completions of earlier steps, trained on again: not written anew
        self.by_writer = np.zeros((2, bins), np.int64)
        self._counts = np.zeros((64, 2), np.int64)  # by position: tokens, teacher's
        self._tau = np.zeros((64, 2))  # by position: finite thresholds, sum of their logarithms
        self._bins = np.zeros((64, bins), np.int64)
        self.by_step: dict[int, list[int]] = {}  # step -> [tokens, teacher's]
        self.steps, self.rows, self.offsets = array("q"), array("q"), array("q")

    @property
    def tokens(self) -> int:
        return int(self._counts[:, 0].sum())

    @property
    def teacher_tokens(self) -> int:
        return int(self._counts[:, 1].sum())

    @property
    def compared(self) -> int:
        """Tokens with a divergence: the others were written without looking at both models."""
        return int(self.by_writer.sum())

    def add(self, record: dict, offset: int) -> None:
        """Count one line of completions.jsonl; raises ValueError or KeyError if it is not one."""
        step, row = int(record["step"]), int(record["row"])
        teacher = np.asarray(record["from_teacher"], dtype=np.int64)
        divergence = np.asarray(record["divergence"], dtype=np.float64) + self.metric.offset
        tau = np.asarray(record["threshold"], dtype=np.float64) + self.metric.offset
        n = len(record["tokens"])
        if any(len(record[name]) != n for name in COLUMNS):
            raise ValueError("lists of different lengths")
        counts = self.by_step.setdefault(step, [0, 0])
        if "replay_of" in record:
            self.replayed += 1
            return
        while n > len(self._counts):
            for name in ("_counts", "_tau", "_bins"):
                table = getattr(self, name)
                setattr(self, name, np.concatenate([table, np.zeros_like(table)]))
        self.length = max(self.length, n)
        self._counts[:n, 0] += 1
        self._counts[:n, 1] += teacher
        (at,) = np.nonzero(tau > 0)
        self._tau[at, 0] += 1
        self._tau[at, 1] += np.log(tau[at])
        (at,) = np.nonzero(divergence >= 0)  # not NaN
        edges = self.metric.edges
        bins = (np.searchsorted(edges, divergence[at], "right") - 1).clip(0, len(edges) - 2)
        self._bins[at, bins] += 1  # every position stands once in `at`
        np.add.at(self.by_writer, (teacher[at], bins), 1)
        counts[0] += n
        counts[1] += int(teacher.sum())
        for column, value in ((self.steps, step), (self.rows, row), (self.offsets, offset)):
            column.append(value)

    def buckets(self, most: int = 32) -> Buckets:
        """At most so many equally long stretches of positions."""
        width = max(1, -(-self.length // most))
        start = np.arange(0, self.length, width)
        counts, tau, bins = (
            np.add.reduceat(table[: self.length], start, axis=0)
            for table in (self._counts, self._tau, self._bins)
        )
        with np.errstate(invalid="ignore"):
            return Buckets(
                start,
                np.minimum(start + width, self.length),
                counts[:, 0],
                counts[:, 1] / counts[:, 0],
                np.array([self.quantiles(row) for row in bins]),
                np.exp(tau[:, 1] / tau[:, 0]),
            )

    def quantiles(self, counts: np.ndarray, at=(0.1, 0.5, 0.9)) -> list[float]:
        """Quantiles of the divergence from counts of its bins; NaN where nothing was counted."""
        total, edges = counts.sum(), self.metric.edges
        if total == 0:
            return [float("nan")] * len(at)
        below, values = np.concatenate([[0], counts.cumsum()]), []
        for q in at:
            i = int(np.searchsorted(below[1:], q * total, "left"))
            if self.metric.offset:  # ranks are whole
                values.append(float(edges[i]))
                continue
            part = (q * total - below[i]) / counts[i]
            values.append(float(edges[i] * (edges[i + 1] / edges[i]) ** part))
        return values

    def histogram(self) -> list[tuple[float, float, int, int]]:
        """(low, high, student's tokens, teacher's tokens) of the drawn bins, empty ends cut off."""
        index = np.searchsorted(self.metric.edges, self.metric.wide)
        counts = np.add.reduceat(self.by_writer, index[:-1], axis=1)
        used = np.nonzero(counts.sum(0))[0]
        if not len(used):
            return []
        wide = self.metric.wide
        return [
            (float(wide[i]), float(wide[i + 1]), int(counts[0, i]), int(counts[1, i]))
            for i in range(used[0], used[-1] + 1)
        ]

    def shares(self) -> list[tuple[float, float]]:
        """(step, teacher's share of its tokens)."""
        return [(s, teacher / n) for s, (n, teacher) in sorted(self.by_step.items()) if n]


def read_rollouts(
    path: Path, metric: Metric, on_bytes: Callable[[int], object] | None = None
) -> Rollouts:
    """Count a completions.jsonl of any size; on_bytes(n) is called after n more bytes.

    A line that a kill cut off is counted as broken. Raises ValueError, with the line, for one that
    is no rollout.
    """
    rollouts, offset = Rollouts(metric), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except UNREADABLE:
                rollouts.broken += bool(line.strip())
            else:
                try:
                    rollouts.add(record, offset)
                except (LookupError, TypeError, ValueError, OverflowError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected a rollout with step, row and lists of "
                        f"one length {', '.join(COLUMNS)} ({type(error).__name__}: {error})"
                    ) from None
            offset += len(line)
            if on_bytes is not None:
                on_bytes(len(line))
    return rollouts
