"""The block decoder: the tokens of `rollout_naive`, with fewer forward passes.

A round, for all rows at once:

    1. draft    one model, the drafter, writes k tokens, one pass each
    2. verify   the other scores those k positions in one pass
    3. decide   one kernel call over the k rows of each: who writes, and what
    4. accept   the tokens up to and including the first that is not the draft; roll both back

The decision at t depends on the prefix alone, so a token stands if all before it were drafted
right. Both models share one Gumbel field, a token is a function of (p_t, q_t, seed, sequence, t),
which is why a draft is often right even where the other model writes. So is an earlier completion
of the prompt, which both models verify. Which drafts, and how many tokens, changes the cost, never
the output. Where the teacher writes all rows (AdaSwitch after its hand-over), it need not wait for
the student.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from switchkd_kernels import InvalidLogits, sample, switch_select
from switchkd_kernels.reference import STREAM_REDRAW, STREAM_TOKEN, SwitchSelection
from torch import Tensor, nn

from switchkd.attention import decoding
from switchkd.cache import capacity_for, check_positions
from switchkd.engine import Engine
from switchkd.graphs import empty_rows
from switchkd.ngrams import without_repeats
from switchkd.padding import by_length, pad_history
from switchkd.policies import Policy, Student
from switchkd.rollout import (
    Rollout,
    Sampling,
    check_lengths,
    check_models,
    check_request,
    without_comparison,
    written_by,
)
from switchkd.slots import Queue, Record, Slots

ROLES = ("teacher", "student")
PASS_COST = 16  # of a forward pass on a CPU, in tokens of prefill


class _Decoder:
    """One round after another over the slots."""

    def __init__(
        self, engine: Engine, slots: Slots, record: Record, history: Tensor | None, *,
        sampling: Sampling, vocab_size: int | None, eos: Tensor, max_new_tokens: int,
        keep_hidden: bool,
    ):  # fmt: skip
        self.engine, self.slots, self.record, self.history = engine, slots, record, history
        self.models, self.planner, self.graphs = engine.models, engine.planner, engine.graphs
        self.policy, self.sampling, self.vocab_size = slots.policy, sampling, vocab_size
        self.eos, self.max_new_tokens, self.keep_hidden = eos, max_new_tokens, keep_hidden
        self.round_cost = 0.0  # of the last one, as the planner saw it

    def prefill(self, slots: list[int], prompts: list[Sequence[int]]) -> None:
        """Feed all but the last token of each prompt.

        A CPU takes those of about equal length together: there a padded token costs a token.
        """
        for model in self.models.values():
            model.cache.begin(slots)
        cost = PASS_COST if self.slots.device.type == "cpu" else float("inf")
        for part in by_length([len(p) - 1 for p in prompts], cost):
            padded = len(part) * (len(prompts[part[0]]) - 1)
            with self.engine.timed("prefill", 1, 1 + padded / cost):
                self.prefill_part([slots[i] for i in part], [prompts[i][:-1] for i in part])

    def prefill_part(self, slots: list[int], prompts: list[Sequence[int]]) -> None:
        """One pass over them, padded on the right."""
        lengths, device = [len(p) for p in prompts], self.slots.device
        rows = [list(p) + [0] * (max(lengths) - len(p)) for p in prompts]
        tokens, where, counts = (torch.tensor(x, device=device) for x in (rows, slots, lengths))
        for model in self.models.values():
            model.feed(tokens, 0 * where, max(lengths), where, counts=counts)

    def feed(self, role: str, count: int, tokens: Tensor, more: int, draw: bool) -> tuple:
        """Logits (n, q, V), hidden states (n, q, H) of one model after tokens (n, q) that follow
        the caches by `more`; with `draw`, too, a token (n,) drawn after the last."""
        slots, model, n = self.slots, self.models[role], self.slots.n
        rows = self.graphs.rows(n, self.engine.slots)
        reach = self.graphs.reach(slots.reach(count), self.engine.capacity)
        column = {name: value[:rows] for name, value in slots.columns.items()}
        if rows > n:
            tokens = torch.cat([tokens, tokens.new_zeros(rows - n, tokens.shape[1])])

        def step(tokens: Tensor, length: Tensor, prompt: Tensor, sequence: Tensor, *text: Tensor):
            hidden = model.feed(tokens, length, reach, more=more)
            logits = model.logits(hidden)
            if not draw:
                return logits, hidden
            allowed = logits[:, -1]
            if text:
                size = self.sampling.no_repeat_ngram
                allowed = without_repeats(allowed, *text, length + 1, size)
            return logits, hidden, self.draw(role, allowed, length - prompt, sequence)

        # A guess may come from anywhere; SKD's teacher guesses what the student would write.
        length = column["length"] + more
        self.asked = lambda row: (row, length[row] - column["prompt"][row])
        kind = (role, reach, draw, more * model.has_states, self.sampling, self.vocab_size)
        text = () if slots.text is None else (slots.text[:rows],)
        given = tokens, length, column["prompt"], column["sequence"], *text
        out = self.graphs.call(kind, step, *given)
        return tuple(x[:n] for x in out)

    def draft(self, role: str, count: int):
        """`count` tokens (n, k) of one model, its logits (n, k, V) and hidden states (n, k, H)."""
        token, block = self.slots.last, None
        for i in range(count):
            with self.engine.timed(role, 1):
                logits, hidden, token = self.feed(role, count, token[:, None], i, draw=True)
            if block is None:  # what a graph returns must be copied before the next call
                sizes = ((x, (len(x), count, x.shape[-1])) for x in (logits, hidden))
                block = [token.new_empty(len(token), count), *(empty_rows(x, *n) for x, n in sizes)]
            for store, value in zip(block, (token, logits[:, 0], hidden[:, 0]), strict=True):
                store[:, i] = value
        return block

    def verify(self, role: str, draft: Tensor):
        """Logits (n, k, V) and hidden states (n, k, H) of one model for the tokens (n, k)."""
        tokens = torch.cat([self.slots.last[:, None], draft[:, :-1]], 1)
        with self.engine.timed(role, tokens.shape[1]):
            return self.feed(role, tokens.shape[1], tokens, 0, draw=False)

    def draw(
        self, role: str, logits: Tensor, positions: Tensor, ids: Tensor, stream: int = STREAM_TOKEN
    ) -> Tensor:
        """Tokens of one model, at the response positions of sequences, of any equal shape."""
        warp = self.sampling
        token = sample(
            logits.flatten(0, -2), temperature=getattr(self.sampling, f"{role}_temperature"),
            top_k=warp.top_k, top_p=warp.top_p, min_p=warp.min_p,
            seed=warp.seed, sequence_ids=ids.reshape(-1), positions=positions.reshape(-1),
            stream=stream, model=role, vocab_size=self.vocab_size,
        )  # fmt: skip
        return token.view(positions.shape)

    def decide(self, drafter: str, draft: Tensor, logits: dict, positions: Tensor, ids: Tensor):
        """SwitchSelection and thresholds of the drafted positions, all (n, k)."""
        policy, sampling = self.policy, self.sampling
        redraw = STREAM_REDRAW if policy.metric == "rank" else STREAM_TOKEN
        known = {"teacher": None, "student": None}
        if drafter == "student" or (drafter == "teacher" and redraw == STREAM_TOKEN):
            known[drafter] = draft
        for role in known:
            if known[role] is None and sampling.filtered:
                stream = redraw if role == "teacher" else STREAM_TOKEN
                known[role] = self.draw(role, logits[role], positions, ids, stream)
        keys = dict(sequence_ids=ids.reshape(-1), positions=positions.reshape(-1))

        def select(threshold) -> SwitchSelection:
            chosen = switch_select(
                logits["teacher"].flatten(0, 1), logits["student"].flatten(0, 1),
                threshold if isinstance(threshold, float) else threshold.reshape(-1),
                metric=policy.metric, base=policy.base, seed=sampling.seed,
                vocab_size=self.vocab_size,
                teacher_temperature=sampling.teacher_temperature,
                student_temperature=sampling.student_temperature, **keys,
                **{f"{role}_token": x if x is None else x.reshape(-1)
                   for role, x in known.items()},
            )  # fmt: skip
            return SwitchSelection(*(x.view(positions.shape) for x in chosen))

        if self.slots.state is None:
            tau = policy.threshold(None, sampling.seed, ids, positions)
            return without_comparison(select(tau), policy.settled(None, positions)), tau
        # The threshold depends on earlier divergences: measure all, then go through them in order.
        by_teacher = select(-float("inf"))
        if known["teacher"] is None:
            known["teacher"] = by_teacher.token
        by_student = select(float("inf"))
        state, taus, settled = self.slots.working_state(), [], []
        standing = torch.ones_like(self.slots.last, dtype=torch.bool)
        for i in range(positions.shape[1]):
            settled.append(policy.settled(state, positions[:, i]))
            taus.append(policy.threshold(state, sampling.seed, ids[:, i], positions[:, i]))
            d = by_student.divergence[:, i]
            teacher_writes = d > taus[-1].to(d.dtype)
            token = torch.where(teacher_writes, by_teacher.token[:, i], by_student.token[:, i])
            policy.observe(state, taus[-1], d, rows=standing)
            standing = standing & (token == draft[:, i])
        tau = torch.stack(taus, 1)
        writes = by_student.divergence > tau.to(by_student.divergence.dtype)
        chosen = SwitchSelection(
            *(torch.where(writes, x, y) for x, y in zip(by_teacher, by_student, strict=True))
        )
        return without_comparison(chosen, torch.stack(settled, 1)), tau

    def locate(self, error: InvalidLogits) -> None:
        """Tell the prompt, and in the message the token, where a row of logits was invalid."""
        slot, position = self.asked(error.row)
        where = int(position), int(self.slots.sequence[slot])
        error.row = int(self.slots.job[slot])
        error.args = (f"token {where[0]} of sequence {where[1]}: {error}",)

    def write(self, drafter: str, k: int, only: str | None, positions: Tensor):
        """(draft, SwitchSelection, thresholds, teacher's hidden states) of k positions a row.

        only: the one model that writes, with the other as a drafter at most.
        """
        logits, hidden = {}, {}
        if drafter == "history":
            draft = self.history[self.slots.job[:, None], positions]
        elif k == 1 and only is None:  # the naive step: nothing follows from a draft, so none
            draft = torch.full_like(positions, -1)
        else:
            draft, logits[drafter], hidden[drafter] = self.draft(drafter, k)
        for role in ROLES if only is None else (only,):
            if role not in logits:
                logits[role], hidden[role] = self.verify(role, draft)
                if len(logits) == 1 and self.graphs.enabled:  # the next call reuses the memory
                    kept = (empty_rows(x, *x.shape).copy_(x) for x in (logits[role], hidden[role]))
                    logits[role], hidden[role] = kept
        self.asked = lambda row: (row // k, positions[row // k, row % k])
        ids = self.slots.sequence[:, None].expand(positions.shape)
        with self.engine.timed("decide", k):
            if only is None:
                drafter = "history" if k == 1 else drafter  # neither model's token is known
                chosen, tau = self.decide(drafter, draft, logits, positions, ids)
            else:
                token = draft
                if drafter != only:
                    token = self.draw(only, logits[only], positions, ids)
                chosen = written_by(only, token, logits[only], self.vocab_size)
                side = -math.inf if only == "teacher" else math.inf
                tau = torch.full_like(positions, side, dtype=torch.float64)
        return draft, chosen, tau, hidden.get("teacher")

    def round(self, limit: int) -> list[int]:
        """One round of at most `limit` tokens for the rows at work; the slots that are finished."""
        slots, place, n = self.slots, self.slots.mean_position(), self.slots.n
        only = "teacher" if all(slots.settled[:n]) else None
        if "teacher" not in self.models:
            only, drafter, k = "student", "student", 1
        else:
            drafter, k = self.planner.choose(
                place, limit, settled=only is not None, student_follows=all(slots.follows[:n]),
                along=None if self.history is None else sum(slots.along[:n]) / n,
            )  # fmt: skip
        self.round_cost = self.planner.round_cost(drafter, k, ROLES if only is None else (only,))
        positions = (slots.length - slots.prompt)[:, None] + torch.arange(k, device=slots.device)
        draft, chosen, tau, hidden = self.write(drafter, k, only, positions)

        # A row gains tokens up to the first that was not drafted, ends the response or is its last.
        right = (chosen.token == draft).long().cumprod(1)
        ends = torch.isin(chosen.token, self.eos) | (positions + 1 >= self.max_new_tokens)
        gained = 1 + (right * ~ends)[:, : k - 1].cumprod(1).sum(1)
        last = (gained - 1)[:, None]
        values = {**chosen._asdict(), "threshold": tau}
        if self.keep_hidden and hidden is not None:
            values["hidden"] = hidden
        self.record.write(slots.job, positions, gained, values)
        kept = torch.arange(k, device=slots.device) < gained[:, None]
        looks = {
            "gained": gained,
            "finished": ends.gather(1, last)[:, 0],
            "right": right.sum(1),
            # A kernel flags such a token and does not raise: its place in the block, or k.
            "undefined": ((chosen.token >= 0) | ~kept).long().cumprod(1).sum(1),
            "teacher": (chosen.from_teacher & kept).sum(1),
            "settled": self.policy.settled(slots.working_state(), slots.last),
        }
        if self.history is not None:
            strays = self.history[slots.job[:, None], positions] != chosen.token
            looks["strays"] = (strays & kept).any(1)
        slots.accept(chosen.token, gained)
        return self.settle(looks, drafter, k, only, place)

    def settle(self, looks: dict, drafter: str, k: int, only: str | None, place: float):
        """Take note of a round on the host: the slots that are finished."""
        slots = self.slots
        # the one look of a round at the device
        rows = torch.stack([x.long() for x in looks.values()]).tolist()
        host = dict(zip(looks, rows, strict=True))
        for slot, place_in_block in enumerate(host["undefined"]):
            if place_in_block < k:
                text = "logits: expected finite or -inf, got no distribution"
                raise InvalidLogits(text, None, slot * k + place_in_block)
        seen = [r for r, on in zip(host["right"], slots.along, strict=False)
                if on or drafter != "history"]  # fmt: skip
        if drafter != only and (k > 1 or drafter == "history"):
            self.planner.saw(drafter, place, sum(seen), sum(min(r + 1, k) for r in seen))
        self.planner.wrote(place, sum(host["teacher"]), sum(host["gained"]))
        for slot, gained in enumerate(host["gained"]):
            slots.lengths[slot] += gained
            slots.settled[slot] = bool(host["settled"][slot])
            slots.follows[slot] &= only != "teacher" or drafter == "student"
            slots.along[slot] &= not host.get("strays", [1] * slots.n)[slot]
        return [slot for slot, done in enumerate(host["finished"]) if done]


@torch.no_grad()
@decoding
def rollout(
    teacher: nn.Module | None,
    student: nn.Module,
    prompts: Sequence[Sequence[int]],
    policy: Policy | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    vocab_size: int | None = None,
    sampling: Sampling | None = None,
    sequence_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    block: int | None = None,
    drafter: str | None = None,
    costs: dict[str, float] | None = None,
    keep_hidden: bool = False,
    history: Sequence[Sequence[int] | None] | None = None,
    engine: Engine | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Write one completion per prompt; the tokens and records are those of `rollout_naive`.

    prompts: any number of lists of token ids, any lengths, none empty. batch_size: rows at work at
    once (default: all prompts; fewer if their caches do not fit into memory); rows that are
    finished make room for the next prompts.
    block, drafter, costs: as in `Engine`; or engine: one to go on with, for these two models.
    keep_hidden: return the teacher's last hidden states that predicted the tokens, (all response
    tokens, H), row by row. history: an earlier completion of each prompt, or None, to be tried as a
    draft.
    The other arguments, and errors, as in `rollout_naive`, though a draft whose logits are invalid
    is an error even where it would not have been written; on_step(tokens, prompts that are not
    finished) is called after every round. Raises ValueError for layers that a row
    cache cannot serve, and where not one row fits into memory. Threads decode one by one.
    """
    policy, sampling = policy or Student(), sampling or Sampling()
    check_models(teacher, policy, sampling)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if history is not None and len(history) != len(prompts):
        raise ValueError(f"history: got {len(history)}, expected one for each of {len(prompts)}")
    check_request(prompts, max_new_tokens, sequence_ids)
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    if engine is None:
        engine = Engine(teacher, student, block=block, drafter=drafter, costs=costs)
    elif engine.given != models:
        raise ValueError("engine: got one of other models, expected this teacher and student")
    elif (block, drafter, costs) != (None, None, None):
        raise ValueError("got an engine and block, drafter or costs, which are the engine's own")
    longest, drafted = max(map(len, prompts)), max(engine.planner.blocks)
    for model in engine.given.values():
        check_lengths(model, prompts, max_new_tokens)
        check_positions(model, longest + max_new_tokens + (0 if teacher is None else drafted))
        model.eval()
    start, device = time.perf_counter(), student.device
    capacity = capacity_for(longest, max_new_tokens, drafted)
    count = engine.prepare(min(batch_size or len(prompts), len(prompts)), capacity)
    text = engine.capacity + 1 if sampling.no_repeat_ngram else 0
    slots = Slots(engine.slots, policy, device, text)
    record = Record(len(prompts), max_new_tokens, pad_token_id, device)
    earlier = [list(tokens or ())[:max_new_tokens] for tokens in history or ()]
    decoder = _Decoder(
        engine, slots, record, pad_history(earlier, capacity, device),
        sampling=sampling, vocab_size=vocab_size,
        eos=torch.as_tensor(list(eos_token_ids), dtype=torch.int64, device=device),
        max_new_tokens=max_new_tokens, keep_hidden=keep_hidden,
    )  # fmt: skip
    ids = range(len(prompts)) if sequence_ids is None else sequence_ids
    queue, left, written, free = Queue(len(prompts), count), len(prompts), 0, []
    while left:
        begun = time.perf_counter()
        # Prompts into free slots, then no gap: the last rows move where none is put.
        free += range(slots.n, count)
        jobs = queue.take(free, decoder.round_cost, engine.planner.prefill_cost())
        for slot, job in jobs:
            slots.put(slot, job, int(ids[job]), prompts[job], bool(earlier and earlier[job]))
        if jobs:
            decoder.prefill([slot for slot, _ in jobs], [prompts[job] for _, job in jobs])
        gaps = (slot for slot in free[len(jobs) :] if slot < slots.n)
        for slot in sorted(gaps, reverse=True):
            source = slots.free(slot)
            if source is not None:
                for model in engine.models.values():
                    model.cache.move(source, slot, slots.lengths[slot])
        before = sum(slots.lengths[: slots.n])
        try:
            free = decoder.round(max_new_tokens - slots.least_position())
        except InvalidLogits as error:
            decoder.locate(error)
            engine.release()  # NaN in a cache stays: it is multiplied by a weight of 0, and kept
            raise
        engine.tell(begun)
        left -= len(free)
        written += sum(slots.lengths[: slots.n]) - before
        if on_step is not None:
            on_step(written, left)
    return record.rollout(time.perf_counter() - start)
