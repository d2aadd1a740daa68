"""(d) Where the teacher writes: by position and by divergence (SWITCH, arXiv 2410.19503, 4.3)."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from benchmarks.experiments.runs import mean_and_deviation
from benchmarks.experiments.tables import cell, save, show, write_csv

POSITIONS = 4  # tokens a bucket
BOUNDS = (0, 1e-6, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # bits


def count(records: Iterable[dict]) -> tuple[dict, dict]:
    """Bucket to [tokens, teacher's tokens, sum of divergences, sum of thresholds]."""
    by_position, by_divergence = (defaultdict(lambda: [0, 0, 0.0, 0.0]) for _ in range(2))
    for record in records:
        each = zip(record["from_teacher"], record["divergence"], record["threshold"], strict=True)
        for t, (teacher, divergence, tau) in enumerate(each):
            place = bisect.bisect_right(BOUNDS, divergence) - 1
            for found, key in ((by_position, t // POSITIONS), (by_divergence, place)):
                found[key][0] += 1
                found[key][1] += teacher
                found[key][2] += divergence
                found[key][3] += tau
    return dict(sorted(by_position.items())), dict(sorted(by_divergence.items()))


def over_seeds(counts: Sequence[dict]) -> dict:
    """Bucket to [tokens of all seeds, (mean, deviation) of the share, of JSD and of threshold]."""
    found = {}
    for key in sorted(set().union(*counts)):
        seen = [each[key] for each in counts if key in each]
        means = [[total / n for total in totals] for n, *totals in seen]
        found[key] = [sum(n for n, *_ in seen), *map(mean_and_deviation, zip(*means, strict=True))]
    return found


def analyse(seeds: Sequence[Iterable[dict]], out: Path, console: Console) -> None:
    by_position, by_divergence = map(over_seeds, zip(*map(count, seeds), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    kinds = (
        ("position", by_position, lambda k: f"{k * POSITIONS}-{(k + 1) * POSITIONS - 1}"),
        ("divergence", by_divergence, lambda k: f"{BOUNDS[k]:g} to {(*BOUNDS, 1)[k + 1]:g}"),
    )
    measures = ("teacher_share", "mean_divergence", "mean_threshold")
    for axis, (kind, found, name) in zip(axes, kinds, strict=True):
        names = [name(k) for k in found]
        columns = [f"{m}{what}" for m in measures for what in ("", "_deviation")]
        rows = [
            [label, n, *(f"{x:.6g}" for pair in stats for x in pair)]
            for label, (n, *stats) in zip(names, found.values(), strict=True)
        ]
        write_csv(out / f"intervention_by_{kind}.csv", [kind, "tokens", *columns], rows)
        cells = [
            [label, f"{n:,}", *map(cell, stats)]
            for label, (n, *stats) in zip(names, found.values(), strict=True)
        ]
        show(f"intervention by {kind}", [kind, "tokens", *measures], cells, console)
        places = range(len(rows))
        share, jsd, tau = (
            list(zip(*(stats[i] for stats in found.values()), strict=True)) for i in (1, 2, 3)
        )
        axis.bar(places, share[0], yerr=share[1], color="C0", alpha=0.6, ecolor="C0",
                 label="written by the teacher")  # fmt: skip
        if kind == "position":
            axis.plot(places, jsd[0], "C1o-", ms=3, label="mean JSD, bits")
            axis.plot(places, tau[0], "C3--", label="mean threshold")
        axis.set_xticks(places, names, rotation=60, fontsize=7)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("position in the response" if kind == "position" else "JSD, bits")
        if kind == "position":
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.18), ncols=3)
        axis.set_ylabel("share written by the teacher")
    save(figure, out / "intervention.png")
