"""Layers that carry a state from token to token, in a row cache: short convolutions (LFM2) and the
gated delta rule (Qwen3.5, Qwen3-Next, OLMo Hybrid, Kimi Linear).

What a convolution needs of the past is its last few inputs. A recurrence forgets its inputs, and
its state cannot be rolled back. So the state stays at the last token that is known to stand, and
what the recurrence was given since is kept: a round begins by taking into the state those of the
last round's tokens that were accepted, and what it drafts is scored from there.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

# What layers call to go through many tokens at once, by its names in transformers:
# rule(query, key, value, g=, beta=, initial_state=, output_final_state=, ...). key (b, q, heads,
# width), value (b, q, value heads, width), g the logarithm of a decay, beta how much is written.
RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


def rules_of(model: nn.Module) -> list[ModuleType]:
    """The modules that define this model's layers and a rule which is served."""
    modules = {sys.modules[type(layer).__module__] for layer in model.modules()}
    return [module for module in modules if any(hasattr(module, name) for name in RULES)]


@contextlib.contextmanager
def recurring(modules: list[ModuleType], recur: Callable) -> Iterator[None]:
    """Within it, layers defined in these modules call recur(rule, ...) instead of rule(...)."""
    rules = [(module, name) for module in modules for name in RULES if hasattr(module, name)]
    before = [getattr(*rule) for rule in rules]
    for rule, function in zip(rules, before, strict=True):
        setattr(*rule, functools.partial(recur, function))
    try:
        yield
    finally:
        for rule, function in zip(rules, before, strict=True):
            setattr(*rule, function)


def _as_wide(mask: Tensor, like: Tensor) -> Tensor:
    """(b, n) as (b, n, 1, ...)."""
    return mask.view(*mask.shape, *[1] * (like.dim() - 2))


class _Recent:
    """The last entries (slots, size, ...) of rows, each at its position modulo size."""

    def __init__(self, slots: int, size: int, like: Tensor):
        self.store, self.size = like.new_zeros(slots, size, *like.shape[2:]), size

    def read(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(b, n, ...) of rows (b,) at positions (b, n)."""
        return self.store[rows[:, None], positions % self.size]

    def write(self, rows: Tensor, positions: Tensor, new: Tensor) -> None:
        self.store[rows[:, None], positions % self.size] = new

    def start(self, rows: Tensor, new: Tensor, counts: Tensor) -> None:
        """Rows begin with the first counts (b,) of new (b, n, ...); before them is zero."""
        place, last = torch.arange(self.size, device=new.device), counts[:, None] - 1
        position = last - (last - place) % self.size
        taken = new[torch.arange(len(new), device=new.device)[:, None], position.clamp(min=0)]
        self.store[rows] = taken.masked_fill(_as_wide(position < 0, taken), 0)


class State:
    """Of one layer: what its convolutions were given last, and the state of its recurrence."""

    def __init__(self, owner):
        self.owner, self.inputs = owner, {}  # owner: the row cache, which says where tokens go
        self.state, self.given = None, ()

    def stores(self) -> list[Tensor]:
        """All that is kept, (slots, ...)."""
        recent = [x.store for x in (*self.inputs.values(), *self.given)]
        return recent if self.state is None else [*recent, self.state]

    def convolve(self, new: Tensor, number: int, kernel_size: int) -> Tensor:
        """(b, C, kernel_size - 1 + q): inputs (b, C, q) of a convolution behind earlier ones."""
        owner, past, new = self.owner, kernel_size - 1, new.transpose(1, 2)
        if number not in self.inputs:
            self.inputs[number] = _Recent(owner.slots, owner.block + past, new)
        recent = self.inputs[number]
        if owner.counts is not None:
            recent.start(owner.rows, new, owner.counts)
            seen = nn.functional.pad(new, (0, 0, past, 0))
        else:
            before = owner.positions[:, :1] + torch.arange(-past, 0, device=new.device)
            seen = torch.cat([recent.read(owner.rows, before), new], 1)
            recent.write(owner.rows, owner.positions, new)
        return seen.transpose(1, 2)

    def recur(self, rule: Callable, query, key, value, *, g, beta, **options) -> tuple:
        """The outputs of a rule for the tokens of this pass, and a state, which is kept here."""
        owner, given = self.owner, (key, value, g, beta)
        rows, positions, count, device = owner.rows, owner.positions, key.shape[1], key.device
        if self.state is None:
            shape = value.shape[2], key.shape[3], value.shape[3]
            dtype = torch.promote_types(key.dtype, torch.float32)
            self.state = torch.zeros(owner.slots, *shape, dtype=dtype, device=device)
            self.given = [_Recent(owner.slots, owner.block, x) for x in given]

        def run(query: Tensor, given, state: Tensor, stand: Tensor | None = None) -> tuple:
            key, value, g, beta = given
            if stand is not None:  # one that does not stand neither decays a state nor writes to it
                g, beta = (x.masked_fill(_as_wide(~stand, x), 0) for x in (g, beta))
            if device.type == "cpu":  # else all are padded to 64 tokens
                options["chunk_size"] = min(key.shape[1], 64)
            options["initial_state"] = state
            out, state = rule(query, key, value, g=g, beta=beta, **options)
            return out, state.to(self.state.dtype)

        def behind(places: Tensor, query: Tensor, given) -> tuple[Tensor, list[Tensor]]:
            unasked = query.new_zeros(*places.shape, *query.shape[2:])
            earlier = [recent.read(rows, places) for recent in self.given]
            return torch.cat([unasked, query], 1), [
                torch.cat(pair, 1) for pair in zip(earlier, given, strict=True)
            ]

        where = rows if owner.prefix is None else slice(owner.prefix)  # a view
        if owner.counts is not None:
            stand = torch.arange(count, device=device) < owner.counts[:, None]
            out, self.state[rows] = run(query, given, torch.zeros_like(self.state[rows]), stand)
            return out, self.state
        if owner.more:  # behind this round's drafts so far, of which the first stood
            drafts = positions[:, :1] + torch.arange(1 - owner.more, 0, device=device)
            out, _ = run(*behind(drafts, query, given), self.state[where])
            out = out[:, owner.more - 1 :]
        else:  # the tokens of the last round that were accepted, and the first of these, stand
            since, now = owner.since[where][:, None], positions[:, :1]
            last = since + torch.arange(owner.unsettled, device=device)
            # Unless the state has it: what becomes a graph is called more than once.
            stand = torch.cat([last < now, since <= now], 1)
            first = behind(last, query[:, :1], [x[:, :1] for x in given])
            out, self.state[where] = run(*first, self.state[where], stand)
            out = out[:, owner.unsettled :]
            if count > 1:
                rest = run(query[:, 1:], [x[:, 1:] for x in given], self.state[where])
                out = torch.cat([out, rest[0]], 1)
        for recent, new in zip(self.given, given, strict=True):
            recent.write(rows, positions, new)
        return out, self.state
