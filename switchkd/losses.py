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

from switchkd.models import decoder_of, head_of


def collate(prompts: Sequence[list[int]], completions: Sequence[list[int]], pad: int) -> dict:
    """Right-padded batch: input_ids, attention_mask, and completion_mask (1 on response tokens)."""
    joined = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, joined))
    slots = torch.arange(width)
    ends = torch.tensor([len(row) for row in joined])[:, None]
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in joined]),
        "attention_mask": (slots < ends).long(),
        "completion_mask": (slots >= starts) & (slots < ends),
    }


def response_hidden(model: nn.Module, decoder: nn.Module, batch: dict) -> Tensor:
    """Hidden states (N, H) that predict the N response tokens of the batch.

    `model` may be wrapped (DDP, PEFT): it is called as a whole, so that its hooks run, with the
    output head kept to one position; the states are taken where its decoder returns them.
    """
    seen = []
    hook = decoder.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    try:
        model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        hook.remove()
    # Position i predicts token i + 1: the first response token is predicted by the prompt's last.
    return seen[0][:, :-1][batch["completion_mask"][:, 1:]]


def response_labels(batch: dict) -> Tensor:
    """The N response tokens, in the order of `response_hidden`."""
    return batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:]]


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
    reduction: str = "sum",
) -> Tensor:
    """Divergence (or cross-entropy) of a batch over its response tokens, in nats.

    model: the student as the trainer wraps it; student: the same, unwrapped.
    """
    head = head_of(student)
    hidden = response_hidden(model, decoder_of(student), batch)
    options = dict(
        student_bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        vocab_size=vocab_size,
        reduction=reduction,
    )
    if kind == "cross_entropy":
        return linear_divergence_loss(
            None, None, hidden, head.weight, kind=kind, labels=response_labels(batch), **options
        )
    with torch.no_grad():
        teacher_head = head_of(teacher)
        teacher_hidden = response_hidden(teacher, decoder_of(teacher), batch)
    if (teacher_head.logit_scale, teacher_head.softcap) != (head.logit_scale, head.softcap):
        raise ValueError(
            f"teacher and student scale their logits differently: got {teacher_head.logit_scale}, "
            f"{teacher_head.softcap} and {head.logit_scale}, {head.softcap}; expected equal ones"
        )
    return linear_divergence_loss(
        teacher_hidden,
        teacher_head.weight,
        hidden,
        head.weight,
        kind=kind,
        alpha=alpha,
        beta=beta,
        detach_mixture=detach_mixture,
        teacher_bias=teacher_head.bias,
        **options,
    )
