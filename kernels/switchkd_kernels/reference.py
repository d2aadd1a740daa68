"""The definition of every op, in plain PyTorch: any float dtype, CPU or GPU, no loop over rows.

Fused backends are tested against this file, with noise.py for the random numbers and rowwise.py for
the mathematics of one pair of rows. V is the shared real vocabulary, M rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

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
from switchkd_kernels.rowwise import KINDS, Form, compare, form_of, gradients, in_base, values

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


def sample(
    logits: Tensor,
    *,
    seed: int,
    sequence_ids,
    positions,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
    stream: int = STREAM_TOKEN,
    model: str = "student",
) -> Tensor:
    """`switchkd_kernels.sample` by a sort; raises InvalidLogits, naming `model`."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be (rows, vocabulary), got {tuple(logits.shape)}")
    temperature = check.temperature("temperature", temperature)
    check.number("top_k", top_k, 0, math.inf)
    check.number("min_p", min_p, 0, 1)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    size = check.shared_vocab(logits.shape[-1], logits.shape[-1], vocab_size)
    z = logits.detach()[:, :size].to(check.compute_dtype(logits))
    check.check_rows(model, z.amax(-1))
    if temperature == 0:
        return z.argmax(-1)
    noise = gumbel(seed, sequence_ids, positions, size, stream, device=z.device)
    return (_filter(z / temperature, top_k, top_p, min_p) + noise).argmax(-1)


class SwitchSelection(NamedTuple):
    """One row per position: token (M,) int64, from_teacher (M,) bool, and in the compute dtype
    divergence (M,), teacher_logprob (M,) and student_logprob (M,) of the token in nats."""

    token: Tensor
    from_teacher: Tensor
    divergence: Tensor
    teacher_logprob: Tensor
    student_logprob: Tensor


def switch_select(
    teacher_logits: Tensor,
    student_logits: Tensor,
    threshold: Tensor | float,
    *,
    seed: int,
    sequence_ids,
    positions,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    metric: str = "jsd",
    base: int | str = 2,
    teacher_token: Tensor | None = None,
    student_token: Tensor | None = None,
    vocab_size: int | None = None,
) -> SwitchSelection:
    """`switchkd_kernels.switch_select`; raises InvalidLogits with model and row."""
    if teacher_logits.dim() != 2 or teacher_logits.shape[:1] != student_logits.shape[:-1]:
        raise ValueError(
            "teacher_logits and student_logits must be (rows, vocabulary) with equal rows, got "
            f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    check.one_of("metric", metric, ("jsd", "kl", "rank"))
    check.one_of("base", base, (2, "e"))
    rows = teacher_logits.shape[0]
    size = check.shared_vocab(teacher_logits.shape[-1], student_logits.shape[-1], vocab_size)
    dtype = check.compute_dtype(teacher_logits, student_logits)
    teacher = teacher_logits.detach()[:, :size].to(dtype)
    student = student_logits.detach()[:, :size].to(dtype)
    threshold = torch.as_tensor(threshold, device=teacher.device).to(dtype)
    if threshold.dim() and threshold.shape != (rows,):
        raise ValueError(f"threshold must be a number or ({rows},), got {tuple(threshold.shape)}")
    if bool(threshold.isnan().any()):
        raise ValueError("threshold must be a number in every row, got NaN")
    pair = compare(teacher, student)

    def token_of(name: str, z: Tensor, temperature: float, token: Tensor | None, stream: int):
        temperature = check.temperature(f"{name}_temperature", temperature)
        if token is not None:
            return check.integers(f"{name}_token", token, size, z.device).expand(rows)
        if temperature == 0:
            return z.argmax(-1)
        if stream not in noise:
            noise[stream] = gumbel(seed, sequence_ids, positions, size, stream, device=z.device)
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
        divergence = in_base(values(pair, Form("jsd")), base)

    from_teacher = divergence > threshold
    token = torch.where(from_teacher, teacher_token, student_token)
    index = token[:, None]
    log_p = teacher.gather(-1, index).squeeze(-1) - teacher.logsumexp(-1)
    log_q = student.gather(-1, index).squeeze(-1) - student.logsumexp(-1)
    return SwitchSelection(token, from_teacher, divergence, log_p, log_q)


class _Divergence(torch.autograd.Function):
    """(M, V) logits to (M,) nats; saves its inputs and computes the rest again in backward."""

    @staticmethod
    def forward(ctx, teacher: Tensor, student: Tensor, form: Form, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(teacher, student)
        ctx.form = form
        dtype = check.compute_dtype(teacher, student)
        return values(compare(teacher.to(dtype), student.to(dtype), rows), form)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        teacher, student = ctx.saved_tensors
        dtype = check.compute_dtype(teacher, student)
        grad = gradients(compare(teacher.to(dtype), student.to(dtype)), ctx.form)
        return None, (grad_output[:, None] * grad).to(student.dtype), None, None


def _nats(teacher_logits, student_logits, form, mask, vocab_size, reduction):
    """(kept rows,) divergences in nats, and the Rows that reduce them."""
    shape = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != shape or teacher_logits.dim() == 0:
        raise ValueError(
            "teacher_logits and student_logits must agree in all but the last dimension, got "
            f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    size = check.shared_vocab(teacher_logits.shape[-1], student_logits.shape[-1], vocab_size)
    rows = check.rows_of(shape, mask, reduction)
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
    form = form_of(kind, alpha, beta, detach_mixture)
    nats, rows = _nats(teacher_logits, student_logits, form, mask, vocab_size, reduction)
    return rows.reduce(nats, reduction)
