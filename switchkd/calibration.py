"""Choosing the threshold of SWITCH for a wanted share of teacher-written tokens.

The paper leaves the decay to trial runs (arXiv 2410.19503, Table 4: 1/5 to 1/25 move the teacher's
share from 78 % to 7 %). The share under a threshold follows from the divergences alone,

    share(tau0, lambda) = mean over response tokens of [d_t > tau_t],

but the divergences are those of the mixed text, which the threshold changes. So: roll out, solve
for lambda on what was measured, roll out with it, and so on, until a rollout has the share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from switchkd.policies import Switch
from switchkd.rollout import Rollout

TOLERANCE = 0.02  # of the share: about the deviation between batches of some thousand tokens
NEAR = 0.5  # at most this part of the target: 0.001 is not 0.01
ENOUGH = 1000  # tokens: with fewer, a share that is missed need not be the schedule's fault
ROLLOUTS = 8  # at most
STEEPEST = 50.0  # lambda: all but one end of the response has a threshold of about 0
LOWEST = 1e-12  # tau0: the teacher writes wherever the two models are not the same
DECAYING = ("exponential", "growth")  # schedules with a lambda
CALIBRATED = (*DECAYING, "linear", "constant")  # schedules with a threshold
NOISE = 2**20  # the epoch whose noise the calibration draws with: none of training's
EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # positions of the curve


@dataclass(frozen=True)
class Divergences:
    """What rollouts measured: for each response token its position and its divergence (N,), in the
    policy's base, and how many tokens the teacher wrote."""

    positions: Tensor
    values: Tensor
    teacher_tokens: int

    @staticmethod
    def of(rollout: Rollout) -> Divergences:
        """Of a rollout in which both models were compared at every token."""
        there = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
        values = rollout.divergence[there].double()
        return Divergences(there.nonzero()[:, 1], values, rollout.teacher_tokens())

    @staticmethod
    def join(parts: list[Divergences]) -> Divergences:
        positions = torch.cat([part.positions for part in parts])
        values = torch.cat([part.values for part in parts])
        return Divergences(positions, values, sum(part.teacher_tokens for part in parts))

    @property
    def teacher_share(self) -> float:
        return self.teacher_tokens / len(self.values)

    def share(self, policy: Switch) -> float:
        """The teacher's share under a policy, if the text stayed as it is."""
        tau = policy.threshold(None, 0, torch.zeros_like(self.positions), self.positions)
        return (self.values > tau).double().mean().item()


@dataclass(frozen=True)
class Calibration:
    """What was chosen, and on what grounds: one row of `curve` per range of positions."""

    target: float
    teacher_share: float
    switch_tau0: float
    switch_lambda: float
    rollouts: int
    curve: list[dict]

    def to_dict(self) -> dict:
        return asdict(self)


def solve(measured: Divergences, policy: Switch, target: float) -> Switch:
    """The policy whose share of `measured` is nearest to `target`.

    tau0 stays as it is where lambda alone can reach the target; else lambda is at its end, and
    tau0 moves.
    """

    def bisect(make: Callable[[float], Switch], low: float, high: float) -> Switch:
        """Between two values of a knob; the share rises from that at `low` to that at `high`."""
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if measured.share(make(middle)) < target else (low, middle)
        ends = [make(low), make(high)]
        return min(ends, key=lambda p: abs(measured.share(p) - target))

    if policy.schedule in DECAYING:
        flat, steep = replace(policy, decay=0.0), replace(policy, decay=STEEPEST)
        if measured.share(flat) <= target <= measured.share(steep):
            # in log lambda: a growing threshold asks for one of about 1 / max_new_tokens
            ends = math.log(1e-6), math.log(STEEPEST)
            return bisect(lambda x: replace(policy, decay=math.exp(x)), *ends)
        policy = flat if target < measured.share(flat) else steep
    # the lower tau0, the more the teacher writes
    top = 1.0 if policy.base == 2 else math.log(2)
    ends = -math.log(top), -math.log(LOWEST)
    return bisect(lambda x: replace(policy, tau0=math.exp(-x)), *ends)


def calibrate(
    policy: Switch, target: float, measure: Callable[[Switch], Divergences]
) -> tuple[Switch, Calibration]:
    """The threshold with which the teacher writes a share `target` of the tokens.

    measure: what a rollout of the calibration batch under a policy measures. Raises ValueError for
    schedules that have no threshold, and for a target that is not reached within TOLERANCE, or
    within NEAR of itself.
    """
    check(policy, target)
    tolerance = min(TOLERANCE, NEAR * target)
    tried: list[tuple[Switch, Divergences]] = []
    low = high = None  # the last policies measured below and above the target

    def error(one: tuple[Switch, Divergences]) -> float:
        return abs(one[1].teacher_share - target)

    while len(tried) < ROLLOUTS:
        tried.append((policy, measure(policy)))
        if error(tried[-1]) <= tolerance / 2:
            break
        below = tried[-1][1].teacher_share < target
        low, high = (policy, high) if below else (low, policy)
        policy = between(low, high, solve(tried[-1][1], policy, target))
    policy, measured = min(tried, key=error)
    if error((policy, measured)) > tolerance:
        expected = f"one that switch_schedule {policy.schedule} reaches"
        if (tokens := len(measured.values)) < ENOUGH:
            expected = f"more calibration_rows ({tokens} tokens tell little), or {expected}"
        raise ValueError(
            f"target_teacher_share: got {target:g}, expected {expected}; the nearest was "
            f"{measured.teacher_share:.3f}, with switch_tau0 {policy.tau0:.4g} and switch_lambda "
            f"{policy.decay:.4g}"
        )
    return policy, Calibration(
        target=target,
        teacher_share=measured.teacher_share,
        switch_tau0=policy.tau0,
        switch_lambda=policy.decay,
        rollouts=len(tried),
        curve=curve(measured, policy),
    )


def calibrate_trainer(trainer) -> Calibration:
    """Give a SwitchTrainer the threshold for its `target_teacher_share`, also in its arguments.

    On `calibration_rows` training rows drawn by the seed, divided among the ranks; all ranks see
    all that was measured, and choose the same.
    """
    args, rows = trainer.args, trainer.train_dataset.rows
    count = min(max(args.calibration_rows, args.world_size), len(rows))
    mine = random.Random(args.seed).sample(rows, count)[args.process_index :: args.world_size]

    def measure(policy: Switch) -> Divergences:
        trainer.policy = policy
        part = Divergences.of(trainer.roll_out(mine, NOISE))
        return Divergences.join(trainer._gather([part]))

    before = trainer.policy
    try:
        policy, result = calibrate(args.policy(), args.target_teacher_share, measure)
    finally:
        trainer.policy = before  # a failure must not leave one that was only tried
    trainer.policy, trainer.calibration = policy, result.to_dict()
    args.switch_tau0, args.switch_lambda = policy.tau0, policy.decay
    return result


def between(low: Switch | None, high: Switch | None, wanted: Switch) -> Switch:
    """`wanted`, or, where it is not between the two policies that enclose the target, their middle.

    The prediction takes the text as given; where it errs to and fro, halving does not.
    """
    if low is None or high is None:
        return wanted

    def knob(policy: Switch) -> tuple[float, float]:  # both rise with the teacher's share
        return math.log(max(policy.decay, 1e-6)), -math.log(policy.tau0)

    ends = [knob(low), knob(high)]
    inside = all(min(a, b) <= x <= max(a, b) for x, a, b in zip(knob(wanted), *ends, strict=True))
    if inside and wanted not in (low, high):
        return wanted
    decay, tau0 = ((a + b) / 2 for a, b in zip(*ends, strict=True))
    decay = math.exp(decay) if low.decay != high.decay else low.decay
    return replace(wanted, decay=decay, tau0=math.exp(-tau0))


def check(policy, target: float) -> None:
    """Raise ValueError where no threshold can be chosen."""
    if not 0 < target < 1:
        raise ValueError(f"target_teacher_share: got {target}, expected a share between 0 and 1")
    if not isinstance(policy, Switch):
        name = type(policy).__name__.lower()
        raise ValueError(f"target_teacher_share: got rollout_policy {name}, expected switch")
    if policy.schedule not in CALIBRATED:
        raise ValueError(
            f"target_teacher_share: got switch_schedule {policy.schedule}, whose share is "
            f"switch_rate; expected one with a threshold: {', '.join(CALIBRATED)}"
        )


def curve(measured: Divergences, policy: Switch) -> list[dict]:
    """By ranges of positions: tokens, tau at both ends, deciles and median of the divergence, and
    the teacher's share."""
    rows = []
    tau = policy.threshold(None, 0, torch.zeros_like(measured.positions), measured.positions)
    for first, end in zip(EDGES, [*EDGES[1:], math.inf], strict=True):
        here = (measured.positions >= first) & (measured.positions < end)
        if not here.any():
            break
        values, last = measured.values[here], int(measured.positions[here].max())
        ends = torch.tensor([first, last])
        ends = policy.threshold(None, 0, torch.zeros_like(ends), ends).tolist()
        quantiles = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype))
        rows.append(
            {
                "first": first,
                "last": last,
                "tokens": int(here.sum()),
                "tau": ends,
                "divergence": quantiles.tolist(),
                "teacher_share": (values > tau[here]).double().mean().item(),
            }
        )
    return rows


def print_calibration(result: Calibration, unit: str, console: Console) -> None:
    """The curve, what was chosen and what it reaches."""
    title = f"divergence (JSD in {unit}) by position, against the threshold tau"
    table = Table(title=title)
    for name in ("tokens from - to", "10 %", "median", "90 %", "tau", "teacher writes"):
        table.add_column(name, justify="right")
    for row in result.curve:
        first, last = row["first"], row["last"]
        start, end = ("0" if tau < 1e-9 else f"{tau:.2g}" for tau in row["tau"])
        share = row["teacher_share"]
        table.add_row(
            f"{first}" if first == last else f"{first} - {last}",
            *(f"{d:.3f}" for d in row["divergence"]),
            start if first == last else f"{start} - {end}",
            f"{'█' * round(10 * share):<10} {share:4.0%}",
        )
    console.print(table)
    console.print(
        f"for a teacher's share of {result.target:.0%}: switch_tau0 {result.switch_tau0:.4g}, "
        f"switch_lambda {result.switch_lambda:.4g}"
    )
    console.print(f"share reached in trial rollout {result.rollouts}: {result.teacher_share:.1%}")
