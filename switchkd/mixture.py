"""The data mix: which text each row is trained on, its own response, a rollout, or an earlier one.

    u < s * fresh     a fresh rollout of the row, which enters the replay buffer
    u < s             an earlier rollout, drawn from the buffer with its own prompt
    else              the response in the data

with u uniform by (row, epoch), s the share of generated text (`lmbda`) and fresh 1 without a
buffer. DistiLLM (arXiv 2402.03898, and its code) starts at s = 0 and raises s by
STEP each time the validation loss has worsened by EPSILON since it was last raised; its buffer
drops the oldest sample, and all generated rows are fresh until it is full. It tosses a coin per
batch; here there is one per row, so that nothing depends on how a step is split into micro-batches
and ranks.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from switchkd_kernels import uniform
from switchkd_kernels.noise import STREAM_MIX, STREAM_REPLAY
from torch import Tensor, nn

from switchkd.data import Row, Rows
from switchkd.losses import collate, response_hidden
from switchkd.models import decoder_of
from switchkd.records import pieces_of
from switchkd.rollout import Rollout

STEP = 0.1  # DistiLLM's code: what is added to the share
EPSILON = 0.1  # its --loss-eps, in nats per token
FRESH_SHARE: dict[str, Callable[[float], float]] = {  # its --replay-ratio, by training progress
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}


@dataclass
class Text:
    """What one row of a step is trained on.

    source: "data", "rollout" or "replay"; step: when it was written, for the latter two.
    from_teacher (tokens,) bool: of a response in the data True, it is no text of the student's.
    weights (tokens,) float, or None for 1; hidden: the teacher's states, if the rollout kept them.
    """

    row: Row
    source: str = "data"
    tokens: list[int] = field(default_factory=list)
    step: int | None = None
    from_teacher: Tensor | None = None
    weights: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self):
        if self.source == "data":
            self.tokens = self.row.completion_ids
            self.from_teacher = torch.ones(len(self.tokens), dtype=torch.bool)

    def columns(self) -> dict[str, Tensor]:
        """The values per token that a loss may ask for."""
        ones = torch.ones(len(self.tokens))
        weights = ones if self.weights is None else self.weights.float()
        return {"from_teacher": self.from_teacher, "row_weights": weights}


class Mixture:
    """Draws the texts of a step, and keeps the share of generated text and the replay buffer.

    The options (lmbda, adaptive_lmbda, replay_capacity, replay_ratio, seed) are a SwitchConfig's.
    """

    def __init__(
        self,
        rows: Rows | None,
        *,
        seed: int,
        lmbda: float,
        adaptive_lmbda: bool = False,
        replay_capacity: int = 0,
        replay_ratio: str = "decreasing",
    ):
        self.rows, self.seed, self.share, self.adaptive = rows, seed, lmbda, adaptive_lmbda
        self.fresh_share = FRESH_SHARE[replay_ratio]
        # (row id, step, tokens, writers) of each sample
        self.buffer: deque[tuple[int, int, list[int], list[int]]] = deque(maxlen=replay_capacity)
        self.reference: float | None = None  # the validation loss when the share was last raised
        self.seen: int | None = None  # the step of the last validation

    @cached_property
    def row_of(self) -> dict[int, Row]:
        return {row.id: row for row in self.rows.rows}

    def coin(self, rows: Sequence[Row], epoch: int, stream: int = STREAM_MIX) -> list[float]:
        """A uniform number per row and epoch, the same wherever the row turns up."""
        if not rows:
            return []
        ids = torch.tensor([row.id for row in rows])
        return uniform(self.seed, ids, torch.full_like(ids, epoch), stream).tolist()

    def choose(self, rows: Sequence[Row], epoch: int, progress: float = 0.0) -> list[str]:
        """The source of each row's text; a row without a response is always rolled out."""
        full = self.buffer.maxlen > 0 and len(self.buffer) == self.buffer.maxlen
        fresh = self.share * (self.fresh_share(progress) if full else 1.0)

        def source(row: Row, u: float) -> str:
            if u < fresh or not row.completion_ids:
                return "rollout"
            return "replay" if u < self.share else "data"

        return [source(*pair) for pair in zip(rows, self.coin(rows, epoch), strict=True)]

    def draw(self, rows: Sequence[Row], epoch: int, progress: float) -> list[Text]:
        """The texts of a step's rows; those of source "rollout" are still to be written.

        progress: the part of training that is done.
        """
        texts = []
        coins = self.coin(rows, epoch, STREAM_REPLAY)
        for row, source, u in zip(rows, self.choose(rows, epoch, progress), coins, strict=True):
            if source == "replay":
                row_id, step, tokens, writers = self.buffer[int(u * len(self.buffer))]
                writers = torch.tensor(writers, dtype=torch.bool)
                text = Text(self.row_of[row_id], source, tokens, step, writers)
            else:
                text = Text(row, source)
            texts.append(text)
        return texts

    def keep(self, texts: Sequence[Text], gather: Callable[[list], list]) -> None:
        """Put a step's fresh rollouts into the buffer, those of all ranks in the order of rows."""
        if self.buffer.maxlen == 0:
            return
        fresh = [
            (t.row.id, t.step, t.tokens, t.from_teacher.int().tolist())
            for t in texts
            if t.source == "rollout"
        ]
        self.buffer.extend(sorted(gather(fresh)))

    def validated(self, loss: float, step: int) -> None:
        """Told the validation cross-entropy after `step`: raise the share if it has worsened."""
        if not self.adaptive or self.seen == step:
            return
        self.seen = step
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + EPSILON:
            self.share, self.reference = min(self.share + STEP, 1.0), loss

    def describe(self, texts: Sequence[Text]) -> dict[str, float]:
        """What a log says of a step's texts, where their mix changes in training."""
        if not texts or not (self.adaptive or self.buffer.maxlen):
            return {}
        count = Counter(text.source for text in texts)
        parts = {f"mixture/{s}": count[s] / len(texts) for s in ("data", "rollout", "replay")}
        return {"mixture/lmbda": self.share} | parts

    def state(self) -> dict:
        """What a checkpoint needs, as JSON values."""
        names = ("share", "reference", "seen")
        return {name: getattr(self, name) for name in names} | {"buffer": list(self.buffer)}

    def load(self, state: dict) -> None:
        """Take up `state`; a share that does not adapt is what `lmbda` says now."""
        if self.adaptive:
            self.share = state["share"]
        self.reference, self.seen = state["reference"], state["seen"]
        self.buffer.clear()
        self.buffer.extend(tuple(entry) for entry in state["buffer"])


def write(texts: Sequence[Text], rollout: Rollout, step: int, teacher_rate: float | None) -> None:
    """Fill in what `rollout` wrote for `texts`, in their order.

    teacher_rate: a, for importance weights w = q(y) / (a p(y) + (1 - a) q(y)) of tokens that were
    drawn from a p + (1 - a) q; None for none. This is MiniLLM's weight (arXiv 2306.08543), whose
    product over the prefix is cut to the token itself; it is at most 1 / (1 - a).
    """
    for i, (text, tokens, states) in enumerate(
        zip(texts, rollout.completions(), rollout.hidden(), strict=True)
    ):
        n = len(tokens)
        text.tokens, text.hidden, text.step = tokens, states, step
        text.from_teacher = rollout.from_teacher[i, :n]
        if teacher_rate is not None:
            log_ratio = rollout.teacher_logprob[i, :n] - rollout.student_logprob[i, :n]
            text.weights = 1 / (teacher_rate * log_ratio.double().exp() + 1 - teacher_rate)


@torch.no_grad()
def complete(texts: Sequence[Text], teacher: nn.Module, batch_size: int) -> None:
    """Fill in the teacher's states of those texts whose states no rollout has kept: while
    it is whole, for a loss that will find it in parts."""
    missing = [text for text in texts if text.hidden is None]
    missing.sort(key=lambda text: len(text.row.prompt_ids) + len(text.tokens))
    for at in range(0, len(missing), batch_size):
        part = missing[at : at + batch_size]
        batch = collate([text.row.prompt_ids for text in part], [text.tokens for text in part], 0)
        batch = {name: x.to(teacher.device) for name, x in batch.items()}
        states = response_hidden(teacher, decoder_of(teacher), batch)
        lengths = [len(text.tokens) for text in part]
        for text, mine in zip(part, states.split(lengths), strict=True):
            text.hidden = mine


def deal(
    texts: Sequence[Text], sizes: Sequence[int], pad: int, columns: Sequence[str]
) -> list[dict]:
    """Micro-batches of these sizes, texts of like length together: a window's gradient is one sum
    over its tokens, so who sits with whom changes nothing but the padding.

    columns: which of `Text.columns` the loss needs. row_ids (rows,) tell the rows apart in errors.
    A batch of no text has one that counts nothing, and says so by `idle`.
    """
    left = sorted(texts, key=lambda text: len(text.row.prompt_ids) + len(text.tokens))
    batches = []
    for size in sizes:
        part, left = left[:size], left[size:]
        if not part:
            nothing = collate([[pad]], [[pad]], pad)
            batches.append(nothing | {"row_ids": torch.tensor([0]), "idle": True})
            continue
        batch = collate(
            [text.row.prompt_ids for text in part],
            [text.tokens for text in part],
            pad,
            [text.hidden for text in part],
            **{name: [text.columns()[name] for text in part] for name in columns},
        )
        batches.append(batch | {"row_ids": torch.tensor([text.row.id for text in part])})
    return batches


def written(texts: Sequence[Text]) -> tuple[int, int]:
    """Tokens of the fresh rollouts, and how many of them the teacher wrote."""
    fresh = [text for text in texts if text.source == "rollout"]
    by_teacher = sum(int(text.from_teacher.sum()) for text in fresh)
    return sum(len(text.tokens) for text in fresh), by_teacher


def records(texts: Sequence[Text], rollout: Rollout | None, step: int, decode) -> list[dict]:
    """A line of completions.jsonl for each rollout, and for each that was replayed.

    A replayed one names the step that wrote it in `replay_of`, and holds no divergences: the
    student has changed since.
    """
    lines, fresh = [], 0
    for text in texts:
        if text.source == "data":
            continue
        line = {"step": step, "row": text.row.id}
        if text.source == "replay":
            line["replay_of"] = text.step
        line |= {"prompt": decode(text.row.prompt_ids), "completion": decode(text.tokens)}
        if text.source == "rollout":
            line |= rollout.record(fresh)
            fresh += 1
        else:
            line |= {"tokens": text.tokens, "from_teacher": text.from_teacher.int().tolist()}
            line |= dict.fromkeys(Rollout.RECORDS[1:], [None] * len(text.tokens))
        lines.append(line)
    return lines


def text_blocks(file: str, tokenizer, width: int) -> torch.Tensor:
    """A text file as token ids (blocks, width), for the extra language-model loss."""
    ids, pieces = array("q"), pieces_of(Path(file))
    while some := list(islice(pieces, 100)):  # a megabyte: a tokenizer takes 170 bytes for each
        for found in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(found)
    blocks = len(ids) // width
    if blocks == 0:
        raise ValueError(f"lm_file: got {len(ids)} tokens, expected at least {width}")
    return torch.frombuffer(ids, dtype=torch.int64)[: blocks * width].view(blocks, width)
