"""The tolerance rule that every kernel is held to, and the rows of logits that strain it."""

import contextlib
import math

import torch
from conftest import DEVICE
from torch.utils import deterministic

# Arguments of `logits` for rows in turn near-equal, with -inf entries, ordinary, far apart.
MIXED = {"spread": (3e-3, 1, 1, 20), "holes": (0, 0.5, 0, 0)}


def logits(rows, V, dtype=torch.float32, spread=1.0, *, holes=0.0, offset=0.0, seed=0):
    """(teacher, student) logits, (rows, V) each on DEVICE: normal, sigma 3 and `spread` apart.

    holes: share of -inf, in either row its own; column 0 stays. offset: added to the teacher, and
    half of it taken from the student. spread, holes and offset: a number, or one a row in turn.
    """
    random = torch.Generator().manual_seed(seed)

    def column(value):
        value = torch.tensor(value, dtype=torch.float64).reshape(-1)
        return value.repeat(rows // len(value) + 1)[:rows, None]

    teacher = 3 * torch.randn(rows, V, generator=random, dtype=torch.float64)
    noise = torch.randn(rows, V, generator=random, dtype=torch.float64)
    student = teacher + column(spread) * noise - column(offset) / 2
    teacher = teacher + column(offset)
    for z in (teacher, student):
        hole = torch.rand(rows, V, generator=random) < column(holes)
        z[:, 1:].masked_fill_(hole[:, 1:], -math.inf)
    return teacher.to(DEVICE, dtype), student.to(DEVICE, dtype)


def check_close(got, reference, truth, *, what, tiny=1e-6, scale=0.0) -> float:
    """Asserts error(got) <= 2 max error(reference) + tiny for every row; returns max error(got).

    An error is relative to `truth`, in float64: of each value (up to one dimension) or, in the L2
    norm, of the last dimension; rows whose norm is below `scale`, a number or one a row, are
    measured against that.
    `reference` is the plain torch op in the dtype of `got`. Infinite or NaN truth must be met.
    """
    if not got.shape == reference.shape == truth.shape:
        raise AssertionError(f"{what}: shapes {got.shape}, {reference.shape}, {truth.shape}")
    if truth.numel() == 0:
        return 0.0
    shape = (-1, truth.shape[-1] if truth.dim() > 1 else 1)
    got, reference, truth = (x.detach().double().reshape(shape) for x in (got, reference, truth))
    finite = truth.isfinite()
    size = truth.masked_fill(~finite, 0.0).norm(dim=-1).clamp(min=scale)
    size = torch.where(size > 0, size, 1.0)

    def errors(x):
        return (x - truth).masked_fill(~finite, 0.0).norm(dim=-1) / size

    error, worst = errors(got), float(errors(reference).max())
    same = finite | (got == truth) | (got.isnan() & truth.isnan())
    error = error.masked_fill(~same.all(-1), math.nan)
    limit = 2 * worst + tiny
    bad = ~(error <= limit)  # NaN, too
    if bool(bad.any()) or not math.isfinite(limit):
        row = int(torch.where(bad, error.nan_to_num(math.inf), -1.0).argmax())
        values = f"got {got[row].tolist()[:4]}, expected {truth[row].tolist()[:4]}"
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {len(bad)} rows err too much, worst row {row}: relative "
            f"error {error[row]:.3g}, limit {limit:.3g} = 2 x {worst:.3g} + {tiny:.3g}; {values}"
        )
    return float(error.max())


def as_stored(x, dtype):
    """What a kernel's store makes of float32 values: nearest, except that Triton's interpreter
    truncates to bfloat16."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        x = (x.float().contiguous().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


@contextlib.contextmanager
def poisoned():
    """torch.empty comes full of NaN, or of the largest integer: what is not written shows."""
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill
