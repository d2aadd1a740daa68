"""Argument checks shared by the ops: every refusal says what it got and what it expected."""

from __future__ import annotations

import functools
import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class InvalidLogits(ValueError):
    """A row of logits that defines no distribution: it has a NaN or a +inf, or it is all -inf.

    `model` is "teacher" or "student", `row` the index of the first such row in the flattened input.
    """

    def __init__(self, message: str, model: str | None = None, row: int | None = None):
        super().__init__(message)
        self.model = model
        self.row = row


def check_rows(model: str, row_max: Tensor, rows: Tensor | None = None) -> None:
    """Raise InvalidLogits unless every row maximum is finite.

    The maximum alone tells: amax hands a NaN on, is +inf with a +inf, and -inf for a row of -inf.
    `rows` maps the rows given back to those of the caller, for a call that dropped masked rows.
    """
    row_max = row_max.flatten()
    bad = (~row_max.isfinite()).nonzero()
    if bad.numel() == 0:
        return
    first = int(bad[0])
    value = float(row_max[first])
    what = "NaN" if math.isnan(value) else "+inf" if value > 0 else "only -inf"
    row = first if rows is None else int(rows[first])
    raise InvalidLogits(f"{model} logits, row {row}: {what}; expected finite or -inf", model, row)


def a_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the arithmetic never runs in a half precision."""
    for each in tensors:
        a_tensor("each of logits, states, weights and biases", each)
        if hasattr(each, "full_tensor"):  # a kernel would read the memory that it does not have
            raise TypeError("tensors must be whole, got a DTensor: pass its full_tensor()")
        if not each.is_floating_point():
            raise TypeError(f"tensors must be floating point, got {each.dtype}")
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def logits(vocab_size: int | None, rows: bool = False, **given: Tensor) -> int:
    """The shared vocabulary of logits (..., V), equal in the other dimensions; `rows`: (M, V)."""
    compute_dtype(*given.values())
    shapes = [z.shape for z in given.values()]
    first, last = shapes[0], shapes[-1]
    expected = None
    if rows and len(first) != 2:
        expected = "be (rows, vocabulary)"
    elif not (len(first) and len(last)) or first[:-1] != last[:-1]:
        expected = "agree in all but the last dimension"
    if expected:
        got = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{' and '.join(given)} must {expected}, got {got}")
    return shared_vocab(first[-1], last[-1], vocab_size)


def shared_vocab(teacher_width: int, student_width: int, vocab_size: int | None) -> int:
    """The number of real tokens both models share: the columns below it are used, no other."""
    if vocab_size is None:
        if teacher_width != student_width:
            raise ValueError(
                f"teacher and student have {teacher_width} and {student_width} logits a row: "
                "pass vocab_size, the number of real tokens they share"
            )
        vocab_size = teacher_width
    vocab_size = integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(teacher_width, student_width):
        raise ValueError(
            f"vocab_size must be between 1 and {min(teacher_width, student_width)}, the smaller "
            f"of the two widths, got {vocab_size}"
        )
    return vocab_size


def integer(name: str, value: int, low: float = -math.inf, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def real(name: str, value: object) -> None:
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def number(name: str, value: float, low: float, high: float, ends: str = "[]") -> float:
    """A number between `low` and `high`; a round end is not within."""
    real(name, value)
    inside = low < value if ends[0] == "(" else low <= value
    if not (inside and (value < high if ends[1] == ")" else value <= high)):
        raise ValueError(f"{name} must be in {ends[0]}{low}, {high}{ends[1]}, got {value}")
    return float(value)


def temperature(name: str, value: float) -> float:
    """0 is greedy; beyond the others z / T would overflow, or T itself, in float32."""
    real(name, value)
    if value != 0 and not 1e-5 <= value <= 1e30:
        raise ValueError(f"{name} must be 0 (greedy) or in [1e-5, 1e30], got {value}")
    return float(value)


def one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


FEW = 256  # values that Python looks at faster than two launches of an op


def extremes(tensor: Tensor) -> tuple[int, int]:
    """The least and the greatest of integers, at least one."""
    if tensor.numel() > FEW or torch.compiler.is_compiling():
        low, high = tensor.aminmax()
        return int(low), int(high)
    values = tensor.reshape(-1).tolist()
    return min(values), max(values)


def has_nan(tensor: Tensor) -> bool:
    if tensor.numel() > FEW or torch.compiler.is_compiling():
        return bool(tensor.isnan().any())
    return any(map(math.isnan, tensor.reshape(-1).tolist()))


def valueless(*tensors: Tensor) -> bool:
    """Whether any is fake or meta. Ask `is_compiling` where this is called, never in here: after a
    graph break this function is compiled alone, and its caller is not."""
    return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def at_hand(tensor: Tensor) -> bool:
    """Whether to look at its values waits for no accelerator and ends no trace."""
    if torch.compiler.is_compiling() or valueless(tensor):
        return False
    return tensor.device.type == "cpu"


def as_tensor(name: str, value, device=None, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(value, Tensor):  # torch.as_tensor would take it to the default device
        return value if device is None else value.to(device)
    try:
        return torch.as_tensor(value, device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise TypeError(f"{name} must be a number or numbers, got {got}: {error}") from error


def integers(
    name: str, value, limit: int, device: torch.device | None = None, wait: bool = True
) -> Tensor:
    """`value` (tensor, sequence or int) as an int64 tensor, each entry in [0, limit).

    Without `wait`, values that are not at hand are not looked at.
    """
    tensor = as_tensor(name, value, device)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.numel() and not whole:  # of nothing torch makes floats
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    tensor = tensor.to(torch.int64)
    if tensor.numel() and (wait or at_hand(tensor)):
        low, high = extremes(tensor)
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {low}..{high}")
    return tensor


def seed(value: int) -> int:
    """A seed is 64 bits."""
    value = integer("seed", value)
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {value}")
    return value


def signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what a kernel or an op takes."""
    return seed - 2**64 if seed >= 2**63 else seed


def per_row(
    name: str,
    value,
    rows: int,
    device: torch.device,
    limit: int | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """One int64 below `limit`, or without one of `dtype`, a row: (rows,), stride 0 for a number.

    Values that are on an accelerator already are not looked at: that would wait for the device.
    Others are read as they are, whatever default device and dtype torch has been given.
    """
    if torch.compiler.is_compiling() and limit is not None and type(value) is not bool:
        if isinstance(value, (int, torch.SymInt)):  # a step stays a symbol, not a trace for each
            value = integer(name, value, 0, limit - 1)
            return torch.full((), value, dtype=dtype, device=device).expand(rows)
    here = value.device if isinstance(value, Tensor) else "cpu"
    tensor = as_tensor(name, value, here, dtype if limit is None else None)
    if limit is not None:
        tensor = integers(name, tensor, limit, wait=False)
    elif at_hand(tensor) and has_nan(tensor):
        raise ValueError(f"{name} must be a number in every row, got NaN")
    if isinstance(value, Tensor) or tensor.dim():
        tensor = tensor.to(device, dtype)
    else:  # filled there: a copy from the host could not be captured in a CUDA graph
        tensor = torch.full((), value, dtype=dtype, device=device)
    if tensor.dim() and tensor.shape not in ((rows,), (1,)):
        raise ValueError(f"{name} must be a number or ({rows},), got {tuple(tensor.shape)}")
    return tensor if tensor.shape == (rows,) else tensor.reshape(-1).expand(rows)


def unit_stride(logits: Tensor) -> Tensor:
    """Rows of any stride, each contiguous: a copy only where it is not."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


class Rows(NamedTuple):
    """The rows of a flattened batch that count: its `shape`, and `kept` indices or None for all."""

    shape: torch.Size
    kept: Tensor | None

    def take(self, tensor: Tensor) -> Tensor:
        """(..., X) to (kept, X); a view if no row is masked."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.kept is None else flat[self.kept]

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """(kept,) values to their sum, their mean (0 if none is kept), or the batch's own shape."""
        if reduction == "none":
            if self.kept is not None:
                zeros = values.new_zeros(self.shape.numel())
                values = zeros.index_copy(0, self.kept, values)
            return values.reshape(self.shape)
        return values.sum() / (max(values.numel(), 1) if reduction == "mean" else 1)


def flat_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask as a flat bool tensor; its values are looked at only if it is of another dtype."""
    if mask is None:
        return None
    a_tensor("mask", mask)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not torch.compiler.is_compiling() and not valueless(mask):
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must be bool or hold only 0 and 1, got other values")
    return mask.reshape(-1).to(torch.bool)


def rows_of(shape: torch.Size, mask: Tensor | None, reduction: str) -> Rows:
    """Check mask and reduction. `mask` is bool, or 0 and 1 in any dtype, of the batch's shape."""
    one_of("reduction", reduction, ("none", "sum", "mean"))
    mask = flat_mask(mask, shape)
    return Rows(shape, None if mask is None else mask.nonzero().squeeze(1))


def once_differentiable(backward):
    """torch's own lets the derivative of a gradient be 0 where what came upstream is constant."""

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled():  # with create_graph, and only then
            raise RuntimeError("the loss is differentiable once: got create_graph=True")
        return backward(ctx, *upstream)

    return checked
