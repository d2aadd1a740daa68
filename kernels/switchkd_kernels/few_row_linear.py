"""y = x W^T + b for few rows on a CPU: what a decoder's pass over some tokens is made of.

A matrix product of M = 8 rows with a matrix that is used once is bound by reading that matrix. A
library's product packs it first, which takes longer than the product itself; csrc/cpu/linear.h
reads each weight once, in order, and keeps the sums in registers.
"""

import torch
from torch import Tensor

from switchkd_kernels import _native


def usable() -> bool:
    """Whether it can run here; the first call may compile it."""
    return _native.unavailable() is None


def few_row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """(..., N) of x (..., K) and weight (N, K), or with `transposed` (K, N), as GPT-2 stores it.

    All float32 on a CPU; rows contiguous. The result has no gradient. Faster than a library's
    product up to about 48 rows. Raises RuntimeError, with the reason, where it cannot run or the
    tensors do not fit.
    """
    if reason := _native.unavailable():
        raise RuntimeError(f"few_row_linear cannot run: {reason}")
    rows = x.reshape(x.shape[:-1].numel(), *x.shape[-1:])
    with torch.no_grad():
        y = torch.ops.switchkd_native.linear(rows, weight, bias, transposed)
    return y.view(*x.shape[:-1], y.shape[-1])
