"""Divergence between two language-model heads from their hidden states, a chunk of rows at a time.

    z = c tanh(s (h W^T + b) / c)      dh = (dL / d h W^T) W      dW = (dL / d h W^T)^T h

The loss of N tokens needs the logits (N, V) of two models, their softmax and their gradient: for
V = 150,000 that is more memory than the models. Here a chunk of rows is projected, compared and
turned into gradients of the student's hidden states and head before the next chunk is looked at:
four matrix products (teacher's and student's logits, d hidden, d weight; three for a frozen head),
and between them one kernel that overwrites the student's logits by their gradient.
"""

import math

import torch
from torch import Tensor

from switchkd_kernels import _backend as backend
from switchkd_kernels import _checks as check
from switchkd_kernels import _cpu
from switchkd_kernels._head_chunk import Options, launch, plain
from switchkd_kernels.rowwise import Form, form_of

# Bytes of one model's logits in work. In plain torch some ten float32 tensors of a chunk live at
# once, so a chunk is small. The kernel needs the two logits and nothing else, and each chunk costs
# a pass over the float32 gradient of the head, so chunks are large: 2200 rows of 151936 in bf16.
CHUNK_BYTES = {"reference": 64 * 2**20, "triton": 640 * 2**20, "cpu": 64 * 2**20}


def _product(hidden: Tensor, weight: Tensor, vocab_size: int, aligned: bool) -> Tensor:
    """(n, V) = hidden weight^T. Aligned: rows 64 entries apart or a multiple, so that a kernel
    loads 16 bytes at once for an odd vocabulary, too."""
    if not aligned:
        return hidden @ weight[:vocab_size].t()
    width = -(-vocab_size // 64) * 64
    out = hidden.new_empty(hidden.shape[0], width)[:, :vocab_size]
    return torch.mm(hidden, weight[:vocab_size].t(), out=out)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """out += scale a b, with the sum in the dtype of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=scale)
    elif out.is_cuda:  # the product never exists in the low precision
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, alpha=scale, out=out)
    else:
        out.add_(a @ b, alpha=scale)


def _walk(
    teacher, student, biases, labels, needs, options, weight_grad, scale, rows, row_weights=None
):
    """(n,) losses and, where needed, the gradients of their sum in hidden, weight and bias.

    teacher and student are (hidden, weight); the teacher's are None for the cross-entropy alone.
    `weight_grad`, if given, is where scale times the weight's gradient goes. Rows of the weight
    beyond vocab_size keep 0.
    """
    cast = options.product_dtype
    teacher = [x if x is None else x.detach().to(cast or x.dtype) for x in teacher]
    hidden, weight = (x.detach().to(cast or x.dtype) for x in student)
    dtype = check.compute_dtype(*(x for x in (*teacher, hidden, weight, *biases) if x is not None))
    n, size, kernel = hidden.shape[0], options.vocab_size, options.impl == "triton"
    biases = [None if bias is None else bias[:size] for bias in biases]
    loss = hidden.new_zeros(n, dtype=dtype)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    if needs[1] and weight_grad is None:
        weight_grad = torch.zeros_like(student[1], dtype=dtype)
    grad_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs[2] else None

    for start in range(0, n, options.chunk_size):
        part = slice(start, min(start + options.chunk_size, n))
        z_s = _product(hidden[part], weight, size, kernel)
        z_t = None
        if teacher[0] is not None:
            z_t = _product(teacher[0][part], teacher[1], size, kernel)
        label = None if labels is None else labels[part]
        if options.impl == "cpu":  # no other name for the products: they go at the end of a turn
            loss[part], grad = _cpu.head_chunk(
                z_t, z_s, biases, label, any(needs), options, rows[part]
            )
        elif kernel:
            loss[part], grad = launch(z_t, z_s, biases, label, any(needs), options)
        else:
            loss[part], grad = plain(
                z_t, z_s, biases, label, any(needs), options, rows[part], dtype
            )
        rows_in = hidden[part]
        if needs[0]:
            torch.mm(grad, weight[:size], out=grad_hidden[part])
        if row_weights is not None:  # on (n, H) on either side: never a pass over (n, V)
            w = row_weights[part].to(dtype)
            loss[part] *= w
            rows_in = (rows_in * w[:, None]).to(hidden.dtype)
            if needs[0]:
                grad_hidden[part] *= w[:, None]
        if needs[1]:
            _accumulate(weight_grad[:size], grad.t(), rows_in, scale)
        if needs[2] and row_weights is None:
            grad_bias[:size] += grad.sum(0, dtype=dtype)
        elif needs[2]:
            grad_bias[:size].addmv_(grad.t().to(dtype), w)  # in place: autocast leaves it alone
        del z_s, z_t, grad  # before the next chunk takes as much
    return loss, grad_hidden, weight_grad, grad_bias


class _LinearDivergence(torch.autograd.Function):
    """The sum over rows; forward leaves the gradients ready, backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, teacher_bias, labels, *rest):
        needs = list(ctx.needs_input_grad[:3])
        loss, *grads = _walk(teacher, (hidden, weight), (teacher_bias, bias), labels, needs, *rest)
        if rest[1] is not None:  # the weight's gradient has gone where it belongs
            grads[1] = None
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.sum()

    @staticmethod
    @check.once_differentiable
    def backward(ctx, upstream):
        grads = [
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 8


def _choose(impl: str | None, given: tuple, biases: tuple, product_dtype) -> str:
    products = given[2].new_empty(0, dtype=product_dtype)  # what the kernels take
    return backend.choose(impl, *given, *biases, products)


# ------------------------------------------------------------ torch.compile, fake and meta tensors


@torch.library.custom_op("switchkd::linear_divergence", mutates_args=())
def _op(
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    student_hidden: Tensor, student_weight: Tensor,
    teacher_bias: Tensor | None, student_bias: Tensor | None,
    labels: Tensor | None, mask: Tensor | None, needs: list[bool],
    kind: str, weight: float, detach: bool, vocab_size: int, logit_scale: float, softcap: float,
    ce_weight: float, chunk_size: int, product_dtype: torch.dtype | None, impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum, (N,) losses and the gradients of the sum, as torch.compile sees them: full rows in and
    out, masked ones packed inside, so that no shape depends on data."""
    given = (teacher_hidden, teacher_weight, student_hidden, student_weight)
    chosen = _choose(impl, given, (teacher_bias, student_bias), product_dtype)
    options = Options(kind, weight, detach, vocab_size, logit_scale, softcap, ce_weight,
                       chunk_size, product_dtype, chosen)  # fmt: skip
    rows = check.rows_of(student_hidden.shape[:1], mask, "none")
    kept = _indices(rows, student_hidden)
    teacher = (None if teacher_hidden is None else rows.take(teacher_hidden)), teacher_weight
    if labels is not None:
        labels = check.integers("labels", labels[kept], vocab_size)
    loss, grad_hidden, *grads = _walk(
        teacher, (rows.take(student_hidden), student_weight), (teacher_bias, student_bias),
        labels, needs, options, None, 1.0, kept,
    )  # fmt: skip
    if grad_hidden is not None:
        full = grad_hidden.new_zeros(student_hidden.shape)
        grad_hidden = full.index_copy_(0, kept, grad_hidden)
    grads = [loss.new_empty(0) if grad is None else grad for grad in (grad_hidden, *grads)]
    return loss.sum(), rows.reduce(loss, "none").clone(), *grads


@_op.register_fake
def _(th, tw, hidden, weight, tb, bias, labels, mask, needs, *options):
    dtype = check.compute_dtype(*(x for x in (th, tw, hidden, weight, tb, bias) if x is not None))
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    types = options[-2] or hidden.dtype, dtype, dtype
    grads = [
        hidden.new_empty(shape if need else (0,), dtype=kind if need else dtype)
        for shape, need, kind in zip(shapes, needs, types, strict=True)
    ]
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype), *grads


def _setup(ctx, inputs, output):
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[2], inputs[3], inputs[5])]
    ctx.needs = inputs[8]
    ctx.save_for_backward(*output[2:])


@check.once_differentiable
def _op_backward(ctx, upstream, *_):
    grads = [
        (grad * upstream).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return None, None, grads[0], grads[1], None, grads[2], *[None] * 13


_op.register_autograd(_op_backward, setup_context=_setup)


# ------------------------------------------------------------------------------- public


def _indices(rows: check.Rows, like: Tensor) -> Tensor:
    """The caller's index of each row that counts."""
    if rows.kept is not None:
        return rows.kept
    return torch.arange(rows.shape.numel(), device=like.device)


def _check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.compute_dtype(hidden, weight, *([] if bias is None else [bias]))
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden must be (..., H) and {name}_weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if hidden.dtype != weight.dtype and not _autocasts(hidden):
        raise TypeError(
            f"{name}_hidden and {name}_weight must have one dtype outside autocast, got "
            f"{hidden.dtype} and {weight.dtype}"
        )


def _check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    if weight_grad is None:
        return
    check.a_tensor("weight_grad", weight_grad)
    if torch.compiler.is_compiling() or check.valueless(weight):
        raise ValueError("weight_grad is added to in place: not in a trace, nor of fake tensors")
    if weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32:
        raise ValueError(
            f"weight_grad must be float32 of shape {tuple(weight.shape)}, got "
            f"{weight_grad.dtype} {tuple(weight_grad.shape)}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("weight_grad: got a frozen student_weight, expected one that needs a grad")


def _check_row_weights(row_weights: Tensor | None, shape: torch.Size) -> None:
    if row_weights is None:
        return
    check.a_tensor("row_weights", row_weights)
    if torch.compiler.is_compiling() or check.valueless(row_weights):
        raise ValueError("row_weights: not in a trace, nor of fake tensors")
    if row_weights.shape != shape or not row_weights.is_floating_point():
        raise ValueError(
            f"row_weights must be floats of shape {tuple(shape)}, got "
            f"{row_weights.dtype} {tuple(row_weights.shape)}"
        )


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type  # to ask of a meta tensor's would be an error
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast would multiply in; it never casts a float64 model.

    Autocast cannot be left to itself, because a cast outside would hand the float32 gradient of the
    weight back through the low precision.
    """
    if _autocasts(hidden) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return None


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
    ce_weight: float | None = None,
    weight_grad: Tensor | None = None,
    weight_grad_scale: float = 1.0,
    row_weights: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """`divergence_loss` of two heads' logits, + ce_weight * cross-entropy, without the logits.

    teacher_hidden (..., Ht), teacher_weight (Vt, Ht), teacher_bias (Vt,); student_* likewise, with
    its own width; logits = softcap tanh(logit_scale (h W^T + b) / softcap), softcap None: no cap.
    labels (...): token ids below the shared vocabulary for the cross-entropy -log q(label); their
    range is looked at. kind "cross_entropy" is that term alone, with None for the teacher.
    ce_weight None is 1 for that kind, else 0.
    kind, alpha, beta, detach_mixture, mask, vocab_size and reduction as in `divergence_loss`; rows
    with mask 0 are dropped before any product. Nats; the result is float32 (float64 for float64).

    Gradients reach the student's hidden states, weight and bias, those only that need one, and are
    computed in forward, so under no_grad there is none; the weight's is summed in float32.
    weight_grad (Vs, Hs) in float32 takes the weight's gradient instead: weight_grad_scale times
    that of the returned loss is added to it during the call, autograd hands the weight none, and
    the scale must be what the loss will be multiplied by before backward.
    row_weights (...) of floats multiply each row's loss, and so its gradient, with none of their
    own (importance weights); "mean" still divides by the number of rows. Not under torch.compile.
    reduction "none" has no gradient and is refused where the student needs one; others are
    differentiable once: create_graph=True raises RuntimeError. Products run in the
    dtype of the inputs, or that of autocast, everything else in float32 or float64. chunk_size
    rows are in work at once, by default as many as keep the logits of one model within 64 MiB
    (640 MiB in Triton), at least 16.
    impl: None (Triton for float32, float16 and bfloat16 on a GPU, native code for float32 and
    bfloat16 on a CPU, else reference), "triton", "cpu" or "reference". Raises ValueError and
    TypeError, and InvalidLogits (with model and row) on a CPU; in Triton a row of logits that
    defines no distribution gives NaN.
    """
    alone = kind == "cross_entropy"
    if (teacher_hidden is None or teacher_weight is None) != alone:
        raise ValueError(f"kind {kind!r} {'takes no' if alone else 'needs a'} teacher")
    if ce_weight is None:
        ce_weight = float(alone)
    if alone:
        teacher_weight = student_weight
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
    ce_weight = check.number("ce_weight", ce_weight, 0, math.inf, "[)")
    logit_scale = check.number("logit_scale", logit_scale, 0, math.inf, "()")
    if softcap is not None:
        softcap = check.number("softcap", softcap, 0, math.inf, "()")
    product_dtype = _autocast_dtype(student_hidden)
    given = (teacher_hidden, teacher_weight, student_hidden, student_weight)
    chosen = _choose(impl, given, (teacher_bias, student_bias), product_dtype)
    if chunk_size is None:
        width = 4 if chosen == "reference" else (product_dtype or student_hidden.dtype).itemsize
        chunk_size = max(16, CHUNK_BYTES[chosen] // (width * size))
    if check.integer("chunk_size", chunk_size) < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    check.one_of("reduction", reduction, ("none", "sum", "mean"))
    if ce_weight == 0:
        labels = None
    elif not isinstance(labels, Tensor) or labels.shape != shape:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"ce_weight {ce_weight} needs labels of shape {tuple(shape)}, got {got}")
    dtype = product_dtype or check.compute_dtype(student_hidden)
    form = Form(kind) if alone else form_of(kind, alpha, beta, detach_mixture, dtype)
    options = Options(
        *form, size, logit_scale, softcap or 0.0, ce_weight, chunk_size, product_dtype, chosen
    )
    learns = [
        x is not None and x.requires_grad for x in (student_hidden, student_weight, student_bias)
    ]
    learns = [need and torch.is_grad_enabled() for need in learns]
    if any(learns) and reduction == "none":
        raise ValueError("reduction 'none' has no gradient here: use 'sum' or 'mean', or no_grad")
    _check_weight_grad(weight_grad, student_weight)
    _check_row_weights(row_weights, shape)

    if torch.compiler.is_compiling() or check.valueless(student_hidden, student_weight):
        total, loss, *_ = _op(
            None if alone else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
            None if alone else teacher_weight,
            student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight,
            teacher_bias, student_bias,
            None if labels is None else labels.reshape(-1), check.flat_mask(mask, shape),
            learns, *options[:-1], impl,
        )  # fmt: skip
        count = max(shape.numel(), 1) if mask is None else mask.sum().clamp(min=1)
        return {"none": loss.reshape(shape), "sum": total, "mean": total / count}[reduction]

    rows = check.rows_of(shape, mask, reduction)
    kept = _indices(rows, student_hidden)
    if labels is not None:
        labels = check.integers("labels", labels.reshape(-1)[kept], size)
    teacher = (None, None) if alone else (rows.take(teacher_hidden.detach()), teacher_weight)
    student = (rows.take(student_hidden), student_weight)
    count = max(len(kept), 1) if reduction == "mean" else 1
    scale = 1.0 if weight_grad is None else weight_grad_scale / count
    if row_weights is not None:
        row_weights = row_weights.detach().reshape(-1)[kept]
    rest = (options, weight_grad, scale, kept, row_weights)
    if not any(learns):
        biases = (teacher_bias, student_bias)
        loss, *_ = _walk(teacher, student, biases, labels, [False] * 3, *rest)
        return rows.reduce(loss, reduction)
    given = (*student, student_bias, teacher, teacher_bias, labels, *rest)
    return _LinearDivergence.apply(*given) / count
