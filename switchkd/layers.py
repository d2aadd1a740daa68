"""Layers over few rows, for the passes of a decoder.

The activation of GPT-2 is eight operations in transformers, and one of the same formula in torch.
On a CPU a matrix product of 8 or 32 rows with a matrix that is used once is bound by reading that
matrix; libraries pack it first, which takes longer. Within `few_rows()` the layers of transformers
models call that one operation and, where it is faster, `switchkd_kernels.few_row_linear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from switchkd_kernels import few_row_linear
from switchkd_kernels.few_row_linear import usable
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

ROWS = 48  # beyond, a library's product is as fast

_linear, _conv1d, _gelu_new = nn.Linear.forward, Conv1D.forward, NewGELUActivation.forward


def _suits(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        0 < rows <= ROWS
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _few_linear(self: nn.Linear, x: Tensor) -> Tensor:
    if _suits(x, self.weight):
        return few_row_linear(x, self.weight, self.bias)
    return _linear(self, x)


def _few_conv1d(self: Conv1D, x: Tensor) -> Tensor:
    if _suits(x, self.weight):
        return few_row_linear(x, self.weight, self.bias, transposed=True)
    return _conv1d(self, x)


def _gelu(self: NewGELUActivation, x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


@contextlib.contextmanager
def few_rows(device: torch.device) -> Iterator[None]:
    """Within it, layers take the faster way; on a CPU those that could be compiled, too."""
    faster = {NewGELUActivation: (_gelu_new, _gelu)}
    if device.type == "cpu" and usable():
        faster |= {nn.Linear: (_linear, _few_linear), Conv1D: (_conv1d, _few_conv1d)}
    replaced = [layer for layer, (own, _) in faster.items() if layer.forward is own]  # by nobody
    try:
        for layer in replaced:
            layer.forward = faster[layer][1]
        yield
    finally:
        for layer in replaced:
            layer.forward = faster[layer][0]
