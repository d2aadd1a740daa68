"""The definition of every op, in plain PyTorch: any float dtype, CPU or GPU, no loop over rows.

Fused backends are tested against this file, with noise.py for the random numbers and rowwise.py for
the mathematics of one pair of rows. V is the shared real vocabulary, M rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd_kernels import _arguments as arguments
from switchkd_kernels import _checks as check
from switchkd_kernels.noise import (
    STREAM_COIN,
    STREAM_MIX,
    STREAM_REDRAW,
    STREAM_TEXT,
    STREAM_TOKEN,
    gumbel,
    philox,
    uniform,
)
from switchkd_kernels.rowwise import (
    KINDS,
    Form,
    compare,
    form_of,
    gradients,
    in_base,
    log_prob,
    values,
)

__all__ = [
    "KINDS",
    "STREAM_COIN",
    "STREAM_MIX",
    "STREAM_REDRAW",
    "STREAM_TEXT",
    "STREAM_TOKEN",
    "SwitchSelection",
    "divergence_loss",
    "gumbel",
    "jsd",
    "philox",
    "sample",
    "switch_select",
    "uniform",
]


def _filter(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """-inf below the threshold of each filter in turn; values equal to a threshold all stay."""
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:  # keep v if the tokens strictly likelier than v hold less than top_p
        ranked = z.sort(descending=True).values
        mass = ranked.softmax(-1).cumsum(-1, dtype=torch.float64)
        kept = 1 + (mass[..., :-1] < top_p).sum(-1, keepdim=True)
        z = z.masked_fill(z < ranked.gather(-1, kept - 1), -math.inf)
    if min_p > 0:  # keep v if its probability is at least min_p times the largest
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return z


def draw(
    logits, ids, positions, seed, temperature, top_k, top_p, min_p, vocab_size, stream, model
) -> Tensor:
    """`sample` as a launcher: arguments as arguments.sampling has checked them."""
    z = logits[:, :vocab_size].to(check.compute_dtype(logits))
    check.check_rows(model, z.amax(-1))
    if temperature == 0:
        return z.argmax(-1)
    noise = gumbel(seed % 2**64, ids, positions, vocab_size, stream, device=z.device)
    return (_filter(z / temperature, top_k, top_p, min_p) + noise).argmax(-1)


def sample(logits: Tensor, **options) -> Tensor:
    """`switchkd_kernels.sample` by a sort; raises InvalidLogits, naming `model`."""
    return draw(*arguments.sampling(logits, **options))


class SwitchSelection(NamedTuple):
    """One row per position: token (M,) int64, from_teacher (M,) bool, and in the compute dtype
    divergence (M,), teacher_logprob (M,) and student_logprob (M,) of the token in nats."""

    token: Tensor
    from_teacher: Tensor
    divergence: Tensor
    teacher_logprob: Tensor
    student_logprob: Tensor


def select(
    teacher, student, threshold, ids, positions, teacher_token, student_token,
    seed, teacher_temperature, student_temperature, metric, bits, vocab_size,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`switch_select` as a launcher: arguments as arguments.selection has checked them."""
    dtype = check.compute_dtype(teacher, student)
    teacher, student = (z[:, :vocab_size].to(dtype) for z in (teacher, student))
    pair = compare(teacher, student)

    def token_of(name: str, z: Tensor, temperature: float, token: Tensor | None, stream: int):
        if token is not None:  # one that is on a GPU has not been looked at
            return check.integers(f"{name}_token", token, vocab_size)
        if temperature == 0:
            return z.argmax(-1)
        if stream not in noise:
            noise[stream] = gumbel(seed % 2**64, ids, positions, vocab_size, stream)
        return (z / temperature + noise[stream]).argmax(-1)

    noise: dict[int, Tensor] = {}
    student_token = token_of("student", student, student_temperature, student_token, STREAM_TOKEN)
    redraw = STREAM_REDRAW if metric == "rank" else STREAM_TOKEN
    teacher_token = token_of("teacher", teacher, teacher_temperature, teacher_token, redraw)

    if metric == "rank":
        divergence = (teacher > teacher.gather(-1, student_token[:, None])).sum(-1).to(dtype)
    elif metric == "kl":
        divergence = values(pair, Form("kl_teacher_student")).clamp(max=50.0)
    else:
        divergence = in_base(values(pair, Form("jsd")), 2 if bits else "e")

    from_teacher = divergence > threshold
    token = torch.where(from_teacher, teacher_token, student_token)
    return token, from_teacher, divergence, log_prob(teacher, token), log_prob(student, token)


def switch_select(
    teacher_logits: Tensor, student_logits: Tensor, threshold: Tensor | float, **options
) -> SwitchSelection:
    """`switchkd_kernels.switch_select`; raises InvalidLogits with model and row."""
    return SwitchSelection(
        *select(*arguments.selection(teacher_logits, student_logits, threshold, **options))
    )


class _Divergence(torch.autograd.Function):
    """(M, V) logits to (M,) nats; saves its inputs and computes the rest again in backward."""

    @staticmethod
    def forward(ctx, teacher: Tensor, student: Tensor, form: Form, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(teacher, student)
        ctx.form = form
        dtype = check.compute_dtype(teacher, student)
        return values(compare(teacher.to(dtype), student.to(dtype), rows), form)

    @staticmethod
    @check.once_differentiable
    def backward(ctx, grad_output: Tensor):
        teacher, student = ctx.saved_tensors
        dtype = check.compute_dtype(teacher, student)
        grad = gradients(compare(teacher.to(dtype), student.to(dtype)), ctx.form)
        return None, (grad_output[:, None] * grad).to(student.dtype), None, None


def _nats(teacher_logits, student_logits, form, mask, vocab_size, reduction):
    """(kept rows,) divergences in nats, and the Rows that reduce them."""
    pair = {"teacher_logits": teacher_logits, "student_logits": student_logits}
    size = check.logits(vocab_size, **pair)
    rows = check.rows_of(student_logits.shape[:-1], mask, reduction)
    teacher = rows.take(teacher_logits.detach())[:, :size]
    return _Divergence.apply(teacher, rows.take(student_logits)[:, :size], form, rows.kept), rows


def jsd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    base: int | str = 2,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "none",
) -> Tensor:
    """`switchkd_kernels.jsd`; raises InvalidLogits with model and row."""
    check.one_of("base", base, (2, "e"))
    nats, rows = _nats(teacher_logits, student_logits, Form("jsd"), mask, vocab_size, reduction)
    return rows.reduce(in_base(nats, base), reduction)


def divergence_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    kind: str = "skew_reverse_kl",
    alpha: float = 0.1,
    beta: float = 0.5,
    detach_mixture: bool = False,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`switchkd_kernels.divergence_loss`; raises InvalidLogits with model and row."""
    dtype = check.compute_dtype(teacher_logits, student_logits)
    form = form_of(kind, alpha, beta, detach_mixture, dtype)
    nats, rows = _nats(teacher_logits, student_logits, form, mask, vocab_size, reduction)
    return rows.reduce(nats, reduction)
