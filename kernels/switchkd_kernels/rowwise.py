"""The mathematics of a pair of rows: softmax, divergence, gradient. Written once for this language.

Notation: p teacher, q student, d = log q - log p, (M, V) each; values in nats. Divergences are sums
of non-negative terms in d, because thresholds fall below 1e-6, where sums of differences drown.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd_kernels import _checks as check

KINDS = (
    "kl_teacher_student",
    "kl_student_teacher",
    "generalized_jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
)


class Form(NamedTuple):
    """One divergence: a kind of KINDS or "jsd", its weight (alpha or beta), mixture detached?"""

    kind: str
    weight: float = 0.0
    detach: bool = False


def _weight(name: str, value: float, dtype: torch.dtype, ends: str = "[]") -> float:
    """Near 0 and 1 either a weight or 1 less the weight has too few digits in that type."""
    value = check.number(name, value, 0, 1, ends)
    least = 1e-12 if dtype == torch.float64 else 1e-4
    if value not in (0, 1) and not least <= value <= 1 - least:
        why = f"at least {least:.0e} from 0 and 1, or one of them, got {value}"
        raise ValueError(f"{name} must be {why}")
    return value


def form_of(kind: str, alpha: float, beta: float, detach_mixture: bool, dtype: torch.dtype) -> Form:
    """Check a loss's arguments, and name its limits: alpha 0 and beta 0, 1/2, 1 are other kinds."""
    check.one_of("kind", kind, KINDS)
    alpha, beta = _weight("alpha", alpha, dtype, "[)"), _weight("beta", beta, dtype)
    detach_mixture = bool(detach_mixture)
    if detach_mixture and kind not in ("skew_reverse_kl", "generalized_jsd"):
        why = "would leave no gradient" if kind == "skew_kl" else "has no mixture to detach"
        raise ValueError(f"detach_mixture is for skew_reverse_kl, got kind {kind!r}, which {why}")
    if kind == "generalized_jsd":
        limits = {0.0: "kl_teacher_student", 0.5: "jsd", 1.0: "kl_student_teacher"}
        return Form(limits.get(beta, kind), beta)
    if kind in ("skew_kl", "skew_reverse_kl"):
        limit = "kl_teacher_student" if kind == "skew_kl" else "kl_student_teacher"
        return Form(kind if alpha > 0 else limit, alpha, detach_mixture)
    return Form(kind)


class Pair(NamedTuple):
    """Two rows of distributions: p, q and d = log q - log p (0 where both vanish), (M, V) each."""

    p: Tensor
    q: Tensor
    d: Tensor


def compare(teacher: Tensor, student: Tensor, rows: Tensor | None = None) -> Pair:
    """Softmax of (M, V) logits of one compute dtype. Raises InvalidLogits, with the row in `rows`.

    d is (z_s - z_t) - (lse_s - lse_t). The first difference is exact for near logits; an offset of
    one model costs it the digits of its size, and goes with that of the maxima. That of the sums,
    by their ratio, errs by about one rounding, the same for the whole row, so that it enters a
    divergence only squared.
    """
    teacher_max, student_max = teacher.amax(-1, keepdim=True), student.amax(-1, keepdim=True)
    check.check_rows("teacher", teacher_max, rows)
    check.check_rows("student", student_max, rows)
    p, q = (teacher - teacher_max).exp_(), (student - student_max).exp_()
    p_sum, q_sum = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    d = (student - teacher).sub_(student_max - teacher_max).sub_((q_sum / p_sum).log_())
    return Pair(p.div_(p_sum), q.div_(q_sum), d.masked_fill_(d.isnan(), 0.0))


def log_prob(z: Tensor, token: Tensor) -> Tensor:
    """(M,) log-probabilities of tokens, from the rows' maxima: an offset takes no digits."""
    z = z - z.amax(-1, keepdim=True)
    return z.gather(-1, token[:, None]).squeeze(-1) - z.logsumexp(-1)


def _log_mix(d: Tensor, weight: float) -> Tensor:
    """log(w + (1 - w) e^d) for 0 < w < 1: the log of a mixture relative to its first part."""
    near = d.expm1().mul_(1 - weight).log1p_()
    far = torch.logaddexp(torch.full_like(d, math.log(weight)), d + math.log1p(-weight))
    return torch.where(d.abs() < 1, near, far)


def _difference(pair: Pair) -> Tensor:
    """q - p, without cancellation where they are near."""
    return torch.where(pair.d.abs() < 1, pair.p * pair.d.expm1(), pair.q - pair.p)


def _kl(x: Tensor, y: Tensor, e: Tensor) -> Tensor:
    """KL(x||y) = sum y - x - x e >= 0 term by term, e = log y - log x; (M,) nats.

    Near e = 0 as x (expm1(e) - e) by its Taylor series; y where x is 0; inf where y alone is 0.
    """
    series = torch.ones_like(e)
    for k in range(17 if e.dtype == torch.float64 else 9, 2, -1):  # |e| < 1/2: below rounding
        series.mul_(e).mul_(1 / k).add_(1)
    series.mul_(e).mul_(e).mul_(x).mul_(0.5)
    terms = torch.where(e.abs() < 0.5, series, y - x - x * e)
    return torch.where(x > 0, terms, y).sum(-1)


def _jsd(pair: Pair) -> Tensor:
    """JSD(p, q) = sum m h(r), m = (p + q) / 2, r = tanh(d / 2); (M,) nats in [0, ln 2].

    h(r) = 1/2 [(1+r) log(1+r) + (1-r) log(1-r)] = r atanh(r) + 1/2 log(1 - r^2), atanh(r) = d / 2;
    the second form is good to a few roundings at any small r. Cut at ln 2, so that rounding never
    lifts disjoint rows over a threshold of one bit.
    """
    half = pair.d.abs().mul_(0.5)
    r = half.tanh()
    near = (-r * r).log1p_().mul_(0.5).addcmul_(r, half)
    far = torch.special.xlog1py(1 - r, -r).add_((1 + r).mul_(r.log1p())).mul_(0.5)
    h = torch.where(r < 0.5, near, far)
    return (pair.p + pair.q).mul_(0.5).mul_(h).sum(-1).clamp(max=math.log(2))


def in_base(nats: Tensor, base: int | str) -> Tensor:
    """A Jensen-Shannon divergence in bits (base 2), at most 1, or as it is (base "e")."""
    return nats if base == "e" else (nats / math.log(2)).clamp(max=1.0)


def values(pair: Pair, form: Form) -> Tensor:
    """(M,) divergences in nats, each a sum of non-negative terms.

    Generalised JSD: GKD, arXiv 2306.13649, eq. 1, beta on the teacher. Skew KLs: DistiLLM, arXiv
    2402.03898: SKL = KL(p || a p + (1-a) q), SRKL = KL(q || (1-a) p + a q).
    """
    (p, q, d), w = pair, form.weight
    if form.kind == "jsd":
        return _jsd(pair)
    if form.kind == "kl_teacher_student":
        return _kl(p, q, d)
    if form.kind == "kl_student_teacher":
        return _kl(q, p, -d)
    if form.kind == "tvd":
        return 0.5 * _difference(pair).abs().sum(-1)
    if form.kind == "skew_kl":
        return _kl(p, w * p + (1 - w) * q, _log_mix(d, w))
    if form.kind == "skew_reverse_kl":
        return _kl(q, (1 - w) * p + w * q, _log_mix(-d, w))
    m = w * p + (1 - w) * q
    return w * _kl(p, m, _log_mix(d, w)) + (1 - w) * _kl(q, m, _log_mix(-d, 1 - w))


def gradients(pair: Pair, form: Form) -> Tensor:
    """(M, V) gradients of `values` in the student's logits z.

    dL/dz_j = u_j - q_j sum_i u_i with u = q dL/dq; a constant added to dL/dq drops out, so each
    form is shifted to vanish at p = q. With m the mixture: jsd and generalized_jsd
    dL/dq = (1-b) log(q/m), mixture detached or not; skew_kl -(1-a) p/m; skew_reverse_kl
    log(q/m) - a q/m, or log(q/m) detached; kl_student_teacher log(q/p); tvd sign(q - p) / 2.
    """
    q, d, w = pair.q, pair.d, form.weight
    if form.kind == "kl_teacher_student":  # its sum is 0 but for rounding, which goes with it
        u = _difference(pair)
        return u - q * u.sum(-1, keepdim=True)
    if form.kind == "kl_student_teacher":
        u = q * d
    elif form.kind == "tvd":
        u = 0.5 * q * d.sign()
    elif form.kind == "skew_kl":
        u = (w - 1) * q * torch.expm1(-_log_mix(d, w))
    elif form.kind == "skew_reverse_kl":
        e = _log_mix(-d, w)  # log(m / q)
        u = -q * (e if form.detach else e + w * torch.expm1(-e))
    else:
        beta = 0.5 if form.kind == "jsd" else w
        u = (beta - 1) * q * _log_mix(-d, 1 - beta)
    u = u.masked_fill_(q == 0, 0.0)
    return u - q * u.sum(-1, keepdim=True)
