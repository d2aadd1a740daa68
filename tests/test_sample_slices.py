"""A row that no filter looks at is drawn by several programs as by one, and as in the reference."""

import pytest
import torch
from conftest import DEVICE
from oracle import poisoned
from switchkd_kernels import _backend as backend
from switchkd_kernels import sample
from switchkd_kernels.noise import gumbel
from test_sample_triton import INF, MODULE, NAN, WARPS, check_agrees, normal, where

PROGRAMS = pytest.mark.parametrize("splits", [2, 4, 128])  # wanted; of 5 blocks 2, 3 and 5


@pytest.fixture
def cut(monkeypatch):
    """Sets the number of programs a row, of blocks of 64; returns the grids of what is launched."""
    kernel, grids = MODULE._sample_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    def cut(splits):
        monkeypatch.setattr(backend, "splits", lambda *_: splits)
        return grids

    monkeypatch.setattr(MODULE, "_sample_kernel", Recorder())
    monkeypatch.setattr(MODULE, "BLOCK", 64)
    with poisoned():
        yield cut


@pytest.mark.parametrize("warp", ["plain", "greedy", "hot"])
@pytest.mark.parametrize(
    ("splits", "slices", "V", "width", "dtype"),
    [  # rows that begin at multiples of 16 bytes, end there too, and neither
        (2, 2, 266, 288, torch.float32),
        (4, 3, 272, 288, torch.bfloat16),
        (128, 5, 266, 269, torch.float32),
    ],
)
def test_tokens_do_not_depend_on_the_number_of_programs(cut, splits, slices, V, width, dtype, warp):
    logits = torch.full((8, width), NAN, dtype=dtype, device=DEVICE)[::2]
    logits[:, :V] = normal(4, V, dtype, sigma=1.0)
    ids, positions = torch.tensor([0, 2**32, 2**33 + 5, 2**56 - 1]), torch.tensor([7, 0, 2**31, 3])
    key = {"seed": 2**63 + 11, "sequence_ids": ids, "positions": positions, "vocab_size": V}
    grids = cut(splits)
    tokens = check_agrees(logits, **key, **WARPS[warp])
    cut(1)
    assert torch.equal(sample(logits, impl="triton", **key, **WARPS[warp]), tokens)
    assert grids == [(4, slices), (4, 1)]
    assert (tokens // 64).unique().numel() > 1


@PROGRAMS
def test_of_equal_values_in_several_slices_the_first_wins(cut, splits):
    logits = torch.zeros(5, 266, device=DEVICE)
    logits[1, [70, 200, 265]] = 2.5
    logits[2] = -INF
    logits[2, [130, 257]] = 1.0
    logits[3, ::2] = -0.0
    logits[4, 265] = 1.0
    cut(splits)
    tokens = sample(logits, impl="triton", temperature=0, **where(5))
    assert tokens.tolist() == [0, 70, 130, 0, 265]

    logits.fill_(2.0**26)  # x + G is rounded to multiples of 8
    y = 2.0**26 + gumbel(9, torch.arange(5), 7, 266)
    tied = y == y.amax(1, keepdim=True)
    assert int((tied[:, :192].any(1) & tied[:, 192:].any(1)).sum()) > 1
    tokens = sample(logits, impl="triton", **where(5))
    assert torch.equal(tokens.cpu(), y.argmax(1))


@PROGRAMS
@pytest.mark.parametrize("warp", ["plain", "greedy"])
def test_one_slice_makes_a_row_undefined_and_one_defines_it(cut, warp, splits):
    logits = normal(8, 266)
    for row in range(6):
        logits[row, (3, 130, 265)[row // 2]] = (NAN, INF)[row % 2]
    logits[6:] = -INF
    logits[7, 200] = -3.0
    cut(splits)
    tokens = sample(logits, impl="triton", **where(8), **WARPS[warp])
    assert tokens.tolist() == [-1] * 7 + [200]


def test_filters_keep_a_row_in_one_program(cut):
    grids = cut(3)
    for warp in WARPS.values():
        sample(normal(1, 130), impl="triton", **where(1), **warp)
    assert grids == [(1, 3)] * 4 + [(1, 1)] * 6


def test_addresses_beyond_two_to_the_31(cut, monkeypatch):
    """Rows 2.2 GB apart, nothing between them touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    gap, near = 1_100_000_007, normal(3, 130, torch.bfloat16)
    far = torch.empty(2 * gap + 130, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((3, 130), (gap, 1)).copy_(near)
    cut(2)
    for warp in ("plain", "greedy"):
        check_agrees(far, **WARPS[warp])


def test_programs_a_row(monkeypatch):
    """Four for each multiprocessor; slices of whole blocks, (columns, number), none empty."""
    monkeypatch.setattr(backend, "multiprocessors", lambda _: 132)
    shapes = (0, 50257), (1, 151936), (8, 151936), (32, 151936), (64, 50257), (600, 50257)
    block, programs = MODULE.BLOCK, MODULE.PROGRAMS_PER_PROCESSOR
    slices = [
        backend.slices(V, block, backend.splits(rows, V, block, programs, None))
        for rows, V in shapes
    ]
    assert slices == [(2048, 25), (2048, 75), (4096, 38), (10240, 15), (8192, 7), (51200, 1)]
