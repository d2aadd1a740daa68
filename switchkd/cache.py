"""A preallocated KV cache with a length per row, for any unmodified transformers model.

Row r of a batch holds the keys and values of positions 0 .. lengths[r] - 1; what lies beyond is
stale and never attended to. So rolling back is a change of `lengths`, and prompts of unequal length
need no padding on the left. Two models that read one token stream have equal lengths. Layers with a
state of another kind keep it in `states`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from switchkd.attention import (
    CONV,
    FLASH,
    LIMITS,
    RECURRENT,
    ROWS,
    SERVED,
    STATES,
    attending,
    attention_for,
    row_mask,
    spans_of,
)
from switchkd.layers import few_rows
from switchkd.models import Head, cache_name, decoder_of, head_of
from switchkd.planner import BLOCKS
from switchkd.states import State, recurring, rules_of


class _Layer(CacheLayerMixin):
    """Keys and values (slots, heads, capacity, width) of an attention layer, or another's state."""

    def __init__(self, owner: RowCache):
        super().__init__()
        self.owner, self.state = owner, State(owner)

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

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot with its first `length` entries to another."""
        if self.is_initialized:
            for store in (self.keys, self.values):
                store[target, :, :length] = store[source, :, :length]
        for store in self.state.stores():
            store[target] = store[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.reach, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given explicitly

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class RowCache(Cache):
    """The layers of one model. `aim` says, before each forward pass, where its tokens go.

    block: the most tokens that a round drafts.
    """

    def __init__(self, layers: int, slots: int, capacity: int, block: int, device: torch.device):
        self.slots, self.capacity, self.block = slots, capacity, block
        self.since = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens in the states
        self.unsettled = block - 1  # tokens at most that may have been accepted since
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def aim(
        self, rows: Tensor, positions: Tensor, reach: int, prefix: int | None, more: int,
        counts: Tensor | None,
    ) -> None:  # fmt: skip
        """rows (b,) slots, positions (b, q) in them, `reach`: positions attended to at most;
        prefix n if the rows are the slots 0 .. n - 1. more, counts: as in `CachedModel.feed`."""
        self.rows, self.positions, self.reach, self.prefix = rows, positions, reach, prefix
        self.more, self.counts = more, counts

    def landed(self) -> None:
        """After a pass: what the states hold now."""
        if self.counts is not None:
            self.since[self.rows] = self.counts
            return
        if not self.more:
            self.since[self.rows] = self.positions[:, 0] + 1
        if self.positions.device.type == "cpu":  # elsewhere a graph stays as it is
            self.unsettled = self.more + self.positions.shape[1] - 1

    def begin(self, rows: list[int]) -> None:
        """Nothing precedes the next tokens of slots `rows`."""
        self.since[rows] = 0
        for layer in self.layers:
            for store in layer.state.stores():
                store[rows] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot with its first `length` entries to another."""
        self.since[target] = self.since[source]
        for layer in self.layers:
            layer.move(source, target, length)

    # What layers with a state ask for; they are told nothing, and so ask for all by their inputs.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        return self.layers[layer_idx].state.convolve(conv_states, state_idx, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self.recurs = self.layers[layer_idx].state

    def update_recurrent_state(self, recurrent_states: None, layer_idx: int) -> None:
        pass  # `recur` has

    def recur(self, rule: Callable, *args, **options) -> tuple:
        return self.recurs.recur(rule, *args, **options)


class CachedModel:
    """A causal language model with a row cache: feed tokens anywhere, get hidden states back."""

    def __init__(self, model: nn.Module, slots: int, capacity: int, block: int = max(BLOCKS)):
        check_architecture(model)
        self.model, self.decoder = model, decoder_of(model)
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
        self.device = model.device
        self.cache = RowCache(config.num_hidden_layers, slots, capacity, block, self.device)
        self.has_states, self.rules = bool(self.spans.keys() & {*STATES}), rules_of(model)
        self.last_position = getattr(config, "max_position_embeddings", capacity) - 1

    @cached_property
    def head(self) -> Head:
        return head_of(self.model)

    def feed(
        self, tokens: Tensor, lengths: Tensor, reach: int, rows: Tensor | None = None,
        *, more: int = 0, counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states (b, q, H) after tokens (b, q) that follow `lengths` (b,) earlier ones.

        rows (b,): their slots, by default 0 .. b - 1. reach: an upper bound of lengths + q, at most
        the capacity. more: so many of the earlier tokens are this round's drafts; the others stand.
        counts (b,): these are prompts, so many tokens of each, and what follows is padding.
        """
        batch, count = tokens.shape
        positions = lengths[:, None] + torch.arange(count, device=self.device)
        prefix = batch if rows is None else None
        rows = torch.arange(batch, device=self.device) if rows is None else rows
        self.cache.aim(rows, positions, reach, prefix, more, counts)
        mask, said = None, ()
        if self.attention == FLASH:
            window = None if self.by_kind else next(iter(self.spans.values()))
            said = (lengths + count).int(), window
        else:
            form = positions, reach, self.groups, self.model.dtype
            mask = {
                kind: None if kind in STATES else row_mask(*form, kind, span)
                for kind, span in self.spans.items()
            }
            mask = mask if self.by_kind else next(iter(mask.values()))
        recur = recurring(self.rules, self.cache.recur)
        with attending(self.config, self.attention, *said), few_rows(self.device), recur:
            out = self.decoder(
                input_ids=tokens.clamp(min=0),  # -1 flags logits that were undefined
                attention_mask=mask,
                position_ids=positions.clamp(max=self.last_position),  # beyond it is padding
                use_cache=True,
                **{self.cache_name: self.cache},
            )
        if self.has_states:
            self.cache.landed()
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
    """Keys and values of one position, all layers: what a pass over one token leaves in a cache.

    Configurations do not tell: heads may be of two sizes, compressed, or shared between layers.
    """
    decoder = decoder_of(model)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    out = decoder(input_ids=token, position_ids=token, use_cache=True)
    layers = getattr(getattr(out, cache_name(decoder), None), "layers", ())
    stores = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(x.nbytes for x in stores if x is not None)


@torch.no_grad()
def row_bytes(model: nn.Module, block: int) -> int:
    """What layers with a state keep of a row, however long it is; 0 if they are not served."""
    if not spans_of(model.config.get_text_config()).keys() & {*STATES}:
        return 0
    try:
        cached = CachedModel(model, 1, capacity_for(1, 0, block), block)
    except NotServed:
        return 0
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cached.feed(token, token[0], 1)
    return sum(x.nbytes for layer in cached.cache.layers for x in layer.state.stores())


class NotServed(ValueError):
    """A model, or rows so long, that the naive loop decodes and a row cache does not."""


def check_architecture(model: nn.Module) -> None:
    """Refuse models whose attention a row cache cannot serve, before anything is allocated."""
    config, name = model.config.get_text_config(), type(model).__name__
    served = [*LIMITS]
    if hasattr(Cache, "get_conv_state"):  # as layers ask from transformers 5.2x on
        served += [CONV, RECURRENT] if rules_of(model) else [CONV]
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
