"""From rows to a loss: batches of prompt + completion, hidden states at response positions.

The loss covers every response token, EOS and teacher-written ones included, and nothing else; its
mask is built from lengths. Logits never exist for all positions: hidden states go into
`linear_divergence_loss`, which walks them in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from switchkd_kernels import linear_divergence_loss
from torch import Tensor, nn

from switchkd.data import Row
from switchkd.distributed import hold
from switchkd.models import Head, decoder_of, head_of
from switchkd.padding import by_length

PASSED = ("input_ids", "attention_mask", "completion_mask")  # columns that a forward pass needs
PASS_COST = 32  # of forward and backward on a CPU, in tokens: the weights are read once more


def collate(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad: int,
    hidden: Sequence[Tensor | None] | None = None,
    **columns: Sequence[Tensor],
) -> dict:
    """Right-padded batch: input_ids, attention_mask, and completion_mask (1 on response tokens).

    hidden: of each row the teacher's states (tokens, H) that predicted its completion, where a
    rollout has kept them; then also known_rows (rows,) bool, and known_hidden, those states joined.
    columns: of each row a tensor (tokens,), a value for each response token; joined to (N,) under
    the same name. `distillation_loss` knows from_teacher (bool) and row_weights (float).
    """
    joined = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, joined))
    slots = torch.arange(width)
    ends = torch.tensor([len(row) for row in joined])[:, None]
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    batch = {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in joined]),
        "attention_mask": (slots < ends).long(),
        "completion_mask": (slots >= starts) & (slots < ends),
    }
    kept = [states for states in hidden or () if states is not None]
    if kept:
        batch["known_rows"] = torch.tensor([states is not None for states in hidden])
        batch["known_hidden"] = torch.cat(kept)
    return batch | {name: torch.cat(list(values)) for name, values in columns.items()}


def response_hidden(model: nn.Module, decoder: nn.Module, batch: dict) -> Tensor:
    """Hidden states (N, H) that predict the N response tokens of the batch.

    `model` may be wrapped (DDP, PEFT): it is called as a whole, so that its hooks run, with the
    output head kept to one position; the states are taken where its decoder returns them. One
    process on a CPU takes rows of about equal length together instead of padding all to the longest
    (several processes must call a wrapped model equally often).
    """
    mask, ends = batch["completion_mask"], batch["attention_mask"].sum(1)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if mask.device.type != "cpu" or several:
        return _padded_hidden(model, decoder, batch)
    states = {}
    for rows in by_length(ends.tolist(), PASS_COST):
        width = int(ends[rows[0]])
        part = {name: batch[name][rows, :width] for name in PASSED}
        counts = part["completion_mask"][:, 1:].sum(1).tolist()
        parts = _padded_hidden(model, decoder, part).split(counts)
        states.update(zip(rows, parts, strict=True))
    return torch.cat([states[row] for row in range(len(mask))])


def _padded_hidden(model: nn.Module, decoder: nn.Module, batch: dict) -> Tensor:
    """`response_hidden` in one pass over the batch as it is."""
    seen = []
    hook = decoder.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    try:
        model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            # An index on any device: for the number 1 Gemma 4 cuts its hidden states, too.
            logits_to_keep=torch.full((1,), -1, device=batch["input_ids"].device),
        )
    finally:
        hook.remove()
    # Position i predicts token i + 1: the first response token is predicted by the prompt's last.
    return seen[0][:, :-1][batch["completion_mask"][:, 1:]]


@torch.no_grad()
def teacher_hidden(teacher: nn.Module, batch: dict) -> Tensor:
    """`response_hidden` of the teacher, from a forward pass over those rows only whose states the
    rollout has not kept."""
    known = batch.get("known_rows")
    if known is None:
        return response_hidden(teacher, decoder_of(teacher), batch)
    of_token = known.repeat_interleave(batch["completion_mask"].sum(1))
    hidden = batch["known_hidden"]
    joined = hidden.new_empty(len(of_token), hidden.shape[1])
    joined[of_token] = hidden
    if not known.all():
        rest = {name: batch[name][~known] for name in PASSED}
        joined[~of_token] = response_hidden(teacher, decoder_of(teacher), rest).to(joined.dtype)
    return joined


@torch.no_grad()
def kept_difference(teacher: nn.Module, row: Row, completion: list[int], kept: Tensor) -> float:
    """How far the teacher's states (tokens, H) that a rollout kept are from a fresh forward pass,
    relative to the largest of them."""
    batch = collate([row.prompt_ids], [completion], 0)
    batch = {name: x.to(kept.device) for name, x in batch.items()}
    fresh = response_hidden(teacher, decoder_of(teacher), batch)
    return ((kept - fresh).abs().max() / fresh.abs().max()).item()


def response_labels(batch: dict) -> Tensor:
    """The N response tokens, in the order of `response_hidden`."""
    return batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:]]


def check_scales(teacher: Head, student: Head) -> None:
    """The loss scales and caps the logits of both heads in the same way."""
    if (teacher.logit_scale, teacher.softcap) != (student.logit_scale, student.softcap):
        raise ValueError(
            f"teacher and student scale their logits differently: got {teacher.logit_scale}, "
            f"{teacher.softcap} and {student.logit_scale}, {student.softcap}; expected equal ones"
        )


def distillation_loss(
    teacher: nn.Module | None,
    model: nn.Module,
    student: nn.Module,
    batch: dict,
    *,
    vocab_size: int,
    kind: str,
    alpha: float = 0.1,
    beta: float = 0.5,
    detach_mixture: bool = False,
    contrastive_weight: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Divergence (or cross-entropy) of a batch over its response tokens, in nats.

    model: the student as the trainer wraps it; student: the same, unwrapped. kind: one that
    `linear_divergence_loss` knows, "cross_entropy", or "contrastive_skew": with b =
    contrastive_weight, (2 - b) * skew_kl on the tokens that batch["from_teacher"] marks and
    b * skew_reverse_kl on the others (DistiLLM-2, arXiv 2503.07067).
    batch["row_weights"], if there, multiplies each token's divergence.
    """
    hidden = response_hidden(model, decoder_of(student), batch)
    hold(student.get_output_embeddings(), hidden)
    head = head_of(student)  # after the pass, which gathers it
    options = dict(
        student_bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        vocab_size=vocab_size,
        reduction=reduction,
        row_weights=batch.get("row_weights"),
    )
    if kind == "cross_entropy":
        return linear_divergence_loss(
            None, None, hidden, head.weight, kind=kind, labels=response_labels(batch), **options
        )
    teacher_head = head_of(teacher)
    check_scales(teacher_head, head)
    states = teacher_hidden(teacher, batch)

    def divergence(kind: str, mask: Tensor | None = None, detach: bool = False) -> Tensor:
        return linear_divergence_loss(
            states,
            teacher_head.weight,
            hidden,
            head.weight,
            kind=kind,
            alpha=alpha,
            beta=beta,
            detach_mixture=detach,
            mask=mask,
            teacher_bias=teacher_head.bias,
            **options,
        )

    if kind == "contrastive_skew":
        written, b = batch["from_teacher"], contrastive_weight
        student_part = divergence("skew_reverse_kl", ~written, detach_mixture)
        return (2 - b) * divergence("skew_kl", written) + b * student_part
    return divergence(kind, detach=detach_mixture)
