"""What `rollout_speed.py` measures with: phases and passes of a rollout, the bytes of a pass, and
decoders to compare with."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from switchkd import decoder as block_decoder
from switchkd import rollout as naive_decoder
from switchkd.models import last_position
from switchkd.stream import Stream


class Meter:
    """Within it, a rollout is timed phase by phase, and the block decoder's passes are counted.

    passes: of either model. rows: the rows that were in them, and in all rounds ("rounds").
    plans: rounds by who drafted how many tokens.
    """

    WATCHED = (
        (block_decoder._Decoder, "prefill", "prefill"),
        (block_decoder._Decoder, "draft", "draft"),
        (block_decoder._Decoder, "verify", "verify"),
        (block_decoder._Decoder, "decide", "decide"),
        (Stream, "step", "forward"),
        (naive_decoder, "_select", "decide"),
    )
    COUNTED = (
        (block_decoder._Decoder, "write", "round"),
        (block_decoder._Decoder, "feed", "pass"),
        (block_decoder._Decoder, "prefill_part", "prefill"),
    )

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = defaultdict(float)
        self.passes, self.rows, self.plans = Counter(), Counter(), Counter()

    def __enter__(self) -> Meter:
        watched = self.WATCHED + self.COUNTED
        self.originals = {(owner, name): getattr(owner, name) for owner, name, _ in watched}
        for wrap, places in ((self.timed, self.WATCHED), (self.counted, self.COUNTED)):
            for owner, name, phase in places:
                setattr(owner, name, wrap(getattr(owner, name), phase))
        self.synchronize()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.synchronize()
        self.total = time.perf_counter() - self.start
        for (owner, name), original in self.originals.items():
            setattr(owner, name, original)

    def timed(self, function: Callable, phase: str) -> Callable:
        def run(*args, **kwargs):
            self.synchronize()
            start = time.perf_counter()
            out = function(*args, **kwargs)
            self.synchronize()
            self.seconds[phase] += time.perf_counter() - start
            return out

        return run

    def counted(self, function: Callable, phase: str) -> Callable:
        def run(decoder, *args, **kwargs):
            rows = decoder.slots.n
            if phase == "round":
                self.rows["rounds"] += rows
                self.plans[f"{args[0]} {args[1]}" + (" alone" if args[2] == args[0] else "")] += 1
            elif phase == "prefill":
                self.passes.update(decoder.models.keys())
            else:
                self.passes[args[0]] += 1
                self.rows[args[0]] += rows
            return function(decoder, *args, **kwargs)

        return run

    def steps(self, count: int, rows: int, *roles: str) -> None:
        """Count what goes token by token: `count` passes of each role over all rows."""
        for role in roles:
            self.passes[role] += count
            self.rows[role] += count * rows
        self.rows["rounds"] += count * rows

    def shares(self) -> dict[str, float]:
        """Of the whole time, by phase."""
        shares = {phase: seconds / self.total for phase, seconds in self.seconds.items()}
        return {**shares, "other": 1 - sum(shares.values())}


def weight_bytes(model: nn.Module) -> int:
    """What a pass reads of the parameters: all but the tables in which tokens are looked up."""
    kept = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(kept)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


class NoCache:
    """A model that forgets: every call runs the whole prefix again."""

    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device
        self.ids = self.positions = None

    def eval(self):
        self.ids = self.positions = None  # a new rollout begins
        return self

    def __call__(self, input_ids, attention_mask, position_ids, **_):
        if self.ids is not None:
            input_ids = torch.cat([self.ids, input_ids], 1)
            position_ids = torch.cat([self.positions, position_ids], 1)
        self.ids, self.positions = input_ids, position_ids
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=last_position(input_ids.device),
        )
        return SimpleNamespace(logits=out.logits, past_key_values=())  # a cache, and it is empty


def generate(model: nn.Module, prompts: Sequence[list[int]], count: int, pad: int) -> Tensor:
    """`count` tokens a prompt by Hugging Face `generate`, sampled at temperature 1."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=pad,
        )
    return out[:, longest:]
