"""Launchers of the native CPU kernels: arguments as the Triton launchers take them.

The kernels flag a row that defines no distribution; here, where nothing runs asynchronously, the
flag becomes the reference's InvalidLogits, with model and row.
"""

import torch
from torch import Tensor

from switchkd_kernels import _checks as check
from switchkd_kernels.noise import STREAM_REDRAW, STREAM_TOKEN
from switchkd_kernels.rowwise import KINDS

_KIND = {kind: i for i, kind in enumerate((*KINDS, "jsd", "cross_entropy"))}  # as in rowwise.h


def _raise_for(flagged: Tensor, vocab_size: int, **models: Tensor) -> None:
    """InvalidLogits for the first flagged row that is undefined, in the models' order."""
    rows = flagged.nonzero().squeeze(1)
    for model, logits in models.items():
        check.check_rows(model, logits[rows, :vocab_size].amax(-1), rows)


def switch_select(
    teacher, student, threshold, ids, positions, teacher_token, student_token,
    seed, teacher_temperature, student_temperature, metric, bits, vocab_size,
) -> tuple[Tensor, ...]:  # fmt: skip
    token, writer, values = torch.ops.switchkd_native.switch_select(
        teacher, student, threshold, ids, positions, teacher_token, student_token,
        seed, teacher_temperature, student_temperature,
        STREAM_REDRAW if metric == "rank" else STREAM_TOKEN, STREAM_TOKEN, metric, bits, vocab_size,
    )  # fmt: skip
    if len(token) and check.extremes(token)[0] < 0:
        _raise_for(token < 0, vocab_size, teacher=teacher, student=student)
    return token, writer, *values


def sample(
    logits, ids, positions, seed, temperature, top_k, top_p, min_p, vocab_size, stream, model
) -> Tensor:
    token = torch.ops.switchkd_native.sample(
        logits, ids, positions, seed, temperature, top_k, top_p, min_p, vocab_size, stream
    )
    if len(token) and check.extremes(token)[0] < 0:  # z / T may be beyond float32
        _raise_for(token < 0, vocab_size, **{model: logits.float() / (temperature or 1.0)})
    return token


def divergence(
    teacher, student, mask, kind, weight, detach, vocab_size, needs_grad=True, needs_unit=False
) -> tuple[Tensor, Tensor, Tensor | None]:
    loss, saved, unit = torch.ops.switchkd_native.divergence(
        teacher, student, mask, _KIND[kind], weight, detach, vocab_size, needs_grad, needs_unit
    )
    if check.has_nan(loss):
        _raise_for(loss.isnan(), vocab_size, teacher=teacher, student=student)
    return loss, saved, unit if needs_unit else None


def divergence_backward(
    upstream, teacher, student, mask, saved, kind, weight, detach, vocab_size
) -> Tensor:
    return torch.ops.switchkd_native.divergence_backward(
        upstream.to(torch.float32), teacher, student, mask, saved,
        _KIND[kind], weight, detach, vocab_size,
    )  # fmt: skip


def head_chunk(teacher, student, biases, labels, needs_grad, options, rows):
    """(n,) losses of (n, V) products; `student` becomes its gradient. `rows` name it in errors."""
    biases = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
    loss = torch.ops.switchkd_native.head_chunk(
        teacher, student, *biases, labels, _KIND[options.kind], options.weight, options.detach,
        options.vocab_size, options.logit_scale, options.softcap, options.ce_weight, needs_grad,
    )  # fmt: skip
    flagged = loss.isnan()
    if bool(flagged.any()):
        found = flagged.nonzero().squeeze(1)
        models = {"teacher": (teacher, biases[0]), "student": (student, biases[1])}
        for model, (products, bias) in models.items():
            if products is not None:
                z = products[found].float()
                z = (z if bias is None else z + bias) * options.logit_scale
                if options.softcap:
                    z = (z / options.softcap).tanh() * options.softcap
                check.check_rows(model, z.amax(-1), rows[found])
    return loss, student
