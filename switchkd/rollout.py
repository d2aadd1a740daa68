"""The naive rollout: both models, one token at a time, each with its own KV cache.

It is the baseline of every benchmark and the oracle of the block decoder. One step:
eager softmax of both rows -> divergence -> compare with the threshold -> select.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from switchkd_kernels import InvalidLogits
from switchkd_kernels.reference import (  # the definitions: no fused kernel in the naive loop
    STREAM_REDRAW,
    STREAM_TOKEN,
    SwitchSelection,
    sample,
    switch_select,
)
from torch import Tensor

from switchkd.attention import decoding
from switchkd.ngrams import without_repeats
from switchkd.padding import batches
from switchkd.policies import Policy, Student, require
from switchkd.stream import Stream, padding_matters


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Divergences always compare the unwarped distributions at T = 1, because
    a truncated support makes them jump; only the draw is warped. Temperature 0 is greedy.
    no_repeat_ngram: no n-gram of so many tokens twice, for a student without a teacher; 0: off."""

    seed: int = 0
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    no_repeat_ngram: int = 0

    def __post_init__(self):
        for name in ("teacher_temperature", "student_temperature"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("top_k", "no_repeat_ngram"):
            value = getattr(self, name)
            require(value >= 0, name, value, "0 (off) or a positive integer")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "a number in [0, 1)")

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass
class Rollout:
    """Completions of B prompts, at most T tokens each, with the record of every token.

    tokens (B, T) int64, `pad` after each row's end; lengths (B,) int64, EOS counted;
    from_teacher (B, T) bool; divergence, threshold, teacher_logprob, student_logprob (B, T) float,
    NaN after a row's end (divergence of JSD in the policy's base, KL in nats, a rank for SKD;
    log-probabilities in nats at temperature 1). Without a teacher, its columns are NaN, and where
    the teacher writes in any case (`Policy.settled`) divergence and student_logprob are.
    teacher_hidden (sum of lengths, H), if asked for: the teacher's last hidden state that predicted
    each token, row by row. row_rounds: rounds of the block decoder, summed over rows.
    """

    tokens: Tensor
    lengths: Tensor
    from_teacher: Tensor
    divergence: Tensor
    threshold: Tensor
    teacher_logprob: Tensor
    student_logprob: Tensor
    seconds: float = 0.0
    teacher_hidden: Tensor | None = None
    row_rounds: int = 0

    RECORDS = ("from_teacher", "divergence", "threshold", "teacher_logprob", "student_logprob")

    def completions(self) -> list[list[int]]:
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[:length] for row, length in rows]

    def hidden(self) -> list[Tensor | None]:
        """The teacher's states (length, H) of each row, None where they were not kept."""
        if self.teacher_hidden is None:
            return [None] * len(self.lengths)
        return list(self.teacher_hidden.split(self.lengths.tolist()))

    def teacher_tokens(self) -> int:
        return int(self.from_teacher.sum())

    def record(self, row: int) -> dict:
        """One row as JSON values: ids and the per-token record; what is not finite is null."""
        n = int(self.lengths[row])
        columns = {"tokens": self.tokens[row, :n].tolist()}
        columns["from_teacher"] = self.from_teacher[row, :n].int().tolist()
        for name in self.RECORDS[1:]:
            values = getattr(self, name)[row, :n].tolist()
            columns[name] = [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]
        return columns

    @staticmethod
    def join(parts: Sequence[Rollout], order: Sequence[int], pad: int) -> Rollout:
        """Stack rollouts of several batches; row i of the result is row order[i] of the stack."""
        width = max(part.tokens.shape[1] for part in parts)
        fill = {"tokens": pad, "from_teacher": False}
        index = torch.as_tensor(order)

        def stack(name: str) -> Tensor:
            rows = [
                torch.nn.functional.pad(
                    getattr(part, name),
                    (0, width - part.tokens.shape[1]),
                    value=fill.get(name, float("nan")),
                )
                for part in parts
            ]
            return torch.cat(rows)[index]

        columns = {name: stack(name) for name in ("tokens", *Rollout.RECORDS)}
        lengths = torch.cat([part.lengths for part in parts])[index]
        return Rollout(lengths=lengths, seconds=sum(p.seconds for p in parts), **columns)


def without_comparison(chosen: SwitchSelection, settled: Tensor) -> SwitchSelection:
    """The same where the teacher writes anyway: nothing was compared there."""
    nothing = chosen.divergence.new_full((), math.nan)
    return chosen._replace(
        divergence=torch.where(settled, nothing, chosen.divergence),
        student_logprob=torch.where(settled, nothing, chosen.student_logprob),
    )


def written_by(role: str, token: Tensor, logits: Tensor, vocab_size: int | None) -> SwitchSelection:
    """What is recorded of tokens (...) of one model with logits (..., V), the other not asked."""
    z = logits[..., :vocab_size]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    said = z.log_softmax(-1).gather(-1, token.clamp(min=0)[..., None])[..., 0]
    nothing = torch.full_like(said, math.nan)
    teacher = role == "teacher"
    return SwitchSelection(
        token=token,
        from_teacher=torch.full_like(token, teacher, dtype=torch.bool),
        divergence=nothing,
        teacher_logprob=said if teacher else nothing,
        student_logprob=nothing if teacher else said,
    )


def check_models(teacher, policy: Policy, sampling: Sampling) -> None:
    """Refuse a policy or a rule that these models cannot follow."""
    if teacher is None and policy.needs_teacher:
        raise ValueError(f"policy {type(policy).__name__} needs a teacher, got None")
    if teacher is not None and sampling.no_repeat_ngram:
        got = f"no_repeat_ngram: got {sampling.no_repeat_ngram} and a teacher"
        raise ValueError(f"{got}, expected 0, or a student alone")


def check_request(prompts: Sequence, max_new_tokens: int, sequence_ids: Sequence | None) -> None:
    """Refuse what no model could write."""
    if len(prompts) == 0:
        raise ValueError("prompts: got none, expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if sequence_ids is not None and len(sequence_ids) != len(prompts):
        raise ValueError(
            f"sequence_ids: got {len(sequence_ids)}, expected {len(prompts)}, one for each prompt"
        )
    for row, prompt in enumerate(prompts):
        if min(prompt, default=0) < 0:
            raise ValueError(f"prompt {row}: got token {min(prompt)}, expected ids >= 0")


def check_lengths(model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that are empty, or that leave no room for the response in a model, or in one
    of this configuration; and a configuration whose model returns tuples."""
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty, expected at least one token")
    config = getattr(model, "config", model)
    text = config.get_text_config()
    if not (getattr(config, "return_dict", True) and getattr(text, "return_dict", True)):
        name = f"{type(config).__name__}.return_dict"
        raise ValueError(f"{name}: got False, expected True: outputs are read by name")
    limit = getattr(text, "max_position_embeddings", None)
    need = max(map(len, prompts)) + max_new_tokens
    if limit is not None and need > limit:
        raise ValueError(
            f"the longest prompt of {need - max_new_tokens} and a response of {max_new_tokens} "
            f"tokens need {need} positions, expected at most {limit} "
            f"({type(config).__name__}.max_position_embeddings)"
        )


@torch.no_grad()
@decoding
def rollout_naive(
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    policy: Policy | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    vocab_size: int | None = None,
    sampling: Sampling | None = None,
    sequence_ids: Sequence[int] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Write one completion per prompt, token by token, both models on the mixed prefix.

    prompts: B lists of token ids, none empty, of any lengths but for the few models whose text
    changes with padding (`rollout_in_batches` sees to that). policy: who writes (default: student).
    teacher may be None for the student policy. vocab_size: the shared real vocabulary where the
    models pad theirs differently. sequence_ids: B integers that key the noise (default 0..B-1); a
    row's tokens depend on (prompt, seed, sequence id) alone, never on the batch around it.
    on_step(t, rows still running) is called after every token.

    Raises ValueError for prompts that do not fit and InvalidLogits, with the row, for NaN logits.
    Source: SWITCH, arXiv 2410.19503, Algorithm 1.
    """
    policy, sampling = policy or Student(), sampling or Sampling()
    check_models(teacher, policy, sampling)
    check_request(prompts, max_new_tokens, sequence_ids)
    streams = [Stream(model) for model in (teacher, student) if model is not None]
    for stream in streams:
        check_lengths(stream.model, prompts, max_new_tokens)
        stream.model.eval()  # it may be a stand-in that is no module, too

    start = time.perf_counter()
    device = student.device
    rows, longest = len(prompts), max(map(len, prompts))
    ids = torch.as_tensor(range(rows) if sequence_ids is None else sequence_ids, device=device)
    eos = torch.as_tensor(list(eos_token_ids), dtype=torch.int64, device=device)

    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    padded = [[pad_token_id] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(padded, device=device)
    slots = torch.arange(longest + max_new_tokens, device=device)
    mask = (slots >= longest - prompt_lengths[:, None]).long()
    positions = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)
    text = torch.where(mask[:, :longest] > 0, tokens, -1)

    state = policy.start(rows, device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    record = []
    for t in range(max_new_tokens):
        logits = [s.step(tokens, mask[:, : longest + t], positions) for s in streams]
        step = torch.full((rows,), t, device=device)
        settled = policy.settled(state, step)
        chosen, tau = _select(logits, text, policy, state, sampling, ids, step, vocab_size)
        record.append((without_comparison(chosen, settled), tau, running.clone()))
        if teacher is not None:
            policy.observe(state, tau, chosen.divergence)
        running &= ~torch.isin(chosen.token, eos)
        left = int(running.sum())
        if on_step is not None:
            on_step(t, left)
        if left == 0:
            break
        tokens = torch.where(running, chosen.token, pad_token_id)[:, None]
        if sampling.no_repeat_ngram:
            text = torch.cat([text, tokens], 1)
        positions = (prompt_lengths + t)[:, None]

    alive = torch.stack([r[2] for r in record], 1)

    def column(values: list[Tensor], fill) -> Tensor:
        return torch.where(alive, torch.stack(values, 1), fill).cpu()

    return Rollout(
        tokens=column([c.token for c, _, _ in record], pad_token_id),
        lengths=alive.sum(1).cpu(),
        from_teacher=column([c.from_teacher for c, _, _ in record], False),
        divergence=column([c.divergence for c, _, _ in record], float("nan")),
        threshold=column([tau for _, tau, _ in record], float("nan")),
        teacher_logprob=column([c.teacher_logprob for c, _, _ in record], float("nan")),
        student_logprob=column([c.student_logprob for c, _, _ in record], float("nan")),
        seconds=time.perf_counter() - start,
    )


def _select(logits, text, policy, state, sampling, ids, positions, vocab_size):
    """One decision for all rows: (SwitchSelection, threshold)."""
    keys = dict(seed=sampling.seed, sequence_ids=ids, positions=positions)
    warp = dict(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    tau = policy.threshold(state, **keys)
    *teacher_logits, student_logits = logits
    options = dict(vocab_size=vocab_size, **keys)
    try:
        student_token = teacher_token = None
        if sampling.filtered or not teacher_logits:
            allowed = student_logits
            if sampling.no_repeat_ngram:
                end = torch.full_like(ids, text.shape[1])
                allowed = without_repeats(allowed, text, end, sampling.no_repeat_ngram)
            student_token = sample(
                allowed, temperature=sampling.student_temperature, **warp, **options
            )
        if not teacher_logits:
            return written_by("student", student_token, student_logits, vocab_size), tau
        if sampling.filtered:
            stream = STREAM_REDRAW if policy.metric == "rank" else STREAM_TOKEN
            teacher_token = sample(
                teacher_logits[0],
                temperature=sampling.teacher_temperature,
                stream=stream,
                model="teacher",
                **warp,
                **options,
            )
        chosen = switch_select(
            teacher_logits[0],
            student_logits,
            tau,
            metric=policy.metric,
            base=policy.base,
            teacher_temperature=sampling.teacher_temperature,
            student_temperature=sampling.student_temperature,
            teacher_token=teacher_token,
            student_token=student_token,
            **options,
        )
    except InvalidLogits as error:
        where = f"token {int(positions[error.row])} of sequence {int(ids[error.row])}"
        error.args = (f"{where}: {error}",)
        raise
    return chosen, tau


@decoding
def rollout_in_batches(
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    policy: Policy | None = None,
    *,
    batch_size: int,
    sequence_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    on_step: Callable[[int, int], None] | None = None,
    **options,
) -> Rollout:
    """`rollout_naive` over any number of prompts, those of like length together; in their order.

    The row in an InvalidLogits error is that of `prompts`; on_step(t, prompts that are not
    finished) counts them all.
    """
    check_request(prompts, max_new_tokens, sequence_ids)  # a part would count from its own first
    given = [model for model in (teacher, student) if model is not None]
    equal = len(set(map(len, prompts))) > 1 and any(map(padding_matters, given))
    parts, order, waiting = [], [], len(prompts)

    def step(t: int, running: int) -> None:
        if on_step is not None:
            on_step(t, waiting + (running if t + 1 < max_new_tokens else 0))

    for part in batches([len(p) for p in prompts], batch_size, equal):
        order += part
        waiting -= len(part)
        try:
            rollout = rollout_naive(
                teacher,
                student,
                [prompts[i] for i in part],
                policy,
                sequence_ids=[sequence_ids[i] for i in part],
                pad_token_id=pad_token_id,
                max_new_tokens=max_new_tokens,
                on_step=step,
                **options,
            )
        except InvalidLogits as error:
            error.row = part[error.row]
            raise
        parts.append(rollout)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return Rollout.join(parts, inverse, pad_token_id)
