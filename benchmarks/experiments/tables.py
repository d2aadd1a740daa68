"""Tables and plots: mean and deviation over seeds, on the screen, as CSV and as PNG."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.runs import MEASURES, mean_and_deviation

RESULTS = Path(__file__).parents[1] / "results" / "experiments"


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console):
    table = Table(title=title)
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def cell(value: tuple[float, float] | None) -> str:
    """Mean and deviation; of one seed no deviation is known."""
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.3g}" + (f" ± {deviation:.2g}" if deviation == deviation else "")


def compare(
    name: str, title: str, found: Mapping[str, list[dict]], out: Path, console: Console
) -> None:
    """One row an arm; found: the summaries of its seeds."""
    stats = {
        arm: {k: mean_and_deviation([s[k] for s in seeds]) for k in MEASURES}
        for arm, seeds in found.items()
    }
    seeds = len(next(iter(found.values())))
    cells = [[arm, *map(cell, each.values())] for arm, each in stats.items()]
    header = ["arm", *(label for label, _ in MEASURES.values())]
    show(f"{title}, {seeds} seed{'s' * (seeds > 1)}", header, cells, console)
    columns = [f"{k}_{what}" for k in MEASURES for what in ("mean", "deviation")]
    rows = [
        [arm, seeds, *(f"{v:.6g}" for x in each.values() for v in (x or (float("nan"),) * 2))]
        for arm, each in stats.items()
    ]
    write_csv(out / f"{name}.csv", ["arm", "seeds", *columns], rows)

    shown = ("kl", "jsd", "rouge_l", "teacher_share")
    figure, axes = plt.subplots(1, len(shown), figsize=(13, 0.9 + 0.36 * len(stats)), sharey=True)
    for axis, key in zip(axes, shown, strict=True):
        label, larger = MEASURES[key]
        better = "" if larger is None else f" ({'higher' if larger else 'lower'} is better)"
        axis.set_title(label + better, fontsize=9)
        for place, each in enumerate(stats.values()):
            if each[key] is not None:
                axis.errorbar(*each[key][:1], place, xerr=each[key][1], fmt="o", color="C0")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(stats)), stats)
    axes[0].invert_yaxis()
    save(figure, out / f"{name}.png")
