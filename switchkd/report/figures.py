"""The charts of a report: which data of a run go into which chart, and what is said of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from switchkd.report.rollouts import Buckets, Metric, Rollouts, metric_of
from switchkd.report.run import Run
from switchkd.report.svg import Chart, number, padded

MOST_POINTS = 150
STUDENT, TEACHER, THIRD, FOURTH = "student", "teacher", "third", "fourth"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """legend: (CSS classes of the line or area, its name); note: a sentence on how to read it."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: means of equally many neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [tuple(sum(column) / len(g) for column in zip(*g, strict=True)) for g in groups]


def axis(metric: Metric) -> str:
    """The metric with its unit."""
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def by_step(
    run: Run,
    title: str,
    lines: dict[str, tuple[str, Points]],
    *,
    y_label: str,
    unit: str = "",
    percent: bool = False,
    zero: bool = False,
    note: str = "",
) -> Figure | None:
    """Lines over training steps. lines: name -> (class, points); those without points are left out.
    Lines whose class has `rule` are levels drawn across. None if nothing is left."""  # fmt: skip
    lines = {name: (css, thin(points)) for name, (css, points) in lines.items() if points}
    curves = [points for css, points in lines.values() if "rule" not in css]
    if not curves:
        return None
    values = [y for _, points in lines.values() for _, y in points]
    last = max(run.step, max(x for points in curves for x, _ in points), 1)
    words = "; ".join(
        f"{name} from {number(points[0][1])} at step {number(points[0][0])} "
        f"to {number(points[-1][1])} at step {number(points[-1][0])}"
        for name, (css, points) in lines.items() if "rule" not in css
    )  # fmt: skip
    chart = Chart(
        (0, last), (0, 1) if percent else padded(values, zero),
        x_label="training step", y_label=y_label, percent=percent,
        label=f"{title} by training step: {words}",
    )  # fmt: skip
    for css, points in lines.values():
        level = "rule" in css
        points = [(0, points[0][1]), (last, points[0][1])] if level else points
        chart.line(points, css, dots=not level and len(points) <= 80, unit=unit)
    legend = tuple((css, name) for name, (css, _) in lines.items())
    if len(legend) == 1 and legend[0][1].lower() in title.lower():
        legend = ()
    return Figure(title, chart.svg(), legend, note)


def training(run: Run, rollouts: Rollouts | None) -> list[Figure]:
    """Loss, validation and the teacher's share, by training step."""
    levels = {
        f"floor: {name.replace('_', ' ')}": (f"rule {css}", [(0, scores["rouge_l"])])
        for (name, scores), css in zip(
            run.summary.get("floors", {}).items(), (THIRD, FOURTH), strict=False
        )
    }
    if rollouts is not None:
        share, source = rollouts.shares(), "Counted over the tokens of each step."
    else:
        share, source = run.series("rollout/teacher_share"), "From the log."
    metric, divergence = metric_of(run), run.series("rollout/divergence")
    entropy = {
        "cross-entropy of the references": (STUDENT, run.eval_series("cross_entropy")),
        "KL(p‖q)": (f"{THIRD} dash", run.eval_series("kl")),
    }
    jsd = {"JSD": (STUDENT, run.eval_series("jsd"))}
    rouge = {"Rouge-L": (STUDENT, run.eval_series("rouge_l")), **levels}
    found = [
        by_step(run, "Training loss", {"loss": (STUDENT, run.series("loss"))},
                y_label="loss, nats per token"),
        by_step(run, "Held-out text", entropy, y_label="nats per token", zero=True),
        by_step(run, "Held-out JSD to the teacher", jsd, y_label="bits per token", zero=True),
        by_step(run, "Held-out Rouge-L", rouge, y_label="Rouge-L", zero=True,
                note="One sample per row, against its best reference."),
        by_step(run, "Tokens written by the teacher", {"teacher": (TEACHER, share)},
                y_label="share of tokens", percent=True, note=source),
        by_step(run, "Divergence in rollouts",
                {"mean": (STUDENT, [(s, v + metric.offset) for s, v in divergence])},
                y_label=axis(metric), zero=True, note="Mean over compared tokens."),
    ]  # fmt: skip
    return [figure for figure in found if figure is not None]


def interventions(rollouts: Rollouts) -> list[Figure]:
    """Who writes where, and how far the models are apart there."""
    buckets = rollouts.buckets()
    found = [_share(rollouts, buckets)]
    if rollouts.compared:
        found += [_divergence(rollouts, buckets), _histogram(rollouts)]
    return found


def _share(rollouts: Rollouts, b: Buckets) -> Figure:
    width = int(b.stop[0] - b.start[0])
    words = (
        f"{100 * b.share[0]:.0f} % in the first positions, {100 * b.share[-1]:.0f} % in the last"
    )
    chart = Chart(
        (0, int(b.stop[-1])), (0, 1), percent=True,
        x_label="position in the response, tokens", y_label="teacher's share of tokens",
        label=f"Share of tokens written by the teacher, by position: {words}",
    )  # fmt: skip
    for start, stop, n, share in zip(b.start, b.stop, b.tokens, b.share, strict=True):
        where = f"position {start}" if stop - start == 1 else f"positions {start} to {stop - 1}"
        title = f"{where}: teacher {100 * share:.1f} % of {n:,} tokens"
        chart.bar((start, stop), (0, share), TEACHER, title)
        chart.bar((start, stop), (share, 1), f"{STUDENT} faint", title)
    legend = [(f"area {TEACHER}", "teacher"), (f"area {STUDENT} faint", "student")]
    middle = (b.start + b.stop) / 2
    if rollouts.metric.name == "JSD" and not np.isnan(b.tau).all():
        chart.line(list(zip(middle, b.tau, strict=True)), "ink dash")
        legend.append(("ink dash", f"τ, in {rollouts.metric.unit}, on the same axis"))
    note = f"Bars of {width} positions. " if width > 1 else ""
    return Figure("Who writes, by position", chart.svg(), tuple(legend), note)


def _divergence(rollouts: Rollouts, b: Buckets) -> Figure:
    metric, middle = rollouts.metric, (b.start + b.stop) / 2
    low, median, high = b.quantiles.T
    bottom = math.floor(math.log10(np.nanmin(low)))
    y = (10.0**bottom, 10.0 ** max(bottom + 1, math.ceil(math.log10(np.nanmax(high)))))
    known = median[~np.isnan(median)]
    chart = Chart(
        (0, int(b.stop[-1])), y, log_y=True,
        x_label="position in the response, tokens",
        y_label=axis(metric),
        label=f"{metric.name} by position: median from {number(known[0])} to {number(known[-1])}",
    )  # fmt: skip
    chart.band(list(zip(middle, low, high, strict=True)), STUDENT)
    points = list(zip(middle, median, strict=True))
    chart.line(points, STUDENT, dots=True, unit=metric.unit)
    note, legend = "", [(STUDENT, "median"), (f"area {STUDENT} faint", "10 % to 90 %")]
    if not np.isnan(b.tau).all():
        chart.line(list(zip(middle, b.tau, strict=True)), "ink dash")
        moving = " (geometric mean)" if metric.name.startswith("KL") else ""
        legend.append(("ink dash", f"threshold {metric.threshold}{moving}"))
        note = "The teacher writes above the threshold. "
    apart = 1 - rollouts.compared / rollouts.tokens
    if apart:
        note += f"{100 * apart:.1f} % of the tokens were written without a comparison."
    return Figure(f"{metric.name} by position", chart.svg(), tuple(legend), note)


def _histogram(rollouts: Rollouts) -> Figure:
    metric, bars = rollouts.metric, rollouts.histogram()
    most = max(student + teacher for *_, student, teacher in bars)
    (median,) = rollouts.quantiles(rollouts.by_writer.sum(0), at=(0.5,))
    chart = Chart(
        (bars[0][0], bars[-1][1]), (0, most * 1.05), log_x=True,
        x_label=axis(metric),
        y_label="tokens",
        label=f"Histogram of {metric.name} over {rollouts.compared:,} tokens, "
        f"median {number(median)}",
    )  # fmt: skip
    for low, high, student, teacher in bars:
        title = (
            f"{number(low)} to {number(high)}: {student:,} by the student, {teacher:,} the teacher"
        )
        chart.bar((low, high), (0, student), STUDENT, title)
        chart.bar((low, high), (student, student + teacher), TEACHER, title)
    legend = ((f"area {STUDENT}", "student wrote"), (f"area {TEACHER}", "teacher wrote"))
    note = f"{rollouts.compared:,} tokens, median {metric.text(median)}."
    if bars[0][0] == metric.edges[0] and not metric.offset:
        note += f" Smaller values, 0 too, are counted in the first bar ({number(bars[0][0])})."
    return Figure(f"How far apart: {metric.name}", chart.svg(), legend, note)


def speed(run: Run) -> list[Figure]:
    """Times of the log, by training step."""
    times = {
        "rollouts of a step": (STUDENT, run.series("time/rollout")),
        "loss of a micro-batch, forward": (f"{THIRD} dash", run.series("time/forward")),
    }
    rate = {"rollout": (STUDENT, run.series("rollout/tokens_per_second"))}
    found = [
        by_step(run, "Seconds", times, y_label="seconds", unit="s", zero=True),
        by_step(run, "Rollout speed", rate, y_label="tokens per second", zero=True),
    ]
    return [figure for figure in found if figure is not None]
