"""Noise in Triton against the reference: Philox words, Gumbel values, their bound."""

import pytest
import torch
from oracle import DEVICE
from switchkd_kernels import _checks, _tl, _tl_noise, noise

pytest.importorskip("triton")
tl, triton = _tl.tl, _tl.triton


@triton.jit
def _words(out_ptr, id_ptr, position_ptr, seed: tl.int64, first, STREAM: tl.constexpr):
    row = tl.program_id(0)
    counter = tl.load(position_ptr + row), tl.load(id_ptr + row)
    w0, w1, w2, w3 = _tl_noise.noise_words(seed, first, counter, STREAM, 64)
    tl.store(out_ptr + row * 64 + tl.arange(0, 64), _tl.in_order(w0, w1, w2, w3).to(tl.int64))


@triton.jit
def _gumbels(word_ptr, out_ptr, bound_ptr):
    at = tl.arange(0, 256)
    words = tl.load(word_ptr + at).to(tl.uint32)
    tl.store(out_ptr + at, _tl_noise.gumbel_of(words))
    tl.store(bound_ptr + at, _tl_noise.gumbel_bound(words))


def within_4_ulp(got, want):  # of 1 for values below 1, where the outer logarithm cancels
    return bool(((got - want).abs() <= 2.0 ** (want.abs().clamp(1).log2().floor() - 21)).all())


@pytest.mark.parametrize("seed", [5, 2**63, 2**64 - 1])
@pytest.mark.parametrize(("stream", "first"), [(0, 0), (1, 151552), (255, 64)])
def test_noise_is_that_of_the_reference(seed, stream, first):
    ids = torch.tensor([0, 5, 2**32 + 7, 2**56 - 1], device=DEVICE)
    positions = torch.tensor([2**32 - 1, 0, 2**31, 17], device=DEVICE)
    words, values = torch.zeros(4, 64, device=DEVICE).long(), torch.empty(4, 64, device=DEVICE)
    _words[(4,)](words, ids, positions, _checks.signed(seed), first, stream)
    blocks = range(first // 4, first // 4 + 16)
    want = torch.stack(noise._words(seed, ids, positions, stream, blocks), -1)
    assert torch.equal(words, want.flatten(1))
    _gumbels[(1,)](words, values, torch.empty_like(values))
    field = noise.gumbel(seed, ids, positions, first + 64, stream, device=DEVICE)[:, first:]
    assert within_4_ulp(values, field)


def test_gumbel_of_extreme_words_and_its_bound():
    """The ends, and around every power of two, where the bound's logarithm is exact."""
    words = torch.tensor([2**k + j for k in range(33) for j in (-1, 0, 1)], device=DEVICE)
    words = torch.cat([words, torch.randint(0, 2**32, (157,), device=DEVICE)]).clamp(0, 2**32 - 1)
    values, bound = (torch.empty(256, device=DEVICE) for _ in range(2))
    _gumbels[(1,)](words, values, bound)
    u = ((words.float() + 0.5).double() * 2.0**-32).clamp(max=1 - 2.0**-24)
    truth = -(-torch.log1p(-u)).log()
    assert within_4_ulp(values, truth)  # all are finite, 22.9 at most
    tight = (words >= 64) & (u < 0.01)  # below, it is for the word itself, not for word + 1/2
    assert bool((bound >= values).all()) and bool((bound - truth < 0.1)[tight].all())
