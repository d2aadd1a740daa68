"""The page: everything of a run put into page.html.

Text of models, data and configurations is escaped by Jinja, with control characters made visible
first; only the charts of svg.py are markup. A policy in the page lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
from dataclasses import asdict
from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup

from switchkd import __version__
from switchkd.report import figures
from switchkd.report.rollouts import Rollouts
from switchkd.report.run import Run, phases
from switchkd.report.samples import MOST_TOKENS, Sample, visible

SCORES = {
    "cross_entropy": ("cross-entropy, nats per token", "lower"),
    "kl": ("KL(teacher ‖ student), nats", "lower"),
    "jsd": ("JSD to the teacher, bits", "lower"),
    "rouge_l": ("Rouge-L of samples", "higher"),
}
POLICIES = {
    "switch": "SWITCH: the teacher writes a token where the JSD exceeds the threshold",
    "adaswitch": "AdaSwitch: the student begins, the teacher takes over once and for good",
    "skd": "SKD: the student's token is redrawn by the teacher unless in its top K",
    "student": "student only (GKD): the models are not compared while writing",
    "teacher": "teacher only (SeqKD): the models are not compared while writing",
}


def status(run: Run) -> str:
    """How far the run got, in words."""
    if run.summary:
        steps = run.summary.get("steps", run.step)
        return f"finished {run.summary.get('finished', '')} after {steps:,} steps"
    if not run.step:
        return "not finished; no log of its steps is left"
    return f"not finished: logged up to step {run.step:,} of {run.max_steps:,}"


def score_table(run: Run) -> list[tuple[str, str, str, str]]:
    """(score, before, after or at the last validation, which is better)."""
    rows = []
    for key, (label, better) in SCORES.items():
        seen = run.series(f"eval_{key}")
        after = run.summary.get("after", {}).get(key, seen[-1][1] if seen else None)
        if after is not None:
            before = run.before.get(key)
            rows.append((label, "-" if before is None else f"{before:.3f}", f"{after:.3f}", better))
    return rows


def facts(run: Run, rollouts: Rollouts | None) -> list[tuple[str, str]]:
    """(what, value): the numbers one looks for first."""
    tokens, teacher = run.totals.get("tokens", 0), run.totals.get("teacher_tokens", 0)
    if rollouts is not None:
        tokens, teacher = rollouts.tokens, rollouts.teacher_tokens
    seconds = run.totals.get("seconds", 0.0)
    step = max([run.step, *(rollouts.by_step if rollouts else ())])
    found = [
        ("policy", str(run.config.get("rollout_policy", "unknown"))),
        ("steps", f"{step:,}"),
    ]
    if tokens:
        found += [
            ("rollout tokens", f"{tokens:,}"),
            ("written by the teacher", f"{100 * teacher / tokens:.1f} %"),
        ]
    else:
        found[0] = ("rollouts", "none")
    if rollouts is not None and rollouts.replayed:
        found.append(("replayed completions", f"{rollouts.replayed:,}, not counted again"))
    if seconds:
        found.append(("training time", duration(seconds)))
    return found


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def settings(config: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(options that differ from their defaults, all the others), as (name, value) in order."""
    from switchkd.arguments import ScriptArguments  # imports transformers
    from switchkd.config import SwitchConfig

    defaults = {**asdict(ScriptArguments()), **SwitchConfig(use_cpu=True).to_dict()}
    defaults["use_cpu"] = config.get("use_cpu")  # found out by a run, not chosen
    order = {name: i for i, name in enumerate(defaults)}
    names = sorted(config, key=lambda name: (order.get(name, len(order)), str(name)))
    changed = [n for n in names if n not in defaults or config[n] != defaults[n]]
    rest = [n for n in names if n not in changed]
    return [(str(n), str(config[n])) for n in changed], [(str(n), str(config[n])) for n in rest]


def shade_legend(rollouts: Rollouts) -> list[str]:
    """What each depth of a token's colour means, from the palest."""
    cuts = rollouts.metric.shades
    return [f"< {cuts[0]:g}", *(f"≥ {cut:g}" for cut in cuts)]


def render(
    run: Run,
    rollouts: Rollouts | None,
    samples: tuple[list[Sample], list[Sample]],
    notes: list[str],
) -> str:
    """The HTML of the report, complete in itself."""
    here = files("switchkd.report")
    template, style, script = (
        here.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "page.js")
    )
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, Markup) or not isinstance(v, str) else visible(v),
    )
    parts = phases(run)
    whole = sum(seconds for _, seconds in parts)
    changed, rest = settings(run.config)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        name=run.folder.resolve().name,
        status=status(run),
        policy=POLICIES.get(run.config.get("rollout_policy")) if rollouts else None,
        facts=facts(run, rollouts),
        scores=score_table(run),
        best=run.summary.get("best_checkpoint") and run.summary["best_checkpoint"].split("-")[-1],
        floors=run.summary.get("floors", {}),
        training=figures.training(run, rollouts),
        interventions=figures.interventions(rollouts) if rollouts and rollouts.tokens else [],
        samples=[
            (title, part)
            for title, part in zip(("Early in training", "Late in training"), samples, strict=True)
            if part
        ],
        most_tokens=MOST_TOKENS,
        metric=rollouts.metric if rollouts and rollouts.compared else None,
        uncompared=rollouts is not None and rollouts.compared < rollouts.tokens,
        shades=shade_legend(rollouts) if rollouts and rollouts.compared else [],
        speed=figures.speed(run),
        phases=[(n, duration(s), 100 * s / whole) for n, s in parts if math.isfinite(s) and s > 0],
        changed=changed,
        rest=rest,
        notes=notes,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        digest=digest,
    )
