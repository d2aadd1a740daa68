"""Divergences between the rows of two logits, with the gradient of the student's.

    p = softmax(z_t), q = softmax(z_s)     L = sum_v l(p_v, q_v)     u_v = q_v dl/dq_v
    dL/dz_v = g (u_v - q_v sum_w u_w)      l and u: rowwise.py

Forward reads both rows twice, first for their softmax, then for L and sum u, and saves five floats
a row (what relates the rows, `pair_of`, and sum u); backward reads once and writes the gradient.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from switchkd_kernels import _backend as backend
from switchkd_kernels import _checks as check
from switchkd_kernels import _cpu, reference
from switchkd_kernels._tl import (
    is_distribution,
    load_pair,
    softmax_end,
    softmax_start,
    softmax_step,
    tl,
    triton,
)
from switchkd_kernels._tl_rowwise import compare, divergence_terms, pair_of
from switchkd_kernels.rowwise import Form, form_of, gradients, in_base, values
from switchkd_kernels.rowwise import compare as compare_rows

# Launch parameters; benchmarks/sweep_kernels.py measures them. As in switch_select.py, a thread of
# forward holds 8 logits of either row. Backward is elementwise: 16 a thread, many programs.
# The compiler's own choice of registers leaves room for three programs on a multiprocessor.
BLOCK, WARPS = 2048, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4


@triton.jit
def softmaxes(
    pair, V,
    HEAD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First sweep: (maximum, sum of exponentials) of either row."""
    teacher, student = softmax_start(BLOCK, GROUP), softmax_start(BLOCK, GROUP)
    for first in tl.range(0, V, BLOCK):
        zt, zs, _slope = load_pair(pair, first, V, HEAD, ROWS, BLOCK)
        teacher, student = softmax_step(zt, teacher, GROUP), softmax_step(zs, student, GROUP)
    return softmax_end(teacher), softmax_end(student)


@triton.jit
def terms_block(
    pair, first, V, relation, weight,
    KIND: tl.constexpr, DETACH: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block: terms of L, u, q and the slope of the student's logits."""
    zt, zs, slope = load_pair(pair, first, V, HEAD, ROWS, BLOCK)
    log_p, log_q, d = compare(zt, zs, relation)
    value, u, q = divergence_terms(log_p, log_q, d, weight, KIND, DETACH)
    return value, u, q, slope


@triton.jit
def totals(
    pair, V, teacher, student, relation, weight,
    KIND: tl.constexpr, DETACH: tl.constexpr, HEAD: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second sweep, from the last block, which is still in the cache, to the first: L, and sum u
    that the gradient takes off; NaN for a row that defines none."""
    terms, scores = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last = (tl.cdiv(V, BLOCK) - 1) * BLOCK
    for back in tl.range(0, V, BLOCK):
        value, u, _, _ = terms_block(
            pair, last - back, V, relation, weight, KIND, DETACH, HEAD, ROWS, BLOCK
        )
        terms += value
        if NEEDS_GRAD:
            scores += u
    loss, total = tl.sum(terms, 0), tl.sum(scores, 0)
    if KIND == "jsd":
        loss = tl.minimum(loss, 0.6931471805599453)
    valid = is_distribution(teacher[1]) & is_distribution(student[1])
    return tl.where(valid, loss, float("nan")), tl.where(valid, total, float("nan"))


@triton.jit
def _forward_kernel(
    teacher_ptr, student_ptr, mask_ptr,  # in
    loss_ptr, saved_ptr,  # out
    rows, V, stride_t, stride_s, weight,
    KIND: tl.constexpr, DETACH: tl.constexpr, HAS_MASK: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_MASK:
        kept = tl.load(mask_ptr + row) != 0
        if not kept:
            tl.store(loss_ptr + row, 0.0)
    if kept:
        pair = teacher_ptr + row * stride_t, student_ptr + row * stride_s
        teacher, student = softmaxes(pair, V, 0, GROUP, ROWS, BLOCK)
        relation = pair_of(teacher, student)
        loss, total = totals(
            pair, V, teacher, student, relation, weight, KIND, DETACH, 0, NEEDS_GRAD, ROWS, BLOCK
        )
        tl.store(loss_ptr + row, loss)
        tl.store(saved_ptr + row, relation[0])
        tl.store(saved_ptr + rows + row, relation[1])
        tl.store(saved_ptr + 2 * rows + row, relation[2])
        tl.store(saved_ptr + 3 * rows + row, relation[3])
        tl.store(saved_ptr + 4 * rows + row, total)


@triton.jit
def _backward_kernel(
    teacher_ptr, student_ptr, mask_ptr, saved_ptr, upstream_ptr,  # in
    grad_ptr,  # out
    rows, V, width, stride_t, stride_s, stride_g, stride_upstream, weight,
    KIND: tl.constexpr, DETACH: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row's gradient; zeros in masked rows and in the padding from V to width."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    kept = first < V
    if HAS_MASK:
        kept = kept & (tl.load(mask_ptr + row) != 0)
    grad = tl.zeros((BLOCK,), tl.float32)
    if kept:
        pair = teacher_ptr + row * stride_t, student_ptr + row * stride_s
        t_top, t_log = tl.load(saved_ptr + row), tl.load(saved_ptr + rows + row)
        s_top, log_ratio = tl.load(saved_ptr + 2 * rows + row), tl.load(saved_ptr + 3 * rows + row)
        relation = t_top, t_log, s_top, log_ratio
        total = tl.load(saved_ptr + 4 * rows + row)
        upstream = tl.load(upstream_ptr + row * stride_upstream).to(tl.float32)
        _, u, q, _ = terms_block(pair, first, V, relation, weight, KIND, DETACH, 0, ROWS, BLOCK)
        grad = upstream * (u - q * total)
        grad = tl.where(cols < V, grad, 0.0)
    grad_row = grad_ptr + row * stride_g
    tl.store(grad_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


def _forward(
    teacher: Tensor, student: Tensor, mask: Tensor | None, kind: str, weight: float, detach: bool,
    vocab_size: int, needs_grad: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(M,) nats, 0 in masked rows, and (5, M) floats for backward."""
    rows = student.shape[0]
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    empty = torch.empty if mask is None else torch.zeros  # a masked row saves nothing
    saved = empty(5, rows, dtype=torch.float32, device=student.device)
    with backend.on(student.device):
        _forward_kernel[(rows,)](
            teacher, student, mask, loss, saved,
            rows, vocab_size, teacher.stride(0), student.stride(0), weight,
            KIND=kind, DETACH=detach, HAS_MASK=mask is not None, NEEDS_GRAD=needs_grad,
            BLOCK=BLOCK, **backend.layout(vocab_size, BLOCK, teacher, student),
            **backend.options(WARPS, student.device),
        )  # fmt: skip
    return loss, saved


def _backward(
    upstream: Tensor, teacher: Tensor, student: Tensor, mask: Tensor | None, saved: Tensor,
    kind: str, weight: float, detach: bool, vocab_size: int,
) -> Tensor:  # fmt: skip
    rows, width = student.shape
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    layout = backend.layout(vocab_size, BACKWARD_BLOCK, teacher, student)
    # Entry by entry no thread needs neighbours, and it stores what it has loaded.
    even = layout["ROWS"] == "even"
    with backend.on(student.device):
        _backward_kernel[(rows, triton.cdiv(width, BACKWARD_BLOCK))](
            teacher, student, mask, saved, upstream, grad,
            rows, vocab_size, width, teacher.stride(0), student.stride(0), grad.stride(0),
            upstream.stride(0), weight,
            KIND=kind, DETACH=detach, HAS_MASK=mask is not None, ROWS="even" if even else "aligned",
            BLOCK=BACKWARD_BLOCK, **backend.options(BACKWARD_WARPS, student.device),
        )  # fmt: skip
    return grad


_LAUNCH = {"triton": (_forward, _backward), "cpu": (_cpu.divergence, _cpu.divergence_backward)}


class _Divergence(torch.autograd.Function):
    """The eager path: straight to the launchers.

    On a CPU a row's gradient is made with its loss, while the row is in the cache: a pass over
    memory less. Backward scales it in place; a second backward computes it from the logits. It is
    saved as they are, so that a checkpoint drops it and hooks move it.
    """

    @staticmethod
    def forward(ctx, teacher, student, mask, impl, *form):
        forward, ctx.launch = _LAUNCH[impl]
        needs_grad, unit = ctx.needs_input_grad[1], None
        if impl == "cpu":
            loss, saved, unit = forward(teacher, student, mask, *form, needs_grad, needs_grad)
        else:
            loss, saved = forward(teacher, student, mask, *form, needs_grad)
        ctx.save_for_backward(teacher, student, mask, saved, unit)
        ctx.form, ctx.scaled = form, False
        return loss

    @staticmethod
    @check.once_differentiable
    def backward(ctx, upstream):
        teacher, student, mask, saved, unit = ctx.saved_tensors
        if ctx.scaled:
            unit = None
        # is_grads_batched: no kernel takes such a one, and no trace may ask
        several = not torch.compiler.is_compiling() and is_legacy_batchedtensor(upstream)
        if unit is None and several:
            ones = torch.ones(len(student), device=student.device)
            unit = ctx.launch(ones, teacher, student, mask, saved, *ctx.form)
        if unit is not None:
            if mask is not None:
                upstream = upstream.masked_fill(~mask, 0.0)  # not looked at, even if it is NaN
            upstream = upstream.unsqueeze(1)
            if several:
                grad = unit * upstream
            else:  # in place, by `data`, because autograd would refuse what it has saved for more
                grad, ctx.scaled = unit.data.mul_(upstream), True
            grad = grad.to(student.dtype)
        else:
            grad = ctx.launch(upstream, teacher, student, mask, saved, *ctx.form)
        return None, grad, None, None, None, None, None, None


# ------------------------------------------------------------ torch.compile, fake and meta tensors


def _kept(teacher, student, mask, vocab_size):
    """The rows that count in their compute dtype, compared, and their indices."""
    rows = torch.arange(student.shape[0], device=student.device)
    kept = rows if mask is None else rows[mask]
    dtype = check.compute_dtype(teacher, student)
    pair = (x[kept, :vocab_size].to(dtype) for x in (teacher, student))
    return compare_rows(*pair, kept), kept


@torch.library.custom_op("switchkd::divergence", mutates_args=())
def _forward_op(
    teacher: Tensor, student: Tensor, mask: Tensor | None, kind: str, weight: float, detach: bool,
    vocab_size: int, impl: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if launch := _LAUNCH.get(backend.choose(impl, teacher, student)):
        return launch[0](teacher, student, mask, kind, weight, detach, vocab_size)[:2]
    pair, kept = _kept(teacher, student, mask, vocab_size)
    nats = values(pair, Form(kind, weight, detach))
    loss = nats.new_zeros(student.shape[0]).index_copy_(0, kept, nats)
    return loss, torch.zeros(5, student.shape[0], dtype=torch.float32, device=student.device)


@_forward_op.register_fake
def _(teacher, student, *args):
    rows = student.shape[0]
    loss = student.new_empty(rows, dtype=check.compute_dtype(teacher, student))
    return loss, student.new_empty(5, rows, dtype=torch.float32)


@torch.library.custom_op("switchkd::divergence_backward", mutates_args=())
def _backward_op(
    upstream: Tensor, teacher: Tensor, student: Tensor, mask: Tensor | None, saved: Tensor,
    kind: str, weight: float, detach: bool, vocab_size: int, impl: str | None,
) -> Tensor:  # fmt: skip
    if launch := _LAUNCH.get(backend.choose(impl, teacher, student)):
        return launch[1](upstream, teacher, student, mask, saved, kind, weight, detach, vocab_size)
    pair, kept = _kept(teacher, student, mask, vocab_size)
    rows = upstream[kept, None] * gradients(pair, Form(kind, weight, detach))
    grad = torch.zeros_like(student, memory_format=torch.contiguous_format)
    grad[kept, :vocab_size] = rows.to(student.dtype)
    return grad


@_backward_op.register_fake
def _(upstream, teacher, student, *args):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    teacher, student, mask, *form = inputs
    ctx.save_for_backward(teacher, student, mask, output[1])
    ctx.form = form


@check.once_differentiable
def _op_backward(ctx, upstream, _):
    teacher, student, mask, saved = ctx.saved_tensors
    grad = _backward_op(upstream, teacher, student, mask, saved, *ctx.form)
    return None, grad, *[None] * 6


_forward_op.register_autograd(_op_backward, setup_context=_setup)


# ------------------------------------------------------------------------------- public


def _rows(
    impl: str | None, teacher, student, form: Form, mask, vocab_size, reduction, base=None
) -> Tensor:
    """Reduced divergences by the kernels: no step of it waits for the device."""
    size = check.logits(vocab_size, teacher_logits=teacher, student_logits=student)
    shape = student.shape[:-1]
    check.one_of("reduction", reduction, ("none", "sum", "mean"))
    mask = check.flat_mask(mask, shape)
    student = student if torch.is_grad_enabled() else student.detach()
    teacher, student = (
        check.unit_stride(x.reshape(-1, x.shape[-1])) for x in (teacher.detach(), student)
    )
    if torch.compiler.is_compiling() or check.valueless(teacher, student):
        loss, _saved = _forward_op(teacher, student, mask, *form, size, impl)
    else:
        loss = _Divergence.apply(teacher, student, mask, impl, *form, size)
    if base is not None:
        loss = in_base(loss, base)
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "mean":
        count = max(loss.numel(), 1) if mask is None else mask.sum().clamp(min=1)
        return loss.sum() / count
    return loss.sum()


def jsd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    base: int | str = 2,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "none",
    impl: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence of (..., Vt) and (..., Vs) logits: (...) or a scalar, in the
    compute dtype (float64 for float64, else float32). In bits, [0, 1], for base 2; nats for "e".

    Arguments, errors and gradient (to the student only) as in `divergence_loss`.
    """
    chosen = backend.choose(impl, teacher_logits, student_logits)
    options = {"mask": mask, "vocab_size": vocab_size, "reduction": reduction}
    if torch.compiler.is_compiling() or check.valueless(teacher_logits, student_logits):
        chosen = impl  # the op chooses, where it runs
    elif chosen == "reference":
        return reference.jsd(teacher_logits, student_logits, base=base, **options)
    check.one_of("base", base, (2, "e"))
    return _rows(chosen, teacher_logits, student_logits, Form("jsd"), base=base, **options)


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
    impl: str | None = None,
) -> Tensor:
    """Divergence in nats of (..., Vt) teacher and (..., Vs) student logits, with student gradient.

    kind: kl_teacher_student KL(p||q), kl_student_teacher KL(q||p), generalized_jsd
    b KL(p||m) + (1-b) KL(q||m) with m = b p + (1-b) q (beta 0 means KL(p||q), 1 KL(q||p), as in
    TRL), skew_kl KL(p || a p + (1-a) q), skew_reverse_kl KL(q || (1-a) p + a q), tvd
    sum |p - q| / 2.
    `detach_mixture` holds the mixture of skew_reverse_kl constant in the gradient (DistiLLM-2,
    arXiv 2503.07067); for generalized_jsd it changes nothing, for other kinds it is refused.
    mask (...) of bool or 0/1: other rows are not looked at, give 0, and do not count in the mean,
    which is 0 if no row is left. vocab_size: columns from there on are padding and are ignored.
    reduction: "none" (...), "sum" or "mean". -inf logits are legal; a result is infinite only where
    the divergence is (a gradient is then not defined). Arithmetic in float64 for float64 inputs,
    else float32, which is the dtype of the result; the gradient has that of the student's logits.
    impl: None (Triton for float32, float16 and bfloat16 on a GPU, native code for float32 and
    bfloat16 on a CPU, else reference), "triton", "cpu" or "reference". Raises ValueError and
    TypeError, and InvalidLogits (with model and row) on a CPU. On a GPU nothing waits for the
    device (but for a look at a mask that is not bool): a row of logits that defines no distribution
    gives NaN. Differentiable once: a backward pass with create_graph=True raises RuntimeError.
    """
    chosen = backend.choose(impl, teacher_logits, student_logits)
    options = {"mask": mask, "vocab_size": vocab_size, "reduction": reduction}
    if torch.compiler.is_compiling() or check.valueless(teacher_logits, student_logits):
        chosen = impl
    elif chosen == "reference":
        return reference.divergence_loss(
            teacher_logits, student_logits,
            kind=kind, alpha=alpha, beta=beta, detach_mixture=detach_mixture, **options,
        )  # fmt: skip
    dtype = check.compute_dtype(teacher_logits, student_logits)
    form = form_of(kind, alpha, beta, detach_mixture, dtype)
    return _rows(chosen, teacher_logits, student_logits, form, **options)
