"""What passes take here: real models of one and of two layers, timed.

The difference is a layer's time, the rest that of embeddings, head and what a pass does once. Rows,
lengths and types are those of the run, the weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from switchkd.cache import CachedModel, check_architecture
from switchkd.doctor import median_seconds
from switchkd.models import layers_in
from switchkd.plan_memory import Memory, weight_bytes
from switchkd.plan_meter import Shape
from switchkd.planner import BLOCKS

BLOCK = max(BLOCKS)  # tokens a row in a long pass
REPEATS = 5


@dataclass(frozen=True)
class Passes:
    """Seconds of a decoder's pass over one token of each row, over BLOCK, and over the prompts."""

    one: float
    block: float
    prefill: float


def layers_of(model: nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers


def fits(memory: Memory, role: str, free: int) -> bool:
    """Whether a model can be made of one and two of its layers, and there is room for two and
    their gradients."""
    model = memory.pair.student if role == "student" else memory.decoders[role]
    try:
        with torch.device("meta"):
            for layers in (1, 2):
                memory.pair.small(role, layers)
    except Exception:  # whatever a configuration finds wrong with so few layers
        return False
    small = weight_bytes(model) - (layers_of(model) - 2) * weight_bytes(layers_in(model)[0])
    return 3 * small < free


def _extrapolated(layers: int, times: Callable[[int], list[float]]) -> list[float]:
    one, two = times(1), times(2)
    return [a + (layers - 1) * max(b - a, 0.0) for a, b in zip(one, two, strict=True)]


@torch.no_grad()
def decoding(memory: Memory, role: str, here: torch.device) -> Passes | None:
    """Of the block decoder, half of the new tokens being written; None if it does not serve the
    model."""
    config, slots = memory.config, max(memory.asked.slots, 1)
    model = memory.decoders[role]
    try:
        check_architecture(model)
    except ValueError:
        return None
    before = config.max_prompt_length + config.max_new_tokens // 2

    def times(layers: int) -> list[float]:
        with here:
            small = memory.pair.small("decoding" if role == "student" else role, layers)
            cached = CachedModel(small, slots, before + BLOCK)

            def run(count: int, length: int, logits: bool) -> float:
                tokens = torch.zeros(slots, count, dtype=torch.int64)
                lengths = torch.full((slots,), length)
                prompts = None if length else lengths + count

                def once() -> None:
                    hidden = cached.feed(tokens, lengths, length + count, counts=prompts)
                    if logits:
                        cached.logits(hidden)

                return median_seconds(once, here, REPEATS)

            return [
                run(1, before, True), run(BLOCK, before, True),
                run(config.max_prompt_length, 0, False),
            ]  # fmt: skip

    return Passes(*_extrapolated(layers_of(model), times))


def training(memory: Memory, here: torch.device) -> float:
    """Seconds of the student forward and backward over a micro-batch, without the loss."""
    config = memory.config
    shape = Shape(memory.asked.rows, config.max_prompt_length, config.max_new_tokens)

    def times(layers: int) -> list[float]:
        with here:
            model = memory.pair.small("student", layers)

            def once() -> None:
                with torch.autocast(here.type, memory.cast, memory.cast is not None):
                    hidden = shape.hidden(model)
                hidden.float().square().mean().backward()

            return [median_seconds(once, here, REPEATS)]

    return _extrapolated(layers_of(memory.pair.student), times)[0]
