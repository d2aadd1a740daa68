"""One chunk of `linear_divergence_loss`: the products h W^T of two heads to loss and gradient.

    z = c tanh(s (h W^T + b) / c)      dL/d(h W^T) = s (1 - (z / c)^2) (dL/dz + w (q - onehot(y)))

The kernel reads a row three times, for softmax, loss and gradient, and leaves the gradient where
the student's products were.
"""

from typing import NamedTuple

import torch

from switchkd_kernels import _backend as backend
from switchkd_kernels import _checks as check
from switchkd_kernels._tl import (
    load_pair,
    tl,
    triton,
)
from switchkd_kernels._tl_rowwise import pair_of
from switchkd_kernels.divergence_loss import (
    BLOCK,
    WARPS,
    softmaxes,
    terms_block,
    totals,
)
from switchkd_kernels.rowwise import Form, compare, gradients, log_prob, values


class Options(NamedTuple):
    kind: str  # of KINDS, "jsd", or "cross_entropy": no teacher, the labels' term alone
    weight: float
    detach: bool
    vocab_size: int
    logit_scale: float
    softcap: float  # 0: none
    ce_weight: float
    chunk_size: int
    product_dtype: torch.dtype | None  # of the matrix products; None: that of the inputs
    impl: str


@triton.jit
def _loss_and_gradient_kernel(
    teacher_ptr, student_ptr, teacher_bias_ptr, student_bias_ptr, label_ptr, loss_ptr,
    V, stride_t, stride_s, weight, scale, cap, ce_weight,
    KIND: tl.constexpr, DETACH: tl.constexpr, HEAD: tl.constexpr, HAS_LABEL: tl.constexpr,
    NEEDS_GRAD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of both heads' products: its loss, and the student's overwritten by its gradient."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * stride_s
    pair = (
        teacher_ptr + row * stride_t, student_row, teacher_bias_ptr, student_bias_ptr, scale, cap
    )  # fmt: skip
    teacher, student = softmaxes(pair, V, HEAD, GROUP, ROWS, BLOCK)
    relation = pair_of(teacher, student)
    loss, total = totals(
        pair, V, teacher, student, relation, weight, KIND, DETACH, HEAD, NEEDS_GRAD, ROWS, BLOCK
    )
    label = -1
    if HAS_LABEL:
        label = tl.load(label_ptr + row).to(tl.int32)
        _teacher, mine, _slope = load_pair(pair, label, V, HEAD, "aligned", 1)
        loss -= ce_weight * tl.sum((mine - student[0]) - tl.log(student[1]), 0)
    tl.store(loss_ptr + row, loss)
    if NEEDS_GRAD:
        if HAS_LABEL:
            tl.debug_barrier()  # every warp has read the label's logit before one overwrites it
        for first in tl.range(0, V, BLOCK):
            _, u, q, slope = terms_block(
                pair, first, V, relation, weight, KIND, DETACH, HEAD, ROWS, BLOCK
            )
            cols = first + tl.arange(0, BLOCK)
            grad = u - q * total + ce_weight * tl.where(cols == label, q - 1.0, q)
            if HEAD & 12:
                grad *= slope
            grad = grad.to(student_row.dtype.element_ty)
            if first + BLOCK <= V:
                tl.store(student_row + cols, grad)
            else:
                tl.store(student_row + cols, grad, mask=cols < V)


def launch(teacher, student, biases, labels, needs_grad: bool, options: Options):
    """(n,) losses of (n, V) products; `student` becomes its gradient."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    flags = [biases[0] is not None, biases[1] is not None, options.logit_scale != 1,
             options.softcap != 0, teacher is None]  # fmt: skip
    teacher = student if teacher is None else teacher
    # The cap's tanh, and two mixtures, need more registers than the compiler takes by itself; with
    # 128 two programs share a multiprocessor.
    hungry = options.softcap or options.kind == "generalized_jsd"
    with backend.on(student.device):
        _loss_and_gradient_kernel[(student.shape[0],)](
            teacher, student, *biases, labels, loss,
            options.vocab_size, teacher.stride(0), student.stride(0),
            options.weight, options.logit_scale, options.softcap, options.ce_weight,
            KIND=options.kind, DETACH=options.detach,
            HEAD=sum(flag << i for i, flag in enumerate(flags)), HAS_LABEL=labels is not None,
            NEEDS_GRAD=needs_grad, BLOCK=BLOCK,
            **backend.layout(options.vocab_size, BLOCK, teacher, student),
            **backend.options(WARPS, student.device, registers=128 if hungry else None),
        )  # fmt: skip
    return loss, student


def plain(teacher, student, biases, labels, needs_grad: bool, options: Options, rows, dtype):
    """The same as `launch` in plain torch, for any dtype; `rows` name the rows in errors."""

    def logits(z, bias):
        z = z.to(dtype)
        z = z if bias is None else z.add_(bias)
        z = z if options.logit_scale == 1 else z.mul_(options.logit_scale)
        return z.div_(options.softcap).tanh_().mul_(options.softcap) if options.softcap else z

    z = logits(student, biases[1])
    form = Form(options.kind, options.weight, options.detach)
    if teacher is not None:
        pair = compare(logits(teacher, biases[0]), z, rows)
        loss = values(pair, form)
    else:
        check.check_rows("student", z.amax(-1), rows)
        loss = z.new_zeros(len(z))
    if labels is not None:
        label = labels[:, None]
        loss = loss - options.ce_weight * log_prob(z, labels)
    if not needs_grad:
        return loss, None
    q = z.softmax(-1) if teacher is None else pair.q
    grad = torch.zeros_like(q) if teacher is None else gradients(pair, form)
    if labels is not None:  # of cross-entropy: q - onehot(label)
        grad.add_(q, alpha=options.ce_weight)
        grad.scatter_add_(-1, label, torch.full_like(grad[:, :1], -options.ce_weight))
    if options.softcap:  # d/dx c tanh(x / c) = 1 - (z / c)^2
        grad.mul_(1 - (z / options.softcap).square_())
    return loss, grad.mul_(options.logit_scale).to(student.dtype)
