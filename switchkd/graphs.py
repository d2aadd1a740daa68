"""Forward passes as CUDA graphs: one launch instead of one a kernel.

A graph reads and writes fixed memory. Inputs are copied in; outputs are copied to places that all
graphs here share, as they share one pool for what is between, and stay valid until the next call of
any: logits of its own would cost a graph 10 MB for 32 rows of 152k and one token, and there is one
for each number of rows, block length and reach.
Elsewhere than on a CUDA device the functions are just called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UPS = 2  # calls before the capture: kernels compile, libraries allocate their workspaces
REACH = 128  # attended lengths are rounded up to its multiples


def padded(width: int) -> int:
    return -(-width // 16) * 16


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor whose rows begin at multiples of 16 entries: there kernels load 16 bytes at
    once, of a vocabulary like GPT-2's 50257, too."""
    return like.new_empty(*shape[:-1], padded(shape[-1]))[..., : shape[-1]]


class Graphs:
    """`call(kind, function, *inputs)`: function(*inputs), a tuple of tensors, from a graph that was
    captured at the first call of this kind with inputs of these shapes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        # The reference draws of float64 logits look at the device: no graph can hold that.
        self.enabled = device.type == "cuda" and dtype != torch.float64
        self.pool, self.captured, self.memory = None, {}, {}
        # Of its own: torch's stream for captures is on whichever device the first of all was.
        self.stream = torch.cuda.Stream(device) if self.enabled else None

    def call(self, kind: tuple, function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.enabled:
            return function(*inputs)
        key = (*kind, *(x.shape for x in inputs))
        if key not in self.captured:
            try:
                self.captured[key] = self.prepare(function, [x.clone() for x in inputs])
            except RuntimeError as error:
                log.warning("decoding without CUDA graphs: %s", str(error).splitlines()[0])
                self.enabled = False
                return function(*inputs)
        replay, places, outputs = self.captured[key]
        torch._foreach_copy_(places, inputs)  # one kernel
        replay()
        return outputs

    def prepare(self, function: Callable, places: list[Tensor]):
        """(replay, places of the inputs, places of the outputs)."""
        outputs = tuple(self.place(i, x) for i, x in enumerate(self.warm_up(function, places)))

        def work():
            for place, value in zip(outputs, function(*places), strict=True):
                place.copy_(value)

        return self.capture(work), places, outputs

    def place(self, number: int, like: Tensor) -> Tensor:
        """Where all graphs leave their output of this number and type, in rows as `empty_rows` has
        them. What an earlier graph was given stays, so a larger one doubles."""
        *rows, width = like.shape
        flat, size = self.memory.get((number, like.dtype)), math.prod(rows) * padded(width)
        if flat is None or len(flat) < size:
            flat = self.memory[number, like.dtype] = like.new_empty(1 << (size - 1).bit_length())
        return flat[:size].view(*rows, padded(width))[..., :width]

    def warm_up(self, function: Callable, places: list[Tensor]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                outputs = function(*places)
        current.wait_stream(self.stream)
        return outputs

    def capture(self, work: Callable) -> Callable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        self.pool = self.pool or graph.pool()
        return graph.replay

    def rows(self, n: int, most: int) -> int:
        """The batch that n rows are padded to: a power of two, so that few graphs are captured."""
        return min(1 << (n - 1).bit_length(), most) if self.enabled else n

    def reach(self, n: int, most: int) -> int:
        """The attended length that n is rounded up to."""
        return min(-(-n // REACH) * REACH, most) if self.enabled else n
