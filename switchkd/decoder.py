"""The block decoder: the tokens of `rollout_naive`, with fewer forward passes.

A round, for all rows at once:

    1. draft    one model, the drafter, writes k tokens, one pass each
    2. verify   the other scores those k positions in one pass
    3. decide   one kernel call over the k rows of each: who writes, and what
    4. accept   the tokens up to and including the first that is not the draft; roll both back

The decision at t depends on the prefix alone, so a token stands if all before it were drafted
right. Both models share one Gumbel field, a token is a function of (p_t, q_t, seed, sequence, t),
which is why a draft is often right even where the other model writes. Which model drafts, and how
many tokens, changes the cost, never the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from switchkd_kernels import InvalidLogits, sample, switch_select
from switchkd_kernels.reference import STREAM_REDRAW, STREAM_TOKEN, SwitchSelection
from torch import Tensor, nn

from switchkd.cache import CachedModel
from switchkd.planner import Planner
from switchkd.policies import Policy, Student
from switchkd.rollout import Rollout, Sampling, check_lengths

OTHER = {"teacher": "student", "student": "teacher"}


class _Record:
    """What was written for P prompts, and the teacher's hidden states that predicted it."""

    def __init__(self, prompts: int, width: int, pad: int, device: torch.device):
        # One column more than a row can need: where what was drafted in vain is put.
        nan = torch.full((prompts, width + 1), float("nan"), device=device)
        self.width, self.hidden = width, None
        self.lengths = torch.zeros(prompts, dtype=torch.int64, device=device)
        self.columns = {
            "token": torch.full((prompts, width + 1), pad, device=device),
            "from_teacher": torch.zeros_like(nan, dtype=torch.bool),
        }
        self.nan = nan

    def write(self, job: Tensor, positions: Tensor, gained: Tensor, values: dict) -> None:
        """values: name to (n, k) or (n, k, H), at the response positions (n, k) of n prompts."""
        place = torch.arange(positions.shape[1], device=positions.device)
        column = torch.where(place < gained[:, None], positions, self.width)
        for name, value in values.items():
            if name not in self.columns:
                shape = (*self.nan.shape, *value.shape[2:])
                self.columns[name] = value.new_full(shape, float("nan"))
            self.columns[name][job[:, None], column] = value
        self.lengths.index_add_(0, job, gained)

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
        )


class _Slots:
    """What is in each row of the batch; rows 0 .. n - 1 are at work."""

    def __init__(self, count: int, policy: Policy, device: torch.device):
        self.n, self.policy, self.device = 0, policy, device
        names = ("job", "sequence", "last", "length", "prompt")  # length: of both caches
        self.columns = {x: torch.zeros(count, dtype=torch.int64, device=device) for x in names}
        self.state = policy.start(count, device)
        self.lengths, self.prompts = [0] * count, [0] * count  # two of them on the host

    def __getattr__(self, name: str) -> Tensor:
        return self.columns[name][: self.n]

    def working_state(self):
        return self.state and {name: value[: self.n] for name, value in self.state.items()}

    def put(self, slot: int, job: int, sequence: int, prompt: Sequence[int]) -> None:
        """The last token of a prompt is not in the caches: the first draft follows from it."""
        cached = len(prompt) - 1
        for column, value in zip(
            self.columns.values(), (job, sequence, prompt[-1], cached, cached), strict=True
        ):
            column[slot] = value
        self.lengths[slot] = self.prompts[slot] = cached
        for name, fresh in (self.policy.start(1, self.device) or {}).items():
            self.state[name][slot] = fresh[0]

    def move(self, source: int, target: int) -> None:
        for column in (*self.columns.values(), *(self.state or {}).values()):
            column[target] = column[source]
        for column in (self.lengths, self.prompts):
            column[target] = column[source]

    def reach(self, more: int) -> int:
        return max(self.lengths[: self.n]) + more

    def least_position(self) -> int:
        written = zip(self.lengths[: self.n], self.prompts[: self.n], strict=True)
        return min(length - prompt for length, prompt in written)

    def mean_position(self) -> float:
        return (sum(self.lengths[: self.n]) - sum(self.prompts[: self.n])) / self.n


class _Decoder:
    """One round after another over the slots."""

    def __init__(self, models: dict[str, CachedModel], slots, record, planner, **options):
        self.models, self.slots, self.record, self.planner = models, slots, record, planner
        self.policy, self.sampling = options["policy"], options["sampling"]
        self.vocab_size, self.eos = options["vocab_size"], options["eos"]
        self.max_new_tokens, self.keep_hidden = options["max_new_tokens"], options["keep_hidden"]

    def prefill(self, slots: list[int], prompts: list[Sequence[int]]) -> None:
        """Feed all but the last token of each prompt, padded on the right."""
        longest = max(map(len, prompts)) - 1
        if longest == 0:
            return
        rows = [list(p[:-1]) + [0] * (longest + 1 - len(p)) for p in prompts]
        device = self.slots.device
        tokens, where = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        for model in self.models.values():
            model.feed(tokens, torch.zeros_like(where), longest, rows=where)

    def draft(self, role: str, count: int):
        """`count` tokens (n, k) of one model, its logits (n, k, V) and hidden states (n, k, H)."""
        slots, model = self.slots, self.models[role]
        reach = slots.reach(count)
        token, drafted = slots.last, []
        for i in range(count):
            start = time.perf_counter()
            hidden = model.feed(token[:, None], slots.length + i, reach)
            logits = model.logits(hidden)[:, 0]
            # A guess may come from anywhere; SKD's teacher guesses what the student would write.
            token = self.draw(role, logits, slots.length - slots.prompt + i, STREAM_TOKEN)
            self.planner.took(role, 1, time.perf_counter() - start)
            drafted.append((token, logits, hidden[:, 0]))
        return tuple(torch.stack(column, 1) for column in zip(*drafted, strict=True))

    def verify(self, role: str, tokens: Tensor):
        """Logits (n, k, V) and hidden states (n, k, H) of one model after each of (n, k) tokens."""
        slots, model = self.slots, self.models[role]
        reach = slots.reach(tokens.shape[1])
        start = time.perf_counter()
        hidden = model.feed(tokens, slots.length, reach)
        logits = model.logits(hidden)
        self.planner.took(role, tokens.shape[1], time.perf_counter() - start)
        return logits, hidden

    def draw(self, role: str, logits: Tensor, positions: Tensor, stream: int) -> Tensor:
        warp = self.sampling
        ids = self.slots.sequence.view(-1, *[1] * (positions.dim() - 1)).expand(positions.shape)
        self.asked = positions
        token = sample(
            logits.flatten(0, -2), temperature=getattr(self.sampling, f"{role}_temperature"),
            top_k=warp.top_k, top_p=warp.top_p, min_p=warp.min_p,
            seed=warp.seed, sequence_ids=ids.reshape(-1), positions=positions.reshape(-1),
            stream=stream, model=role, vocab_size=self.vocab_size,
        )  # fmt: skip
        return token.view(positions.shape)

    def decide(self, drafter: str, draft: Tensor, logits: dict[str, Tensor], positions: Tensor):
        """SwitchSelection and thresholds of the drafted positions, all (n, k)."""
        policy, sampling = self.policy, self.sampling
        ids = self.slots.sequence[:, None].expand(positions.shape)
        self.asked = positions
        redraw = STREAM_REDRAW if policy.metric == "rank" else STREAM_TOKEN
        known = {"teacher": None, "student": None}
        if drafter == "student" or redraw == STREAM_TOKEN:
            known[drafter] = draft
        for role in known:
            if known[role] is None and sampling.filtered:
                stream = redraw if role == "teacher" else STREAM_TOKEN
                known[role] = self.draw(role, logits[role], positions, stream)
        keys = dict(sequence_ids=ids.reshape(-1), positions=positions.reshape(-1))

        def select(threshold, **tokens) -> SwitchSelection:
            chosen = switch_select(
                logits["teacher"].flatten(0, 1), logits["student"].flatten(0, 1),
                threshold if isinstance(threshold, float) else threshold.reshape(-1),
                metric=policy.metric, seed=sampling.seed, vocab_size=self.vocab_size,
                teacher_temperature=sampling.teacher_temperature,
                student_temperature=sampling.student_temperature, **keys,
                **{f"{role}_token": x if x is None else x.reshape(-1)
                   for role, x in (known | tokens).items()},
            )  # fmt: skip
            return SwitchSelection(*(x.view(positions.shape) for x in chosen))

        if self.slots.state is None:
            tau = policy.threshold(None, sampling.seed, ids, positions)
            return select(tau), tau
        # The threshold depends on earlier divergences: measure all, then go through them in order.
        other = "teacher" if drafter == "student" else "student"
        probe = select(-float("inf") if other == "teacher" else float("inf"))
        known[other] = probe.token if known[other] is None else known[other]
        measured = probe.divergence
        state, taus = self.slots.working_state(), []
        standing = torch.ones_like(self.slots.last, dtype=torch.bool)
        for i in range(positions.shape[1]):
            taus.append(policy.threshold(state, sampling.seed, ids[:, i], positions[:, i]))
            d = measured[:, i]
            teacher_writes = d > taus[-1].to(d.dtype)
            token = torch.where(teacher_writes, known["teacher"][:, i], known["student"][:, i])
            policy.observe(state, taus[-1], d, rows=standing)
            standing = standing & (token == draft[:, i])
        tau = torch.stack(taus, 1)
        return select(tau), tau

    def locate(self, error: InvalidLogits) -> None:
        """Tell the prompt, and in the message the token, where a row of logits was invalid."""
        slot = error.row // (self.asked.numel() // self.slots.n)
        where = int(self.asked.reshape(-1)[error.row]), int(self.slots.sequence[slot])
        error.row = int(self.slots.job[slot])
        error.args = (f"token {where[0]} of sequence {where[1]}: {error}",)

    def alone(self, logits: Tensor, token: Tensor):
        """What `decide` returns where there is no teacher."""
        log_q = logits[..., : self.vocab_size].float().log_softmax(-1)
        nothing = torch.full_like(log_q[..., 0], float("nan"))
        chosen = SwitchSelection(
            token, torch.zeros_like(token, dtype=torch.bool), nothing, nothing,
            log_q.gather(-1, token[..., None])[..., 0],
        )  # fmt: skip
        return chosen, torch.full_like(nothing, float("inf"), dtype=torch.float64)

    def round(self, limit: int) -> list[int]:
        """One round of at most `limit` tokens for the rows at work; the slots that are finished."""
        slots, place = self.slots, self.slots.mean_position()
        alone = "teacher" not in self.models
        drafter, k = ("student", 1) if alone else self.planner.choose(place, limit)
        draft, logits, hidden = self.draft(drafter, k)
        positions = (slots.length - slots.prompt)[:, None] + torch.arange(k, device=slots.device)
        if alone:
            chosen, tau = self.alone(logits, draft)
        else:
            fed = torch.cat([slots.last[:, None], draft[:, :-1]], 1)
            other_logits, other_hidden = self.verify(OTHER[drafter], fed)
            hidden = hidden if drafter == "teacher" else other_hidden
            start = time.perf_counter()
            both = {drafter: logits, OTHER[drafter]: other_logits}
            chosen, tau = self.decide(drafter, draft, both, positions)
            self.planner.took("decide", k, time.perf_counter() - start)

        # A row gains tokens up to the first that was not drafted, ends the response or is its last.
        right = (chosen.token == draft).long().cumprod(1)
        ends = torch.isin(chosen.token, self.eos) | (positions + 1 >= self.max_new_tokens)
        gained = 1 + (right * ~ends)[:, : k - 1].cumprod(1).sum(1)
        last = (gained - 1)[:, None]
        values = {**chosen._asdict(), "threshold": tau}
        if self.keep_hidden and not alone:
            values["hidden"] = hidden
        self.record.write(slots.job, positions, gained, values)
        finished = ends.gather(1, last)[:, 0]
        slots.last.copy_(chosen.token.gather(1, last)[:, 0])
        slots.length.add_(gained)

        kept = torch.arange(k, device=slots.device) < gained[:, None]
        undefined = ((chosen.token < 0) & kept).any(1)  # a kernel's flag: it does not raise
        # the one look of a round at the device
        host = torch.stack([gained, finished.long(), right.sum(1), undefined.long()]).tolist()
        if any(host[3]):
            row = host[3].index(1) * k
            raise InvalidLogits("logits: expected finite or -inf, got no distribution", None, row)
        self.planner.saw(drafter, place, sum(host[2]), sum(min(r + 1, k) for r in host[2]))
        for slot, count in enumerate(host[0]):
            slots.lengths[slot] += count
        return [slot for slot, done in enumerate(host[1]) if done]


@torch.no_grad()
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
    on_step: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Write one completion per prompt; the tokens and records are those of `rollout_naive`.

    prompts: any number of lists of token ids, any lengths, none empty. batch_size: rows at work at
    once (default: all prompts); a row that is finished makes room for the next prompt at once.
    block, drafter: how many tokens are drafted a round, by "student" or "teacher"; None: what is
    fastest by measured times and acceptance, or by the relative `costs` of a pass of either.
    keep_hidden: return the teacher's last hidden states that predicted the tokens, (all response
    tokens, H), row by row.
    The other arguments, and errors, as in `rollout_naive`; on_step(tokens, prompts that are not
    finished) is called after every round. Raises ValueError for architectures with sliding windows.
    """
    policy, sampling = policy or Student(), sampling or Sampling()
    if teacher is None and policy.needs_teacher:
        raise ValueError(f"policy {type(policy).__name__} needs a teacher, got None")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    given = {"teacher": teacher, "student": student}
    given = {role: model for role, model in given.items() if model is not None}
    for model in given.values():
        check_lengths(model, prompts, max_new_tokens)
        model.eval()
    start, device = time.perf_counter(), student.device
    planner = Planner(block, drafter, costs, device.type)
    count = min(batch_size or len(prompts), len(prompts))
    # A block may be drafted past the end of a response, never past its place in the cache.
    capacity = max(map(len, prompts)) + max_new_tokens + max(planner.blocks)
    models = {role: CachedModel(model, count, capacity) for role, model in given.items()}
    slots = _Slots(count, policy, device)
    record = _Record(len(prompts), max_new_tokens, pad_token_id, device)
    decoder = _Decoder(
        models, slots, record, planner, policy=policy, sampling=sampling, vocab_size=vocab_size,
        eos=torch.as_tensor(list(eos_token_ids), dtype=torch.int64, device=device),
        max_new_tokens=max_new_tokens, keep_hidden=keep_hidden,
    )  # fmt: skip
    ids = range(len(prompts)) if sequence_ids is None else sequence_ids
    waiting, written = iter(range(len(prompts))), 0
    free, slots.n = list(range(count)), count
    left = len(prompts)
    while left:
        # Prompts into free slots, then no gap: the last rows move where no prompt is left.
        jobs = list(zip(free, waiting, strict=False))
        for slot, job in jobs:
            slots.put(slot, job, int(ids[job]), prompts[job])
        if jobs:
            decoder.prefill([slot for slot, _ in jobs], [prompts[job] for _, job in jobs])
        for slot in sorted(free[len(jobs) :], reverse=True):
            slots.n -= 1
            if slot != slots.n:
                for model in models.values():
                    model.cache.move(slots.n, slot, slots.lengths[slots.n])
                slots.move(slots.n, slot)
        before = sum(slots.lengths[: slots.n])
        try:
            free = decoder.round(max_new_tokens - slots.least_position())
        except InvalidLogits as error:
            decoder.locate(error)
            raise
        left -= len(free)
        written += sum(slots.lengths[: slots.n]) - before
        if on_step is not None:
            on_step(written, left)
    return record.rollout(time.perf_counter() - start)
