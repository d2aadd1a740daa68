"""What benchmarks/kernels.py measures: cases, inputs, implementations, the gate, bytes by hand.

A case is an op at one shape. Everything that measures it is a function of the case's inputs: ours
(reference, Triton and native), what a user would write (`eager`, and the same under
torch.compile), and the peers that compute the same function. `differs` compares any of them with
the float64 reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from switchkd_kernels import _backend as backend
from switchkd_kernels import (
    divergence_loss,
    jsd,
    linear_divergence_loss,
    reference,
    sample,
    switch_select,
)
from torch import Tensor

OPS = ("switch_select", "sample", "jsd", "divergence_loss", "linear_divergence_loss")
DRAWS = ("switch_select", "sample")
OURS = ("triton", "cuda", "cpu", "reference")
IMPLS = (*OURS, "eager", "compile", "liger", "trl", "orda")
SEED = 7
BOTH_KNOWN, STUDENT_KNOWN = "known", "student known"
KNOWN_TOKENS = {"": 0, STUDENT_KNOWN: 1, BOTH_KNOWN: 2}  # the student's, then the teacher's


class Case(NamedTuple):
    op: str
    rows: int
    vocab: int
    dtype: torch.dtype
    kind: str = ""  # of a loss: as the op's argument; of switch_select: whose token is known
    widths: tuple[int, int] = (0, 0)  # hidden widths of student and teacher
    compiled: bool = False  # torch.compile takes seconds a shape: only some cases

    def mode(self, base: str) -> str:
        """`base` (fwd, bwd, full), then what else tells cases of one shape apart."""
        widths = "{}/{}".format(*self.widths) if any(self.widths) else ""
        return " ".join(word for word in (base, self.kind, widths) if word)

    def name(self) -> str:
        return self.mode(f"{self.op} {self.rows} x {self.vocab}")


def cases(op: str, device: torch.device, quick: bool) -> list[Case]:
    """The shapes of an op, those compared with torch.compile first."""
    if device.type != "cuda":
        return _cpu_cases(op, quick)
    vocabs, kinds, widths = [32000, 50257, 128256, 151936], [""], [(0, 0)]
    if op in DRAWS:
        rows, compiled = [1, 8, 32, 64, 256, 1024], [1, 32, 1024]
    elif op == "linear_divergence_loss":
        rows, widths = [1024, 8192], [(896, 3584), (4096, 4096)]
        vocabs, compiled = vocabs[-2:], rows[-1:]
        kinds = ["skew_reverse_kl", "generalized_jsd"]
    else:
        rows, compiled = [512, 4096, 8192], [512, 8192]
        if op == "divergence_loss":
            kinds = ["skew_reverse_kl", "kl_teacher_student"]
    if quick:
        middle = len(rows) // 2
        rows, widths = rows[middle : middle + 1], widths[:1]
        vocabs, compiled = vocabs[-1:], rows
    found = [
        Case(op, n, v, torch.bfloat16, kind, width, v == vocabs[-1] and n in compiled)
        for kind in kinds
        for width in widths
        for v in vocabs
        for n in rows
    ]
    found = [case for case in found if case.compiled or case.kind != "kl_teacher_student"]
    return sorted(found, key=lambda case: not case.compiled)


def _cpu_cases(op: str, quick: bool) -> list[Case]:
    """Two shapes that fill the processor and one row; switch_select with both, one and no token
    known, that is with no noise, one model's and both models'."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    if op == "linear_divergence_loss":
        kinds = ["skew_reverse_kl", "generalized_jsd"]
        found = [Case(op, 256, 8192, float32, kind, (64, 64), True) for kind in kinds]
    else:
        kinds = {"switch_select": [BOTH_KNOWN, STUDENT_KNOWN, ""], "divergence_loss": [
            "skew_reverse_kl", "kl_teacher_student"]}.get(op, [""])  # fmt: skip
        shapes = [(64, 50257), (32, 151936), (1, 151936)]
        found = [Case(op, *shape, float32, kind, compiled=True) for kind in kinds
                 for shape in shapes]  # fmt: skip
        found += [Case(op, 32, 151936, bfloat16, kind, compiled=True) for kind in kinds[:1]]
    return [found[0]._replace(rows=8)] if quick else found


def inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Random tensors: rows of independent normal logits (of hidden states and heads, their
    product), then thresholds, ids and positions of a draw. The student's require a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    n, v, (hs, ht) = case.rows, case.vocab, case.widths

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    ids = torch.arange(n, device=device) + seed * n
    if case.op == "sample":
        return normal(n, v), ids, ids % 500
    if case.op == "switch_select":
        threshold = torch.rand(n, generator=generator, device=device)
        known = [ids * 7919 % v] * KNOWN_TOKENS[case.kind]
        return normal(n, v), normal(n, v), threshold, ids, ids % 500, *known
    if case.op != "linear_divergence_loss":
        return normal(n, v), normal(n, v).requires_grad_()
    teacher = normal(n, ht), normal(v, ht) / ht**0.5
    return *teacher, normal(n, hs).requires_grad_(), (normal(v, hs) / hs**0.5).requires_grad_()


def leaves(data: tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in data if x.requires_grad]


def bytes_moved(case: Case, mode: str) -> int:
    """The least an op has to move, whatever its implementation moves; 0 where products bound it.

    switch_select reads either row once (its second sweep is not counted), sample the one. A loss
    of two rows of logits reads both in forward; in backward it reads both and writes one gradient.
    Outputs of a few bytes a row do not count.
    """
    row = case.rows * case.vocab * case.dtype.itemsize
    passes = {"switch_select": 2, "sample": 1, "linear_divergence_loss": 0}
    return row * passes.get(case.op, {"fwd": 2, "bwd": 3, "full": 5}[mode.split()[0]])


# ------------------------------------------------------------------------------- eager


def eager_divergence(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    """The formula in log-softmaxes, mean over rows, nats; alpha 0.1, beta 0.5."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if kind == "kl_teacher_student":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    p, q = log_p.exp(), log_q.exp()
    if kind == "skew_reverse_kl":
        return (q * (log_q - (0.9 * p + 0.1 * q).log())).sum(-1).mean()
    log_m = ((p + q) / 2).log()
    return ((p * (log_p - log_m) + q * (log_q - log_m)) / 2).sum(-1).mean()


def eager_sample(logits: Tensor) -> Tensor:
    """Multinomial without its wait for the device: argmax of p / Exp(1)."""
    p = logits.float().softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def eager_select(
    teacher: Tensor, student: Tensor, threshold: Tensor,
    student_token: Tensor | None = None, teacher_token: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Softmaxes, JSD in bits, comparison, and the writer's token, drawn where it is not known; as
    SwitchSelection."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    nats = ((p * (log_p - log_m) + q * (log_q - log_m)) / 2).sum(-1)
    divergence = nats / math.log(2)
    from_teacher = divergence > threshold
    if student_token is None:
        probs = torch.where(from_teacher[:, None], p, q)
        token = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    else:
        if teacher_token is None:
            teacher_token = (p / torch.empty_like(p).exponential_()).argmax(-1)
        token = torch.where(from_teacher, teacher_token, student_token)
    at = token[:, None]
    picked = log_p.gather(-1, at).squeeze(-1), log_q.gather(-1, at).squeeze(-1)
    return token, from_teacher, divergence, *picked


def eager(case: Case) -> Callable:
    if case.op == "switch_select":
        return lambda t, s, threshold, ids, positions, *known: eager_select(t, s, threshold, *known)
    if case.op == "sample":
        return lambda z, ids, positions: eager_sample(z)
    if case.op == "linear_divergence_loss":
        return lambda ht, wt, hs, ws: eager_divergence(ht @ wt.t(), hs @ ws.t(), case.kind)
    return lambda t, s: eager_divergence(t, s, case.kind)


# ------------------------------------------------------------------------------- ours and peers


def ours(case: Case, impl: str) -> Callable:
    if case.op == "switch_select":
        names = ("student_token", "teacher_token")
        return lambda t, s, threshold, ids, positions, *known: switch_select(
            t, s, threshold, seed=SEED, sequence_ids=ids, positions=positions, impl=impl,
            **dict(zip(names, known, strict=False)),
        )  # fmt: skip
    if case.op == "sample":
        return lambda z, ids, positions: sample(
            z, seed=SEED, sequence_ids=ids, positions=positions, impl=impl
        )
    if case.op == "jsd":
        return lambda t, s: jsd(t, s, base="e", reduction="mean", impl=impl)
    if case.op == "divergence_loss":
        return lambda t, s: divergence_loss(t, s, kind=case.kind, impl=impl)
    return lambda *heads: linear_divergence_loss(*heads, kind=case.kind, impl=impl)


def liger(case: Case) -> Callable | None:
    """Means over rows of log-softmaxes that the caller computes, or of hidden states."""
    from liger_kernel import transformers as kernels

    if case.op == "linear_divergence_loss" and case.kind == "generalized_jsd":
        loss = kernels.LigerFusedLinearJSD(jsd_beta=0.5)
        return lambda ht, wt, hs, ws: loss(hs, ws, ht, wt, None)
    if case.op == "jsd":
        loss = kernels.LigerJSD(beta=0.5)
    elif case.kind == "kl_teacher_student":
        loss = kernels.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        return None
    return lambda t, s: loss(s.float().log_softmax(-1), t.float().log_softmax(-1))


def trl(case: Case) -> Callable:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as function

    return lambda ht, wt, hs, ws: function.apply(hs, ws, None, ht, wt, None, 0.5)[0].mean()


def orda(case: Case) -> Callable:
    """Its mixture weighs the teacher by 1 - kl_beta."""
    import orda_kernel

    names = {"skew_reverse_kl": ("skew_reverse", 0.1), "generalized_jsd": ("skew_js", 0.5)}
    name, beta = names[case.kind]

    def run(ht, wt, hs, ws):
        labels = torch.zeros(case.rows, dtype=torch.int64, device=hs.device)
        return orda_kernel.distillation_loss(
            hs, ws, labels, orda_kernel.SeparateTeacher(ht, wt),
            student_ce_weight=0.0, kl_weight=1.0, kl_divergence=name, kl_beta=beta,
            reduction="mean", backend="torch" if hs.device.type == "cpu" else "triton",
        ).loss  # fmt: skip

    return run


def implementations(case: Case, device: torch.device, quick: bool) -> tuple[dict, dict]:
    """(name -> function of the inputs, name -> why it is not measured)."""
    found, absent = {}, {}
    reason = backend.triton_refuses(torch.empty(0, device=device, dtype=case.dtype))
    if device.type == "cpu" or backend.interpreting():
        reason = "needs a GPU: its interpreter is never timed"
    if reason:
        absent["triton"] = reason
    else:
        found["triton"] = ours(case, "triton")
    for impl in ("cpu", "cuda") if case.op == "switch_select" else ("cpu",):
        if reason := backend.refuses(impl, torch.empty(0, device=device, dtype=case.dtype)):
            absent[impl] = reason
        else:
            found[impl] = ours(case, impl)
    found["reference"] = ours(case, "reference")
    found["eager"] = eager(case)
    if quick:
        absent["compile"] = "left out of --quick"
    elif case.compiled:
        torch._dynamo.reset()  # a function is compiled for a few shapes, then runs as it is
        found["compile"] = torch.compile(found["eager"], dynamic=False, fullgraph=True)
    peers = {} if case.op in DRAWS else {"liger": liger}
    if case.op == "linear_divergence_loss":
        peers |= {"orda": orda} | ({"trl": trl} if case.kind == "generalized_jsd" else {})
    for name, build in peers.items():
        if name == "liger" and device.type == "cpu":
            absent[name] = "needs a GPU"
            continue
        try:
            if function := build(case):
                found[name] = function
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            absent[name] = "not installed" if missing else str(error)
    return {name: found[name] for name in IMPLS if name in found}, absent


# ------------------------------------------------------------------------------- the gate


def expected(case: Case, data: tuple[Tensor, ...]):
    """What the float64 reference says: of a draw the selection and both models' perturbed logits,
    of a loss its value and gradients (of 32 rows of logits, spread over all)."""
    if case.op in DRAWS:
        double = [x.double() if x.is_floating_point() else x for x in data]
        logits = double[: 1 if case.op == "sample" else 2]
        ids, positions = double[1:3] if case.op == "sample" else double[3:5]
        noise = reference.gumbel(SEED, ids, positions, case.vocab, device=ids.device)
        perturbed = _favoured([z + noise for z in logits], data)
        if case.op == "sample":
            return None, perturbed
        return ours(case, "reference")(*double), perturbed
    if case.op == "linear_divergence_loss":
        double = [x.detach().double().requires_grad_(x.requires_grad) for x in data]
        value = linear_divergence_loss(*double, kind=case.kind, chunk_size=1024, impl="reference")
        return value.item(), torch.autograd.grad(value, double[2:]), None
    kind = case.kind or "generalized_jsd"
    total = 0.0
    for part in torch.arange(case.rows, device=data[0].device).split(256):
        pair = (x.detach()[part].double() for x in data)
        total += reference.divergence_loss(*pair, kind=kind, reduction="sum").item()
    probe = torch.linspace(0, case.rows - 1, min(case.rows, 32), device=data[0].device).long()
    teacher, student = (x.detach()[probe].double() for x in data)
    student.requires_grad_()
    reference.divergence_loss(teacher, student, kind=kind, reduction="sum").backward()
    return total / case.rows, [student.grad / case.rows], probe


class Tolerance(NamedTuple):
    value: float
    gradient: float


def tolerance(case: Case, impl: str) -> Tolerance:
    """Relative to the value and to the largest entry of a gradient. Ours compute logits as given in
    float32; gradients are rounded to the inputs' dtype, and so are products of bfloat16."""
    if impl not in (*OURS, "eager"):
        return Tolerance(5e-2, 5e-2)
    if case.dtype == torch.float32:
        return Tolerance(1e-4, 1e-4)
    return Tolerance(1e-2, 5e-2) if case.op == "linear_divergence_loss" else Tolerance(1e-4, 1e-2)


def differs(case: Case, impl: str, run: Callable, data, want) -> str | None:
    """How the results of `run` differ from those of `expected`; None if they agree."""
    if case.op in DRAWS:
        return _draw_differs(case, impl, run, data, want)
    value, gradients, probe = want
    limit = tolerance(case, impl)
    loss = run(*data)
    got = torch.autograd.grad(loss, leaves(data))
    loss = loss.item()
    if not abs(loss - value) <= limit.value * abs(value):
        return f"value {loss:.6g}, expected {value:.6g} within {limit.value:.0e} of it"
    for one, wanted in zip(got, gradients, strict=True):
        one = one if probe is None else one[probe]
        error = float((one.double() - wanted).abs().max() / wanted.abs().max())
        if not error <= limit.gradient:
            return f"gradient off by {error:.2g} of its largest entry, allowed {limit.gradient:.0e}"
    return None


def _favoured(fields: list[Tensor], data: tuple[Tensor, ...]) -> list[Tensor]:
    """Perturbed logits of teacher and student, in which a token that is known is the largest."""
    for field, token in zip(fields[::-1], data[5:], strict=False):
        field.scatter_(1, token[:, None], 1e9)
    return fields


def _draw_differs(case: Case, impl: str, run: Callable, data, want) -> str | None:
    """Tokens must maximise the perturbed logits of their writer. An implementation with noise of
    its own is shown logits so large that noise does not matter."""
    selection, perturbed = want
    got = run(*data)
    if case.op == "switch_select":
        token, from_teacher, divergence, *log_probs = got
        clear = (selection.divergence - data[2].double()).abs() > 1e-4
        wrong = int(((from_teacher != selection.from_teacher) & clear).sum())
        if wrong:
            return f"{wrong} of {case.rows} writers differ"
        error = float((divergence.double() - selection.divergence).abs().max())
        if not error <= 1e-4:
            return f"divergence off by {error:.2g} bits, allowed 1e-4"
        for name, z, log_prob in zip(("teacher", "student"), data[:2], log_probs, strict=True):
            exact = z.double().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
            error = float((log_prob.double() - exact).abs().max())
            if not error <= 1e-4:
                return f"{name}'s log-probability off by {error:.2g} nats, allowed 1e-4"
    allowed = 1e-4
    if impl not in OURS:
        count, allowed = len(perturbed), 1e2
        sharp = [1e4 * z for z in data[:count]]
        got = run(*sharp, *data[count:])
        perturbed = _favoured([z.double() for z in sharp], data)
    token = (got if case.op == "sample" else got[0])[:, None]
    field = perturbed[0]
    if case.op == "switch_select":
        field = torch.where(got[1][:, None], *perturbed)
    if not bool(((token >= 0) & (token < case.vocab)).all()):
        return f"tokens {int(token.min())}..{int(token.max())}, expected [0, {case.vocab})"
    slack = float((field.amax(-1) - field.gather(-1, token).squeeze(-1)).max())
    if not slack <= allowed:
        return f"a token is {slack:.2g} below the largest perturbed logit, allowed {allowed:.0e}"
    return None
