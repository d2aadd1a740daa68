"""Who writes token t: the rollout policies.

A policy is a rule "the teacher writes iff divergence > threshold", so every policy runs in the same
loop and through the same `switch_select`:

    student     threshold +inf              teacher     threshold -inf
    switch      tau_t of a schedule         adaswitch   K * mean of the last L KLs, then -inf
    skd         rank of the student's token among the teacher's logits against K - 1

Sources: SWITCH, arXiv 2410.19503, eqs. 3-5 and Table 3; AdaSwitch, arXiv 2510.07842; SKD, arXiv
2410.11325.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from switchkd_kernels.reference import STREAM_COIN, uniform
from torch import Tensor

SCHEDULES = ("exponential", "linear", "constant", "growth", "random", "mix-in", "sequence")


def require(ok: bool, name: str, got, expected: str) -> None:
    """ValueError unless `ok`, saying what the option `name` is and what is expected."""
    if not ok:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class Policy:
    """The student writes every token; the base of the others.

    `metric` is what `switch_select` measures, the JSD in units of `base` (2 or "e"). `start` makes
    the state of a batch, `threshold` returns tau for the tokens at `positions`, and `observe` is
    told the divergences that were measured there, for all rows or those of a mask. A stateless
    policy leaves `state` as None.
    `settled` tells the rows that the teacher writes from here on, whatever the student thinks:
    nothing is compared there, and divergence and student_logprob of their records are NaN.
    """

    metric = "jsd"
    base = 2
    needs_teacher = True

    def start(self, rows: int, device: torch.device):
        return None

    def threshold(self, state, seed: int, sequence_ids: Tensor, positions: Tensor) -> Tensor:
        return torch.full(positions.shape, math.inf, dtype=torch.float64, device=positions.device)

    def observe(self, state, threshold: Tensor, divergence: Tensor, rows=None) -> None:
        pass

    def settled(self, state, positions: Tensor) -> Tensor:
        """bool, of the shape of `positions`."""
        return torch.zeros_like(positions, dtype=torch.bool)


@dataclass(frozen=True)
class Student(Policy):
    """On-policy rollout: what GKD does with its share `lmbda` of the batch."""

    needs_teacher = False


@dataclass(frozen=True)
class Teacher(Policy):
    """Teacher-generated sequences (SeqKD)."""

    def threshold(self, state, seed, sequence_ids, positions):
        return torch.full(positions.shape, -math.inf, dtype=torch.float64, device=positions.device)

    def settled(self, state, positions):
        return torch.ones_like(positions, dtype=torch.bool)


@dataclass(frozen=True)
class Switch(Policy):
    """SWITCH: the teacher writes token t iff JSD(p_t, q_t) > tau_t (arXiv 2410.19503, eq. 4).

    Schedules (Table 3), with T = `max_new_tokens` and t = 0 for the first response token:
        exponential  tau0 * exp(-decay * t)          growth  tau0 * exp(-decay * (T - t))
        linear       tau0 * (1 - t / T)              constant  tau0
        random       teacher with probability `rate`
        mix-in       token from rate * p + (1 - rate) * q, which is `random` by another name: a draw
                     from a mixture is a coin, then a draw from one side (MiniLLM's rate is 0.2)
        sequence     teacher for the whole response with probability `rate`: the two kinds of
                     responses of DistiLLM-2 (arXiv 2503.07067), drawn apart
    The paper prints no formula of growth and no rate of random. It prints neither the base nor
    whether its first t is 0; it has the JSD in [0, 1], as bits are.
    base: of the JSD's logarithm; 2: bits, at most 1; "e": nats, at most 0.693 (as SSD).
    """

    schedule: str = "exponential"
    tau0: float = 1.0
    decay: float = 0.1
    rate: float = 0.5
    tau_min: float = 0.0
    max_new_tokens: int = 256
    base: int | str = 2

    def __post_init__(self):
        require(self.schedule in SCHEDULES, "switch_schedule", self.schedule, str(SCHEDULES))
        require(self.tau0 > 0, "switch_tau0", self.tau0, "a number > 0")
        require(self.decay >= 0, "switch_lambda", self.decay, "a number >= 0")
        require(0 <= self.rate <= 1, "switch_rate", self.rate, "a probability in [0, 1]")
        require(self.tau_min >= 0, "switch_tau_min", self.tau_min, "a number >= 0")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.base in (2, "e"), "jsd_base", self.base, "2 or e")

    def threshold(self, state, seed, sequence_ids, positions):
        t, T = positions.double(), float(self.max_new_tokens)
        if self.schedule in ("random", "mix-in", "sequence"):
            at = torch.zeros_like(positions) if self.schedule == "sequence" else positions
            coin = uniform(seed, sequence_ids, at, STREAM_COIN)
            return torch.where(coin < self.rate, -math.inf, math.inf).double()
        if self.schedule == "exponential":  # in log space, so that a late tau keeps its digits
            tau = torch.exp(math.log(self.tau0) - self.decay * t)
        elif self.schedule == "growth":
            tau = torch.exp(math.log(self.tau0) - self.decay * (T - t))
        elif self.schedule == "linear":
            tau = self.tau0 * (1 - t / T)
        else:
            tau = torch.full_like(t, self.tau0)
        return tau.clamp(min=self.tau_min)


@dataclass(frozen=True)
class AdaSwitch(Policy):
    """AdaSwitch: one hand-over for good when KL(p||q) > K * mean of the last L KLs before it.

    The threshold uses the window *before* step i: with d_i inside its own mean, d_i > K * mean is
    impossible for K >= L. No hand-over before `warm_up` steps (default L), and the mean is floored,
    or a deterministic stretch (mean ~ 0) would trigger on rounding noise. The paper's K and L could
    not be recovered, so both are required.
    """

    K: float
    L: int
    warm_up: int | None = None
    floor: float = 1e-4

    metric = "kl"

    def __post_init__(self):
        require(self.K is not None and self.K > 0, "adaswitch_k", self.K, "a number > 0")
        require(self.L is not None and self.L >= 1, "adaswitch_window", self.L, "an integer >= 1")
        require(self.floor >= 0, "adaswitch_floor", self.floor, "a number >= 0")
        warm_up_ok = self.warm_up is None or self.warm_up >= 1
        require(warm_up_ok, "adaswitch_warm_up", self.warm_up, "an integer >= 1")

    def start(self, rows, device):
        return {
            "window": torch.zeros(rows, self.L, dtype=torch.float64, device=device),
            "seen": torch.zeros(rows, dtype=torch.int64, device=device),
            "handed_over": torch.zeros(rows, dtype=torch.bool, device=device),
        }

    def threshold(self, state, seed, sequence_ids, positions):
        seen = state["seen"]
        mean = state["window"].sum(1) / seen.clamp(1, self.L)
        tau = self.K * mean.clamp(min=self.floor)
        warm_up = self.L if self.warm_up is None else self.warm_up
        tau = torch.where(seen < warm_up, math.inf, tau)
        return torch.where(state["handed_over"], -math.inf, tau)

    def observe(self, state, threshold, divergence, rows=None):
        rows = torch.ones_like(state["handed_over"]) if rows is None else rows
        slot = (state["seen"] % self.L)[:, None]
        kept = state["window"].gather(1, slot)[:, 0]
        new = torch.where(rows, divergence.double(), kept)
        state["window"].scatter_(1, slot, new[:, None])
        state["seen"] += rows
        state["handed_over"] |= (divergence > threshold) & rows

    def settled(self, state, positions):
        return state["handed_over"].clone()


@dataclass(frozen=True)
class SKD(Policy):
    """Speculative KD: the student's token stays if it is in the teacher's top K, else the teacher
    redraws it (arXiv 2410.11325, Algorithm 1). The tested token is the kept one."""

    top_k: int = 25
    metric = "rank"

    def __post_init__(self):
        require(self.top_k >= 1, "skd_top_k", self.top_k, "an integer >= 1")

    def threshold(self, state, seed, sequence_ids, positions):
        return torch.full_like(positions, self.top_k - 1, dtype=torch.float64)
