"""Arguments of the ops that draw, checked for every implementation alike: in the order in which
their launchers take them, one id, position and threshold a row."""

from torch import Tensor

from switchkd_kernels import _checks as check
from switchkd_kernels.noise import STREAM_TOKEN


def selection(
    teacher_logits: Tensor,
    student_logits: Tensor,
    threshold,
    *,
    seed: int,
    sequence_ids,
    positions,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    metric: str = "jsd",
    base: int | str = 2,
    teacher_token=None,
    student_token=None,
    vocab_size: int | None = None,
) -> tuple:
    """Of switch_select."""
    pair = {"teacher_logits": teacher_logits, "student_logits": student_logits}
    size = check.logits(vocab_size, rows=True, **pair)
    check.one_of("metric", metric, ("jsd", "kl", "rank"))
    check.one_of("base", base, (2, "e"))
    rows, device = teacher_logits.shape[0], teacher_logits.device
    dtype = check.compute_dtype(*pair.values())
    tokens = [
        None if token is None else check.per_row(name, token, rows, device, limit=size)
        for name, token in (("teacher_token", teacher_token), ("student_token", student_token))
    ]
    return (
        *(check.unit_stride(z.detach()) for z in pair.values()),
        check.per_row("threshold", threshold, rows, device, dtype=dtype),
        check.per_row("sequence_ids", sequence_ids, rows, device, limit=2**56),
        check.per_row("positions", positions, rows, device, limit=2**32),
        *tokens,
        check.signed(check.seed(seed)),
        check.temperature("teacher_temperature", teacher_temperature),
        check.temperature("student_temperature", student_temperature),
        metric, base == 2, size,
    )  # fmt: skip


def sampling(
    logits: Tensor,
    *,
    seed: int,
    sequence_ids,
    positions,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
    stream: int = STREAM_TOKEN,
    model: str = "student",
) -> tuple:
    """Of sample."""
    size = check.logits(vocab_size, rows=True, logits=logits)
    rows, device = logits.shape[0], logits.device
    return (
        check.unit_stride(logits.detach()),
        check.per_row("sequence_ids", sequence_ids, rows, device, limit=2**56),
        check.per_row("positions", positions, rows, device, limit=2**32),
        check.signed(check.seed(seed)),
        check.temperature("temperature", temperature),
        check.integer("top_k", top_k, 0, 2**63 - 1),
        check.number("top_p", top_p, 0, 1, "(]"),
        check.number("min_p", min_p, 0, 1),
        size, check.integer("stream", stream, 0, 255), model,
    )  # fmt: skip
