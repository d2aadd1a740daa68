"""What teacher and student must share to write one text: tokens, and where a response ends."""

from __future__ import annotations

from dataclasses import dataclass

from switchkd.models import count_parameters, head_of
from switchkd.templates import Template, same_template


@dataclass(frozen=True)
class Vocabulary:
    """What teacher and student share: the real vocabulary, the ids that end a response."""

    size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    notes: tuple[str, ...] = ()


def _eos_ids(model, tokenizer) -> set[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return {tokenizer.eos_token_id, Template(tokenizer).turn_end, *ids}


def check_tables(teacher_tokenizer, tokenizer) -> None:
    """Raise ValueError with the first token that has not the same id for both models."""
    theirs, table = teacher_tokenizer.get_vocab(), tokenizer.get_vocab()
    if theirs != table:
        token = min(
            (t for t in {*theirs, *table} if theirs.get(t) != table.get(t)),
            key=lambda t: theirs.get(t, table.get(t)),
        )
        raise ValueError(
            "teacher and student do not share a tokenizer: "
            f"token {token!r} has id {theirs.get(token)} for the teacher and "
            f"{table.get(token)} for the student; token-level divergences need equal ids"
        )


def share_vocabulary(teacher, student, teacher_tokenizer, tokenizer) -> Vocabulary:
    """Check that both models read the same ids; report what differs short of that.

    A larger padded matrix on one side (Qwen2.5: 151936 and 152064 rows) is fine, ids are compared,
    not widths. Different token tables raise ValueError with the first difference. teacher may be
    None (supervised fine-tuning).
    """
    notes, size = [], max(tokenizer.get_vocab().values()) + 1
    eos = _eos_ids(student, tokenizer)
    if teacher is not None:
        check_tables(teacher_tokenizer, tokenizer)
        teacher_eos = _eos_ids(teacher, teacher_tokenizer)
        if teacher_eos != eos:
            notes.append(
                f"EOS differs: teacher {sorted(teacher_eos)}, student {sorted(eos)}; "
                "any of them ends a response"
            )
            eos |= teacher_eos
        if not same_template(teacher_tokenizer, tokenizer):
            notes.append("chat templates differ: the student's, or none, is used for both models")
        theirs, ours = (x("It is so.")["input_ids"] for x in (teacher_tokenizer, tokenizer))
        if theirs != ours:
            notes.append(
                f"tokens of a text differ: teacher {theirs}, student {ours}, used for both"
            )
        if count_parameters(teacher) < count_parameters(student):
            notes.append(
                f"the teacher ({count_parameters(teacher):,} parameters) is smaller than the "
                f"student ({count_parameters(student):,}): allowed, but is it what you meant?"
            )
    for role, model in (("teacher", teacher), ("student", student)):
        if model is None:
            continue
        rows = head_of(model).weight.shape[0]
        if rows < size:
            raise ValueError(f"{role}: got a head of {rows} rows, expected at least {size} tokens")
        if rows > size:
            notes.append(f"{role}: {rows - size} padded vocabulary rows are left out")
    return Vocabulary(size, tuple(sorted(eos)), tokenizer.pad_token_id, tuple(notes))
