"""Attention over a row cache, registered with transformers under a name of its own.

Queries (b, Hq, q, d) that follow `lengths` (b,) earlier tokens attend to the cached keys and values
(b, Hkv, reach, d). Query heads that share a key head are laid under each other, as G q queries of
one head: the keys and values of grouped heads are then read once, never repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:  # optional
    flash_attn_with_kvcache = None

ROWS, FLASH = "switchkd_rows", "switchkd_flash"
# What a model may have been loaded with; `eager` keeps its own function.
SERVED = ("sdpa", "eager", "flash_attention_2")


def _rows(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Scaled dot products; attention_mask (b, 1, G q, reach) from `row_mask`."""
    if softcap is not None:
        raise ValueError(f"{type(module).__name__}: got a softcap in attention, expected none")
    batch, heads, count, width = query.shape
    folded = query.reshape(batch, key.shape[1], -1, width)
    mask = attention_mask.to(query.dtype)  # another only under autocast
    if mask.shape[2] != folded.shape[2]:  # more or fewer heads than the configuration tells
        mask = mask[:, :, :count].repeat(1, 1, folded.shape[2] // count, 1)
    out = scaled_dot_product_attention(folded, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, count, -1).transpose(1, 2).contiguous(), None


def _flash(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """flash-attn; cache_seqlens (b,) int32 counts the queries, whose causal mask ends there."""
    out = flash_attn_with_kvcache(
        *(x.transpose(1, 2) for x in (query, key, value)),
        cache_seqlens=kwargs["cache_seqlens"],
        softmax_scale=scaling,
        causal=True,
        softcap=softcap or 0.0,
    )
    return out, None


for _name, _function in ((ROWS, _rows), (FLASH, _flash)):
    AttentionInterface.register(_name, _function)


def row_mask(positions: Tensor, reach: int, groups: int, dtype: torch.dtype) -> Tensor:
    """(b, 1, groups * q, reach): 0 where a query at positions (b, q) sees a cache entry, else -inf.

    Added to the scores; no row of it is all -inf, for the first entry is always seen. Every layer
    would make the same of a mask of bools, for itself.
    """
    unseen = torch.arange(reach, device=positions.device) > positions[:, None, :, None]
    mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
    return mask.repeat(1, 1, groups, 1) if groups > 1 else mask


def attention_for(model: nn.Module) -> str:
    """The function that serves this model: flash-attn where it is installed and can run."""
    config = model.config.get_text_config()
    if config._attn_implementation == "eager" or not model._supports_attention_backend:
        return config._attn_implementation
    half = model.dtype in (torch.float16, torch.bfloat16)
    if flash_attn_with_kvcache is not None and half and model.device.type == "cuda":
        return FLASH
    return ROWS


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Within it, scaled_dot_product_attention does not take cuDNN, which torch 2.11 prefers on an
    H100. It plans anew for every shape, and with a mask its gradient may be NaN (pytorch #196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def attending(config, name: str) -> Iterator[None]:
    """Within it, the layers of this config call the function `name`."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
