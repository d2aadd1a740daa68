"""What is in each row of the batch, what comes next, and what was written for each prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.policies import Policy
from switchkd.rollout import Rollout


class Record:
    """What was written for P prompts, and the teacher's hidden states that predicted it."""

    def __init__(self, prompts: int, width: int, pad: int, device: torch.device):
        # One column more than a row can need: where what was drafted in vain is put.
        self.shape, self.row_rounds = (prompts, width + 1), 0
        self.lengths = torch.zeros(prompts, dtype=torch.int64, device=device)
        self.columns = {
            "token": torch.full(self.shape, pad, device=device),
            "from_teacher": torch.zeros(self.shape, dtype=torch.bool, device=device),
        }

    def write(self, job: Tensor, positions: Tensor, gained: Tensor, values: dict) -> None:
        """values: name to (n, k) or (n, k, H), at the response positions (n, k) of n prompts."""
        place = torch.arange(positions.shape[1], device=positions.device)
        column = torch.where(place < gained[:, None], positions, self.shape[1] - 1)
        for name, value in values.items():
            if name not in self.columns:
                shape = (*self.shape, *value.shape[2:])
                self.columns[name] = value.new_full(shape, float("nan"))
            store = self.columns[name]
            store[job[:, None], column] = value.to(store.dtype)
        self.lengths.index_add_(0, job, gained)
        self.row_rounds += len(job)

    def rollout(self, seconds: float) -> Rollout:
        longest = int(self.lengths.max())
        inside = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        columns = {name: value[:, :longest] for name, value in self.columns.items()}
        hidden = columns.pop("hidden", None)
        return Rollout(
            tokens=columns.pop("token").cpu(),
            lengths=self.lengths.cpu(),
            **{name: value.cpu() for name, value in columns.items()},
            teacher_hidden=None if hidden is None else hidden[inside],
            seconds=seconds,
            row_rounds=self.row_rounds,
        )


class Slots:
    """What is in each row of the batch; rows 0 .. n - 1 are at work.

    On the device: the prompt's number (job), its sequence id, the token that was written last, the
    lengths of both caches and of the prompt, and the state of the policy. On the host: the two
    lengths; `settled`, the teacher writes all that follows; `follows`, the student's cache is as
    long as the teacher's; `along`, all tokens so far are those of an earlier completion. With
    `text`, so many tokens of prompt and response are on the device, too, -1 after the last.
    """

    def __init__(self, count: int, policy: Policy, device: torch.device, text: int = 0):
        self.n, self.policy, self.device = 0, policy, device
        names = ("job", "sequence", "last", "length", "prompt")
        self.columns = {x: torch.zeros(count, dtype=torch.int64, device=device) for x in names}
        self.state = policy.start(count, device)
        self.text = torch.full((count, text), -1, device=device) if text else None
        self.lengths, self.prompts = [0] * count, [0] * count
        self.settled, self.follows, self.along = ([False] * count for _ in range(3))
        self.host = (self.lengths, self.prompts, self.settled, self.follows, self.along)

    def __getattr__(self, name: str) -> Tensor:
        return self.columns[name][: self.n]

    def working_state(self):
        return self.state and {name: value[: self.n] for name, value in self.state.items()}

    def put(self, slot: int, job: int, sequence: int, prompt: Sequence[int], along: bool) -> None:
        """The last token of a prompt is not in the caches: the first draft follows from it."""
        self.n, cached = max(self.n, slot + 1), len(prompt) - 1
        self._set(slot, (job, sequence, prompt[-1], cached, cached))
        for column, value in zip(self.host, (cached, cached, False, True, along), strict=True):
            column[slot] = value
        for name, fresh in (self.policy.start(1, self.device) or {}).items():
            self.state[name][slot] = fresh[0]
        if self.text is not None:
            self.text[slot] = -1
            self.text[slot, : len(prompt)] = torch.tensor(prompt, device=self.device)

    def free(self, slot: int) -> int | None:
        """Take a row out of work; the last working row moves there: its number, unless the same."""
        self.n -= 1
        source = self.n
        if slot != source:
            text = () if self.text is None else (self.text,)
            for column in (*self.columns.values(), *(self.state or {}).values(), *text, *self.host):
                column[slot] = column[source]
        self._set(source, (0, 0, 0, 0, 0))  # may still be fed, to fill up a batch
        return source if slot != source else None

    def accept(self, tokens: Tensor, gained: Tensor) -> None:
        """Tokens (n, k) of a round, of which each row gains the first so many."""
        self.last.copy_(tokens.gather(1, gained[:, None] - 1)[:, 0])
        self.length.add_(gained)
        if self.text is not None:  # of one token a round
            self.text[: self.n].scatter_(1, self.length[:, None], self.last[:, None])

    def _set(self, slot: int, values: Sequence[int]) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column[slot] = value

    def reach(self, more: int) -> int:
        return max(self.lengths[: self.n]) + more

    def least_position(self) -> int:
        written = zip(self.lengths[: self.n], self.prompts[: self.n], strict=True)
        return min(length - prompt for length, prompt in written)

    def mean_position(self) -> float:
        return (sum(self.lengths[: self.n]) - sum(self.prompts[: self.n])) / self.n


class Queue:
    """The prompts that wait for one of `count` slots.

    A pass over prompts reads all weights, for one prompt as for many, and a slot without a row is
    its share of every round lost. So free slots wait for more of them until they have lost what
    the pass costs: where rows end at a steady rate, no other number is cheaper.
    """

    def __init__(self, prompts: int, count: int):
        self.waiting, self.count, self.lost = deque(range(prompts)), count, 0.0

    def take(
        self, free: Sequence[int], round_cost: float, pass_cost: float
    ) -> list[tuple[int, int]]:
        """[(slot, prompt)] to be filled now, before a round of that cost."""
        self.lost += round_cost * len(free) / self.count
        if self.lost < pass_cost and len(free) < min(self.count, len(self.waiting)):
            return []
        self.lost = 0.0
        return [(slot, self.waiting.popleft()) for slot in free[: len(self.waiting)]]
