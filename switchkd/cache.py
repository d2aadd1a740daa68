"""A preallocated KV cache with a length per row, for any unmodified transformers model.

Row r of a batch holds the keys and values of positions 0 .. lengths[r] - 1; what lies beyond is
stale and never attended to. So rolling back is a change of `lengths`, and prompts of unequal length
need no padding on the left. Two models that read one token stream have equal lengths.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from switchkd.attention import FLASH, ROWS, SERVED, attending, attention_for, row_mask
from switchkd.layers import few_rows
from switchkd.models import cache_name, decoder_of, head_of


class _Layer(CacheLayerMixin):
    """Keys and values (slots, heads, capacity, width) of one attention layer."""

    def __init__(self, owner: RowCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(x: Tensor) -> Tensor:
            return x.new_zeros(self.owner.slots, x.shape[1], self.owner.capacity, x.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self.owner
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store[owner.rows[:, None], :, owner.positions] = new.transpose(1, 2)
        if owner.prefix is not None:  # slots 0 .. n - 1: a view
            part = slice(owner.prefix)
            return self.keys[part, :, : owner.reach], self.values[part, :, : owner.reach]
        return (
            self.keys[:, :, : owner.reach].index_select(0, owner.rows),
            self.values[:, :, : owner.reach].index_select(0, owner.rows),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.reach, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given explicitly

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class RowCache(Cache):
    """The layers of one model. `aim` says, before each forward pass, where its tokens go."""

    def __init__(self, layers: int, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def aim(self, rows: Tensor, positions: Tensor, reach: int, prefix: int | None) -> None:
        """rows (b,) slots, positions (b, q) in them, `reach`: positions attended to at most;
        prefix n if the rows are the slots 0 .. n - 1."""
        self.rows, self.positions, self.reach, self.prefix = rows, positions, reach, prefix

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for layer in self.layers:
            if layer.is_initialized:
                for store in (layer.keys, layer.values):
                    store[target, :, :length] = store[source, :, :length]


class CachedModel:
    """A causal language model with a row cache: feed tokens anywhere, get hidden states back."""

    def __init__(self, model: nn.Module, slots: int, capacity: int):
        check_architecture(model)
        self.model, self.decoder, self.head = model, decoder_of(model), head_of(model)
        self.config = config = model.config.get_text_config()
        self.attention = attention_for(model)
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        self.groups = heads // shared if self.attention == ROWS else 1
        self.cache_name = cache_name(self.decoder)
        self.cache = RowCache(config.num_hidden_layers, slots, capacity)
        self.device = model.device
        self.last_position = getattr(config, "max_position_embeddings", capacity) - 1

    def feed(self, tokens: Tensor, lengths: Tensor, reach: int, rows: Tensor | None = None):
        """Hidden states (b, q, H) after tokens (b, q) that follow `lengths` (b,) earlier ones.

        rows (b,): their slots, by default 0 .. b - 1. reach: an upper bound of lengths + q, at most
        the capacity.
        """
        batch, count = tokens.shape
        positions = lengths[:, None] + torch.arange(count, device=self.device)
        prefix = batch if rows is None else None
        rows = torch.arange(batch, device=self.device) if rows is None else rows
        self.cache.aim(rows, positions, reach, prefix)
        extra = {}
        if self.attention == FLASH:
            mask, extra["cache_seqlens"] = None, (lengths + count).int()
        else:
            mask = row_mask(positions, reach, self.groups, self.model.dtype)
        with attending(self.config, self.attention), few_rows(self.device):
            out = self.decoder(
                input_ids=tokens.clamp(min=0),  # -1 flags logits that were undefined
                attention_mask=mask,
                position_ids=positions.clamp(max=self.last_position),  # beyond it is padding
                use_cache=True,
                **{self.cache_name: self.cache},
                **extra,
            )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., H), as the model's own forward makes them."""
        with few_rows(self.device):
            z = self.model.get_output_embeddings()(hidden)
        if self.head.logit_scale != 1:
            z = z * self.head.logit_scale
        if self.head.softcap is not None:
            z = self.head.softcap * torch.tanh(z / self.head.softcap)
        return z


def capacity_for(longest_prompt: int, max_new_tokens: int, block: int) -> int:
    """Positions of a row: a block may be drafted past the end of a response, never past its place
    in the cache. A multiple of 16: masks of another length would be padded in every layer."""
    return -(-(longest_prompt + max_new_tokens + block) // 16) * 16


def position_bytes(model: nn.Module) -> int:
    """Keys and values of one position, all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


class NotServed(ValueError):
    """A model, or rows so long, that the naive loop decodes and a row cache does not."""


def check_architecture(model: nn.Module) -> None:
    """Refuse models whose attention a row cache cannot serve, before anything is allocated."""
    config, name = model.config.get_text_config(), type(model).__name__
    named = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = set(named or ["full_attention"])  # the second name is GPT-Neo's
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None  # Qwen2 names a window that it does not use
    if kinds != {"full_attention"} or (window and not hasattr(config, "layer_types")):
        what = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window}"
        raise NotServed(
            f"{name} has {what}, which the block decoder's cache does not serve: expected full "
            "attention in every layer; the naive loop decodes it"
        )
    if hasattr(config, "keep_window_size"):
        raise NotServed(
            f"{name} masks by what it has read (keep_window_size), which the block decoder's cache "
            "does not serve: expected a mask of positions alone; the naive loop decodes it"
        )
    takes = inspect.signature(decoder_of(model).forward).parameters
    if not takes.keys() & {"cache", "past_key_values"}:
        raise ValueError(
            f"{name}: got a model that takes no cache of keys and values, expected one that does: "
            "both decoders need it"
        )
    if "position_ids" not in takes or getattr(config, "alibi", False):
        raise NotServed(
            f"{name}: got a model that is not told positions (ALiBi, or none of its own), expected "
            "position_ids, one for each token of a row; the naive loop decodes it"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: got an encoder-decoder, expected a causal language model")
    served = SERVED if model._supports_attention_backend else ("sdpa", "eager")
    if config._attn_implementation not in served:
        raise ValueError(
            f"{name}: got attention {config._attn_implementation!r}, expected one of "
            f"{', '.join(served)} (attn_implementation)"
        )


def check_positions(model: nn.Module, length: int) -> None:
    """Refuse rows so long that a model would turn all positions of a pass otherwise."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    first = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") == "longrope" and first and length > first:
        raise NotServed(
            f"{type(model).__name__}: got rows of {length} positions, expected at most {first}: "
            "beyond, LongRoPE turns every row of a batch by the longest; the naive loop decodes it"
        )
