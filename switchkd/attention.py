"""Attention over a row cache, registered with transformers under a name of its own.

Queries (b, Hq, q, d) that follow `lengths` (b,) earlier tokens attend to the cached keys and values
(b, Hkv, reach, d). Query heads that share a key head are laid under each other, as G q queries of
one head: the keys and values of grouped heads are then read once, never repeated.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from switchkd.models import evaluating

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:  # optional
    flash_attn_with_kvcache = None

ROWS, FLASH = "switchkd_rows", "switchkd_flash"
# What a model may have been loaded with; `eager` keeps its own function.
SERVED = ("sdpa", "eager", "flash_attention_2")


def _refuse(module, **given) -> None:
    """Raise for what a layer says of its attention, and a function below does not compute."""
    for name, value in given.items():
        if value is not None:  # s_aux: gpt-oss's attention sinks
            raise ValueError(
                f"{type(module).__name__}: got {name} in attention, expected none; a model that is "
                "loaded with attn_implementation='eager' keeps its own function"
            )


def _rows(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Scaled dot products; attention_mask (b, 1, G q, reach) from `row_mask`."""
    _refuse(module, softcap=softcap, s_aux=kwargs.get("s_aux"))
    batch, heads, count, width = query.shape
    folded = query.reshape(batch, key.shape[1], -1, width)
    mask = attention_mask.to(query.dtype)  # another only under autocast
    if mask.shape[2] != folded.shape[2]:  # more or fewer heads than the configuration tells
        mask = mask[:, :, :count].repeat(1, 1, folded.shape[2] // count, 1)
    out = scaled_dot_product_attention(folded, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, count, -1).transpose(1, 2).contiguous(), None


# What `attending` says of a pass, for `_flash`: not every model hands on what its forward is given.
_pass: dict = {"seqlens": None, "window": None}


def _flash(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """flash-attn; seqlens (b,) int32 count the queries, whose causal mask ends there."""
    _refuse(module, s_aux=kwargs.get("s_aux"))
    window = kwargs.get("sliding_window") or _pass["window"]  # a query's own position counts
    out = flash_attn_with_kvcache(
        *(x.transpose(1, 2) for x in (query, key, value)),
        cache_seqlens=_pass["seqlens"],
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out, None


for _name, _function in ((ROWS, _rows), (FLASH, _flash)):
    AttentionInterface.register(_name, _function)


# What limits the earlier entries that a layer of some kind sees, by its name in configurations.
LIMITS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
CONV, RECURRENT = STATES = ("conv", "linear_attention")  # layers without attention


def spans_of(config) -> dict[str, int | None]:
    """The kinds of attention in a model's layers, and how many entries they see; None: all."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None:  # the second name is GPT-Neo's
        windowed = getattr(config, "use_sliding_window", None) is not False  # Qwen2 names one
        window = getattr(config, "sliding_window", None) if windowed else None
        kinds = ["sliding_attention" if window else "full_attention"]
    return {x: getattr(config, LIMITS.get(x) or "", None) for x in sorted(set(kinds))}


def row_mask(
    positions: Tensor, reach: int, groups: int, dtype: torch.dtype,
    kind: str = "full_attention", span: int | None = None,
) -> Tensor:  # fmt: skip
    """(b, 1, groups * q, reach): 0 where a query at positions (b, q) sees a cache entry, else -inf.

    Added to the scores; no row of it is all -inf, for a query sees its own entry. Every layer
    would make the same of a mask of bools, for itself.
    """
    entries, last = torch.arange(reach, device=positions.device), positions[:, None, :, None]
    unseen = entries > last
    if kind == "sliding_attention":
        unseen |= entries <= last - span
    elif kind == "chunked_attention":
        unseen |= entries < last - last % span
    mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
    return mask.repeat(1, 1, groups, 1) if groups > 1 else mask


def attention_for(model: nn.Module) -> str:
    """The function that serves this model: flash-attn where it is installed and can run."""
    config = model.config.get_text_config()
    if config._attn_implementation == "eager" or not model._supports_attention_backend:
        return config._attn_implementation
    half = model.dtype in (torch.float16, torch.bfloat16)
    flash = half and model.device.type == "cuda" and "chunked_attention" not in spans_of(config)
    if flash_attn_with_kvcache is not None and flash:
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


_decoding = threading.RLock()  # re-entrant: a callback may decode, too


def decoding(function: Callable) -> Callable:
    """A decoder, whose models are among its arguments.

    One thread at a time is in any: what `attending` and others like it change for a pass is seen by
    all who share a model, or its architecture. Every module ends in the mode that it had, for a
    training loop around a rollout would miss its dropout.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        given = (*args, *kwargs.values())
        models = [model for model in given if isinstance(model, nn.Module)]
        with _decoding, without_cudnn(), evaluating(*models):
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def attending(
    config, name: str, seqlens: Tensor | None = None, window: int | None = None
) -> Iterator[None]:
    """Within it, the layers of this config call the function `name`; for flash-attn, tokens of each
    row (b,) int32 with those of the pass, and the window of all layers, if they share one."""
    before = config._attn_implementation
    config._attn_implementation = name
    _pass.update(seqlens=seqlens, window=window)
    try:
        yield
    finally:
        config._attn_implementation = before
        _pass.update(seqlens=None, window=None)
