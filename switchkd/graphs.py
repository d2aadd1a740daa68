"""Forward passes as CUDA graphs: one launch instead of one a kernel.

A graph reads and writes fixed memory. Inputs are copied in; outputs stay valid until the next call
of any graph here, for all share one memory pool. Elsewhere than on a CUDA device the functions are
just called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UPS = 2  # calls before the capture: kernels compile, libraries allocate their workspaces
REACH = 128  # attended lengths are rounded up to its multiples


class Graphs:
    """`call(kind, function, *inputs)`: function(*inputs), a tuple of tensors, from a graph that was
    captured at the first call of this kind with inputs of these shapes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        # The reference draws of float64 logits look at the device: no graph can hold that.
        self.enabled = device.type == "cuda" and dtype != torch.float64
        self.device, self.pool, self.captured = device, None, {}

    def call(self, kind: tuple, function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.enabled:
            return function(*inputs)
        key = (*kind, *(x.shape for x in inputs))
        if key not in self.captured:
            try:
                self.captured[key] = self.capture(function, [x.clone() for x in inputs])
            except RuntimeError as error:
                log.warning("decoding without CUDA graphs: %s", str(error).splitlines()[0])
                self.enabled = False
                return function(*inputs)
        replay, places, outputs = self.captured[key]
        torch._foreach_copy_(places, inputs)  # one kernel
        replay()
        return outputs

    def capture(self, function: Callable, places: list[Tensor]):
        """(replay, places of the inputs, outputs)."""
        with torch.cuda.device(self.device):  # streams and captures are of the current one
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(*places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = function(*places)
        self.pool = self.pool or graph.pool()
        return graph.replay, places, outputs

    def rows(self, n: int, most: int) -> int:
        """The batch that n rows are padded to: a power of two, so that few graphs are captured."""
        return min(1 << (n - 1).bit_length(), most) if self.enabled else n

    def reach(self, n: int, most: int) -> int:
        """The attended length that n is rounded up to."""
        return min(-(-n // REACH) * REACH, most) if self.enabled else n
