"""A preallocated KV cache with a length per row, for any unmodified transformers model.

Row r of a batch holds the keys and values of positions 0 .. lengths[r] - 1, or what a short
convolution was given there; what lies beyond is stale and never attended to. So rolling back is a
change of `lengths`, and prompts of unequal length need no padding on the left. Two models that read
one token stream have equal lengths.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from switchkd.attention import (
    CONV,
    FLASH,
    LIMITS,
    ROWS,
    SERVED,
    attending,
    attention_for,
    row_mask,
    spans_of,
)
from switchkd.layers import few_rows
from switchkd.models import cache_name, decoder_of, head_of


class _Layer(CacheLayerMixin):
    """Keys and values (slots, heads, capacity, width) of one attention layer, or the inputs
    (slots, kernel size - 1 + capacity, channels) of one convolution over past positions."""

    def __init__(self, owner: RowCache):
        super().__init__()
        self.owner, self.inputs = owner, None

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

    def update_conv_state(self, inputs: Tensor, kernel_size: int) -> Tensor:
        """(b, C, kernel_size - 1 + q): inputs (b, C, q) behind those that precede them."""
        owner, past = self.owner, kernel_size - 1  # before its first position, a row is zero
        if self.inputs is None:
            size = owner.slots, past + owner.capacity, inputs.shape[1]
            self.inputs = inputs.new_zeros(size)
        rows, first = owner.rows[:, None], owner.positions[:, :1]
        self.inputs[rows, owner.positions + past] = inputs.transpose(1, 2)
        seen = torch.arange(past + inputs.shape[2], device=inputs.device)
        return self.inputs[rows, first + seen].transpose(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        if self.is_initialized:
            for store in (self.keys, self.values):
                store[target, :, :length] = store[source, :, :length]
        if self.inputs is not None:
            past = self.inputs.shape[1] - self.owner.capacity
            self.inputs[target, : past + length] = self.inputs[source, : past + length]

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

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None  # so a layer asks for it by its inputs, however few they are

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int
    ) -> Tensor:
        return self.layers[layer_idx].update_conv_state(conv_states, conv_kernel_size)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for layer in self.layers:
            layer.move(source, target, length)


class CachedModel:
    """A causal language model with a row cache: feed tokens anywhere, get hidden states back."""

    def __init__(self, model: nn.Module, slots: int, capacity: int):
        check_architecture(model)
        self.model, self.decoder, self.head = model, decoder_of(model), head_of(model)
        self.config = config = model.config.get_text_config()
        self.attention = attention_for(model)
        layer = getattr(config, "per_layer_config", [config])[0]  # Gemma 4 asks for it
        heads = layer.num_attention_heads
        shared = getattr(layer, "num_key_value_heads", None) or heads
        self.spans = spans_of(config)  # a model whose layers differ takes a mask of each kind
        kinds = getattr(config, "layer_types", None)
        self.by_kind = bool(kinds) and {*kinds} != {"full_attention"}
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
        mask, said = None, ()
        if self.attention == FLASH:
            window = None if self.by_kind else next(iter(self.spans.values()))
            said = (lengths + count).int(), window
        else:
            form = positions, reach, self.groups, self.model.dtype
            mask = {
                kind: None if kind == CONV else row_mask(*form, kind, span)
                for kind, span in self.spans.items()
            }
            mask = mask if self.by_kind else next(iter(mask.values()))
        with attending(self.config, self.attention, *said), few_rows(self.device):
            out = self.decoder(
                input_ids=tokens.clamp(min=0),  # -1 flags logits that were undefined
                attention_mask=mask,
                position_ids=positions.clamp(max=self.last_position),  # beyond it is padding
                use_cache=True,
                **{self.cache_name: self.cache},
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


@torch.no_grad()
def position_bytes(model: nn.Module) -> int:
    """What all layers keep of one position: what a pass over one token leaves in a cache.

    Configurations do not tell: heads may be of two sizes, compressed, or shared between layers.
    """
    decoder = decoder_of(model)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    out = decoder(input_ids=token, position_ids=token, use_cache=True)
    layers = getattr(getattr(out, cache_name(decoder), None), "layers", ())
    stores = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    inputs = [x for layer in layers for x in getattr(layer, "conv_states", {}).values()]
    stores += [x[..., 0] for x in inputs if x is not None]  # of one position out of a kernel's
    return sum(x.nbytes for x in stores if x is not None)


class NotServed(ValueError):
    """A model, or rows so long, that the naive loop decodes and a row cache does not."""


def check_architecture(model: nn.Module) -> None:
    """Refuse models whose attention a row cache cannot serve, before anything is allocated."""
    config, name = model.config.get_text_config(), type(model).__name__
    served = [*LIMITS, CONV] if hasattr(Cache, "get_conv_state") else [*LIMITS]
    others = spans_of(config).keys() - {*served}
    if others:
        raise NotServed(
            f"{name} has {', '.join(sorted(others))}, which the block decoder's cache does not "
            f"serve: expected {', '.join(served)} in its layers; the naive loop decodes it"
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
    """Refuse rows so long that a model would treat all positions of a pass otherwise."""
    config, name = model.config.get_text_config(), type(model).__name__
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    first = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") == "longrope" and first and length > first:
        raise NotServed(
            f"{name}: got rows of {length} positions, expected at most {first}: "
            "beyond, LongRoPE turns every row of a batch by the longest; the naive loop decodes it"
        )
    cools = getattr(config, "attn_temperature_tuning", False) and config.floor_scale
    if cools and length >= cools:
        raise NotServed(
            f"{name}: got rows of {length} positions, expected fewer than {cools}: from there on, "
            "Llama 4 scales attention by the length of a batch; the naive loop decodes it"
        )
