"""One model that reads token by token with its own cache, as the naive rollout needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd.models import cache_name, last_position


@dataclass
class Stream:
    """One model and its cache, fed with left-padded tokens."""

    model: torch.nn.Module
    cache: object = None

    def __post_init__(self):
        self.cache_name = cache_name(self.model)  # once: a token takes long enough
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None)
        self.recurrent = set(kinds or ()) == {"linear_attention"}

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Feed tokens (B, n); returns the logits (B, V) after the last one."""
        if self.recurrent and self.cache is not None:
            mask = None  # Mamba multiplies it with the tokens of this pass, none of them padding
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=last_position(tokens.device),
            **{self.cache_name: self.cache},
        )
        self.cache = getattr(out, self.cache_name, None)
        if self.cache is None:
            name = type(self.model).__name__
            raise ValueError(
                f"{name}: got an output without {self.cache_name}, expected a model that keeps one"
            )
        return out.logits[:, -1]


@torch.no_grad()
def padding_matters(model: torch.nn.Module) -> bool:
    """Whether what a model says of a text changes with padding before it, tried on a few tokens.

    So it does where positions are counted by tokens read (BART), and where masked attention is NaN
    (eager attention takes its softmax in float32, where the least float64 is -inf).
    """
    said, training = [], model.training
    model.eval()
    for pads in (0, 8):
        slots = torch.arange(pads + 3, device=model.device)[None]
        mask, positions = (slots >= pads).long(), (slots - pads).clamp(min=0)
        stream = Stream(model)
        stream.step(positions[:, :-1] + 1, mask[:, :-1], positions[:, :-1])
        logits = stream.step(positions[:, -1:] + 1, mask, positions[:, -1:])
        said.append(logits.float().softmax(-1))
    model.train(training)
    rounding = 0.1 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return not torch.allclose(*said, atol=rounding, rtol=0.0, equal_nan=True)
