"""Divergence between two language-model heads from their hidden states, a few rows at a time.

The loss of N tokens needs the logits (N, V) of two models, their softmax and their gradient: for
V = 150,000 that is more memory than the models. Here a chunk of rows is projected, compared and
turned into gradients of the student's hidden states and head before the next chunk is looked at:
four matrix products (teacher's and student's logits, d hidden, d weight; three for a frozen head).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from switchkd_kernels import _checks as check
from switchkd_kernels.rowwise import Form, compare, form_of, gradients, values

CHUNK_BYTES = 64 * 2**20  # of one model's logits in float32


class _Options(NamedTuple):
    form: Form | None  # None: the cross-entropy alone
    vocab_size: int
    logit_scale: float
    softcap: float | None
    ce_weight: float
    chunk_size: int
    rows: Tensor  # the caller's index of each row, for errors


class _Head(NamedTuple):
    """One model's last layer: hidden (N, H), weight (V, H) and bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: slice, options: _Options, dtype: torch.dtype) -> Tensor:
        """softcap tanh(s (h W^T + b) / softcap): the product in the inputs' dtype, then `dtype`."""
        z = (self.hidden[rows] @ self.weight.t()).to(dtype)
        if self.bias is not None:
            z = z.add_(self.bias)
        if options.logit_scale != 1:
            z = z.mul_(options.logit_scale)
        if options.softcap is not None:
            z = z.div_(options.softcap).tanh_().mul_(options.softcap)
        return z


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> _Head:
    """The real rows of a head, cast as autocast would: once a call, and never a float64 model.

    Autocast cannot be left to itself, because a cast outside would hand the float32 gradient of the
    weight back through the low precision.
    """
    hidden, weight = hidden.detach(), weight.detach()[:vocab_size]
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _Head(hidden, weight, None if bias is None else bias.detach()[:vocab_size])


def _walk(teacher, student, labels, options, need_hidden, need_weight, need_bias):
    """(N,) losses and, where needed, the gradients of their sum in hidden, weight and bias.

    teacher and student are (hidden, weight, bias), the teacher None for the cross-entropy alone.
    Rows of the weight beyond vocab_size keep 0.
    """
    dtype = check.compute_dtype(*(x for x in (*(teacher or ()), *student) if x is not None))
    _, weight, bias = student
    teacher = teacher and _head(*teacher, options.vocab_size)
    student = _head(*student, options.vocab_size)
    n, size = student.hidden.shape[0], options.vocab_size
    loss = student.hidden.new_zeros(n, dtype=dtype)
    grad_hidden = torch.zeros_like(student.hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None

    for start in range(0, n, options.chunk_size):
        rows = slice(start, min(start + options.chunk_size, n))
        student_logits = student.logits(rows, options, dtype)
        if teacher is not None:
            pair = compare(teacher.logits(rows, options, dtype), student_logits, options.rows[rows])
            loss[rows] = values(pair, options.form)
        else:
            check.check_rows("student", student_logits.amax(-1), options.rows[rows])
        label = None if labels is None else labels[rows, None]
        if label is not None:
            log_q = student_logits.gather(-1, label).squeeze(-1) - student_logits.logsumexp(-1)
            loss[rows] -= options.ce_weight * log_q
        if not (need_hidden or need_weight or need_bias):
            continue

        q = student_logits.softmax(-1) if teacher is None else pair.q
        grad = torch.zeros_like(q) if teacher is None else gradients(pair, options.form)
        if label is not None:  # of cross-entropy: q - onehot(label)
            grad.add_(q, alpha=options.ce_weight)
            grad.scatter_add_(-1, label, torch.full_like(grad[:, :1], -options.ce_weight))
        if options.softcap is not None:  # d/dx c tanh(x / c) = 1 - (z / c)^2
            grad.mul_(1 - (student_logits / options.softcap).square_())
        grad.mul_(options.logit_scale)
        if need_bias:
            grad_bias[:size] += grad.sum(0)
        grad = grad.to(student.hidden.dtype)
        if need_hidden:
            grad_hidden[rows] = grad @ student.weight
        if need_weight and grad.dtype == dtype:
            grad_weight[:size].addmm_(grad.t(), student.hidden[rows])
        elif need_weight:
            grad_weight[:size] += grad.t() @ student.hidden[rows]
    return loss, grad_hidden, grad_weight, grad_bias


class _LinearDivergence(torch.autograd.Function):
    """The sum over rows; forward leaves the gradients ready, backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, labels, options):
        student = (hidden, weight, bias)
        loss, *grads = _walk(teacher, student, labels, options, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None


def _check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden must be (..., H) and {name}_weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"{name}_hidden and {name}_weight must have one dtype outside autocast, got "
            f"{hidden.dtype} and {weight.dtype}"
        )


def linear_divergence_loss(
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    kind: str = "skew_reverse_kl",
    alpha: float = 0.1,
    beta: float = 0.5,
    detach_mixture: bool = False,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`divergence_loss` of two heads' logits, + ce_weight * cross-entropy, without the logits.

    teacher_hidden (..., Ht), teacher_weight (Vt, Ht), teacher_bias (Vt,); student_* likewise, with
    its own width; logits = softcap tanh(logit_scale (h W^T + b) / softcap), softcap None: no cap.
    labels (...): token ids below the shared vocabulary for the cross-entropy -log q(label). kind
    "cross_entropy" is that term alone (ce_weight 1 unless given), with None for the teacher.
    kind, alpha, beta, detach_mixture, mask, vocab_size and reduction as in `divergence_loss`; rows
    with mask 0 are dropped before any product. Nats; the result is float32 (float64 for float64).

    Gradients reach the student's hidden states, weight and bias, those only that need one, and are
    computed in forward, so under no_grad there is none; the weight's is summed in float32.
    reduction "none" has no gradient and is refused where the student needs one. Products run in the
    dtype of the inputs, or that of autocast, everything else in float32 or float64. chunk_size
    rows are in work at once, by default as many as keep float32 logits of one model within 64 MiB,
    at least 16. Raises InvalidLogits (with model and row), ValueError and TypeError.
    """
    alone = kind == "cross_entropy"
    if (teacher_hidden is None or teacher_weight is None) != alone:
        raise ValueError(f"kind {kind!r} {'takes no' if alone else 'needs a'} teacher")
    if alone:
        teacher_weight, ce_weight = student_weight, ce_weight or 1.0
    else:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_head("student", student_hidden, student_weight, student_bias)
    shape = student_hidden.shape[:-1]
    if not alone and teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            "teacher_hidden and student_hidden must agree in all but the last dimension, got "
            f"{tuple(teacher_hidden.shape)} and {tuple(student_hidden.shape)}"
        )
    size = check.shared_vocab(teacher_weight.shape[0], student_weight.shape[0], vocab_size)
    check.number("ce_weight", ce_weight, 0, float("inf"), open_high=True)
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    chunk_size = max(16, CHUNK_BYTES // (4 * size)) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    rows = check.rows_of(shape, mask, reduction)
    if ce_weight == 0:
        labels = None
    elif labels is None or labels.shape != shape:
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"ce_weight {ce_weight} needs labels of shape {tuple(shape)}, got {got}")
    else:
        labels = check.integers("labels", rows.take(labels[..., None]).squeeze(1), size)

    student = (rows.take(student_hidden), student_weight, student_bias)
    teacher = None
    if not alone:
        teacher = (rows.take(teacher_hidden.detach()), teacher_weight, teacher_bias)
    kept = rows.kept
    if kept is None:
        kept = torch.arange(shape.numel(), device=student_hidden.device)
    options = _Options(
        None if alone else form_of(kind, alpha, beta, detach_mixture),
        size, logit_scale, softcap, ce_weight, chunk_size, kept,
    )  # fmt: skip
    needs_grad = any(x is not None and x.requires_grad for x in student)
    if not (needs_grad and torch.is_grad_enabled()):
        loss, *_ = _walk(teacher, student, labels, options, False, False, False)
        return rows.reduce(loss, reduction)
    if reduction == "none":
        raise ValueError("reduction 'none' has no gradient here: use 'sum' or 'mean', or no_grad")
    total = _LinearDivergence.apply(*student, teacher, labels, options)
    return total / max(len(kept), 1) if reduction == "mean" else total
