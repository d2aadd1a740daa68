"""The Triton sampler draws the tokens of the reference, whatever filters, ties and rows it gets."""

import math
import sys
import warnings

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import poisoned
from switchkd_kernels import reference, sample
from switchkd_kernels.noise import STREAM_REDRAW, gumbel
from test_reference_noise import chi_square

MODULE = sys.modules["switchkd_kernels.sample"]  # the package's attribute is the function
BLOCK = MODULE.BLOCK
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

WARPS = {
    "plain": {},
    "greedy": {"temperature": 0, "top_k": 3, "top_p": 0.1, "min_p": 0.9},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"temperature": 0.7, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.6},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "top_k top_p": {"top_k": 40, "top_p": 0.7},
    "top_p min_p": {"temperature": 1.9, "top_p": 0.9, "min_p": 0.1},
    "all": {"temperature": 1.9, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
}
WARP_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EVERY_WARP = pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)


@pytest.fixture(autouse=True)
def _small_blocks_and_poison(monkeypatch):
    """Many blocks for little work; what a kernel does not write is the largest integer."""
    monkeypatch.setattr(MODULE, "BLOCK", 64)
    with poisoned():
        yield


def normal(rows, V, dtype=torch.float32, sigma=3.0):
    return (sigma * torch.randn(rows, V)).to(DEVICE, dtype)


def where(rows, **options):
    return {"seed": 9, "sequence_ids": torch.arange(rows), "positions": 7} | options


def rounding_decides(z, *, seed, sequence_ids, positions, stream=0, **warp):
    """Rows of float64 logits whose token would be another one, had x + G moved by a few roundings
    of float32, or top_p or min_p by 1e-5 of itself."""
    warp = WARP_OFF | warp
    if warp["temperature"] == 0:
        return torch.zeros(len(z), dtype=torch.bool)
    field = gumbel(seed, sequence_ids, positions, z.shape[-1], stream).double()

    def perturbed(nudge):
        p, m = (v if v in (0, 1) else v * nudge for v in (warp["top_p"], warp["min_p"]))
        return reference._filter(z / warp["temperature"], warp["top_k"], min(p, 1.0), m) + field

    y = perturbed(1)
    token = y.argmax(-1, keepdim=True)
    best = y.gather(-1, token)
    near = best - y.scatter(-1, token, -INF).amax(-1, keepdim=True) < 1e-5 + 1e-6 * best.abs()
    for nudge in (1 - 1e-5, 1 + 1e-5):
        near = near | (perturbed(nudge).argmax(-1, keepdim=True) != token)
    return near[:, 0]


def check_agrees(logits, *, undecided=0, double=True, **options):
    """Draws, and compares with the reference in float32 and float64. Rows that rounding decides are
    told, no more than `undecided` in number, and alone may differ. double=False: not with float64,
    where it is float32 that makes the ties."""
    options = where(len(logits), **options)
    got = sample(logits, impl="triton", **options)
    assert (got.dtype, got.device, got.shape) == (torch.int64, logits.device, logits.shape[:1])
    size = options.pop("vocab_size", None)
    z = logits[:, :size].cpu()
    near = rounding_decides(z.double(), **options)
    if bool(near.any()):
        warnings.warn(f"rounding decides {int(near.sum())} of {len(near)} rows", stacklevel=2)
    assert int(near.sum()) <= undecided
    for dtype in (torch.float32, torch.float64)[: 1 + double]:
        want = sample(z.to(dtype), impl="reference", **options)
        wrong = ((got.cpu() != want) & ~near).nonzero().flatten().tolist()
        assert not wrong, f"{dtype}: rows {wrong}: got {got[wrong]}, expected {want[wrong]}"
    return got


# ---------------------------------------------------------------------------------- tokens


@EVERY_WARP
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_the_reference(dtype, warp):
    check_agrees(normal(2, 130, dtype), **warp)


@pytest.mark.parametrize("warp", ["plain", "greedy", "top_k", "top_p min_p", "all"])
def test_wide_vocabularies(monkeypatch, warp):
    monkeypatch.setattr(MODULE, "BLOCK", BLOCK)
    check_agrees(normal(1, 4097), **WARPS[warp])
    if warp in ("plain", "all"):
        check_agrees(normal(1, 50257, torch.bfloat16), **WARPS[warp])


@EVERY_WARP
@pytest.mark.parametrize("V", [1, 2, 64])
def test_narrow_vocabularies(V, warp):
    check_agrees(normal(1, V), **warp)


@EVERY_WARP
def test_ties_and_holes(warp):
    logits = normal(5, 130, torch.bfloat16, sigma=1.5).round()
    logits[1] = 2.5  # all equal
    logits[2, torch.rand(130) < 0.9] = -INF
    logits[3] = -INF
    logits[3, 128] = 1.0  # one token is left, in the last block
    logits[4] = -0.0
    logits[4, ::2] = 0.0  # equal, but not in their bits
    tokens = check_agrees(logits, **warp)
    assert int(tokens[3]) == 128


@pytest.mark.parametrize(
    "warp",
    [
        {"top_k": 1},
        {"top_k": 99},
        {"top_k": 100},  # no filter from here on
        {"top_k": 2**40},
        {"top_p": 1e-6},
        {"top_p": 1e-300},
        {"top_p": 1 - 1e-12},
        {"min_p": 1.0},
        {"min_p": 1e-300},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_extreme_filters(warp, ties):
    logits = normal(2, 100)
    logits = logits.round() if ties else logits
    tokens = check_agrees(logits, temperature=5.0, **warp)
    alone = warp.get("top_k") == 1 or warp.get("top_p", 1) < 1e-5 or warp.get("min_p") == 1
    if alone:  # the maximum is all that is kept
        assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(1))


def test_a_refused_winner_leads_to_the_next_one():
    """Nearly uniform rows and a small top-p: the draw of the superset is almost never kept."""
    logits = normal(3, 100, sigma=0.1)
    tokens = check_agrees(logits, top_p=0.02)
    assert not bool((tokens == sample(logits, impl="triton", **where(3))).any())


def test_logits_that_tie_once_divided_stay_together():
    """Neighbours in float32 around 1.9, of which 1.9 / 1.9 makes pairs: some tie with the k-th."""
    steps = torch.arange(8, dtype=torch.int32, device=DEVICE)
    logits = (torch.tensor(1.9, device=DEVICE).view(torch.int32) + steps).view(torch.float32)
    x = logits.cpu() / 1.9  # on a CPU, a division that rounds once
    k = next(k for k in range(1, 8) if x[7 - k] == x[8 - k])
    logits = logits.expand(16, -1)
    tokens = check_agrees(logits, temperature=1.9, top_k=k, double=False)
    assert 7 - k in tokens.tolist() and 6 - k not in tokens.tolist()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("warp", ["plain", "all"])
def test_huge_offsets(offset, warp):
    """x + G is rounded to a thousandth there, in which the kernel and the reference agree."""
    check_agrees(normal(4, 70) + offset, double=False, **WARPS[warp])


@pytest.mark.parametrize("warp", ["plain", "top_p"])
@pytest.mark.parametrize(
    "key",
    [
        {"seed": 2**63 + 11},
        {"seed": 2**64 - 1, "stream": STREAM_REDRAW},
        {"sequence_ids": torch.tensor([2**32, 2**33 + 5, 2**56 - 1])},
        {"positions": torch.tensor([0, 2**31 + 3, 2**32 - 1])},
        {"sequence_ids": [3, 1, 2], "positions": [9, 9, 8], "stream": 255},
    ],
    ids=["seed", "stream", "ids", "positions", "lists"],
)
def test_every_part_of_the_key(key, warp):
    logits = normal(3, 130, sigma=0.5)
    tokens = check_agrees(logits, **WARPS[warp], **key)
    assert not torch.equal(tokens.cpu(), sample(logits.cpu(), **where(3), **WARPS[warp]))


@pytest.mark.parametrize("warp", ["plain", "greedy", "all"])
def test_padding_and_strides(warp):
    padded = normal(3, 83)
    padded[:, 70:] = NAN
    padded[1, 70:] = 1e9
    want = check_agrees(padded, vocab_size=70, **WARPS[warp])
    wide = torch.full((6, 90), INF, device=DEVICE)
    wide[::2, 5:75] = padded[:, :70]
    columns = padded[:, :70].T.contiguous().T
    assert columns.stride() == (1, 3)
    for logits in (wide[::2, 5:75], columns):
        assert torch.equal(sample(logits, impl="triton", **where(3), **WARPS[warp]), want)


def test_rows_do_not_depend_on_their_batch():
    logits, positions = normal(3, 70), torch.tensor([5, 0, 2**31])
    key = {"impl": "triton", "seed": 1, "sequence_ids": 2**40, "top_p": 0.8}
    whole = sample(logits, positions=positions, **key)
    for i in range(3):
        got = sample(logits[i : i + 1], positions=int(positions[i]), **key)
        assert torch.equal(got, whole[i : i + 1])


def test_no_rows():
    got = sample(torch.zeros(0, 5, device=DEVICE), impl="triton", **where(0))
    assert got.shape == (0,) and got.dtype == torch.int64


@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.12)])
def test_law_of_the_draws(top_p, min_p):
    n = 20000 if DEVICE == "cuda" else 120  # the interpreter is slow
    logits = torch.tensor([[0.3, -1.0, 2.0, -INF, 0.0, 1.0, 1.0]], device=DEVICE)
    kept = reference._filter(logits[0].cpu().double(), 0, top_p, min_p)
    law = torch.softmax(kept, -1).tolist()
    logits = logits.expand(n, -1)
    tokens = sample(logits, impl="triton", top_p=top_p, min_p=min_p, **where(n))
    counts = torch.bincount(tokens, minlength=7).tolist()
    assert all(p > 0 or count == 0 for count, p in zip(counts, law, strict=True))
    assert chi_square(counts, law)
    assert not chi_square(counts, torch.softmax(kept * 2, -1).tolist())  # the test can fail


@pytest.mark.parametrize(
    "seed", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_every_seed_is_64_bits(seed):
    options = where(40, seed=seed)
    got = sample(torch.zeros(40, 9, device=DEVICE), impl="triton", **options)
    assert torch.equal(got.cpu(), sample(torch.zeros(40, 9), impl="reference", **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_row(data):
    V = data.draw(st.integers(1, 12))
    number = st.integers(-4, 4) | st.floats(-30, 30, width=16) | st.just(-INF)
    row = data.draw(st.lists(number, min_size=V, max_size=V).filter(lambda r: max(r) > -INF))
    logits = torch.tensor([row], device=DEVICE).to(data.draw(st.sampled_from(DTYPES)))
    warp = {
        "temperature": data.draw(st.sampled_from([0, 0.1, 0.7, 1.0, 3.0])),
        "top_k": data.draw(st.integers(0, V + 1)),
        "top_p": data.draw(st.sampled_from([1e-6, 0.21, 0.51, 0.93, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 1e-3, 0.13, 1.0])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
    }
    check_agrees(logits, undecided=1, double=False, **warp)


# ------------------------------------------------------------------- undefined rows, refusals


@EVERY_WARP
def test_an_undefined_row_gives_minus_one_and_ends(warp):
    logits = normal(6, 70)
    want = sample(logits.cpu(), **where(6), **warp)
    for row, value in ((1, NAN), (2, math.copysign(NAN, -1)), (3, INF)):
        logits[row, 66] = value
    logits[4] = -INF
    want[1:5] = -1
    assert torch.equal(sample(logits, impl="triton", **where(6), **warp).cpu(), want)


def test_a_row_of_nothing_but_nan():
    for warp in WARPS.values():
        got = sample(torch.full((1, 3), NAN, device=DEVICE), impl="triton", **where(1), **warp)
        assert got.tolist() == [-1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4)}, ValueError, r"\(rows, vocabulary\), got \(4,\)"),
        ({"logits": torch.zeros(2, 4).double()}, RuntimeError, "float32.*got torch.float64"),
        ({"impl": "cudnn"}, ValueError, "impl must be one of None, reference, .*got 'cudnn'"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
        ({"sequence_ids": [0, 2**56]}, ValueError, "sequence_ids must be in .*, got 0.."),
        ({"sequence_ids": [0.5, 1.5]}, TypeError, "sequence_ids must be integers, got"),
        ({"sequence_ids": [1, 2, 3]}, ValueError, r"or \(2,\), got \(3,\)"),
        ({"positions": -1}, ValueError, "positions must be in .*, got -1"),
        ({"positions": 2**32}, ValueError, "positions must be in .*, got 4294967296"),
        ({"stream": 256}, ValueError, "stream must be in .*, got 256"),
        ({"temperature": -1.0}, ValueError, "temperature must be .*, got -1"),
        ({"temperature": 1e-9}, ValueError, "temperature must be .*, got 1e-09"),
        ({"temperature": NAN}, ValueError, "temperature must be .*, got nan"),
        ({"top_k": -1}, ValueError, "top_k must be in .*, got -1"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": NAN}, ValueError, "top_p must be in .*, got nan"),
        ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\], got 1.5"),
        ({"vocab_size": 5}, ValueError, "vocab_size must be between 1 and 4.*, got 5"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be between 1 and 4.*, got 0"),
    ],
)
def test_refused_arguments(change, error, message):
    arguments = {"logits": torch.zeros(2, 4), "impl": "triton"} | where(2) | change
    with pytest.raises(error, match=message):
        sample(arguments.pop("logits").to(DEVICE), **arguments)


# ------------------------------------------------------------------------- dispatch, the op


def test_dispatch():
    logits = normal(3, 20)
    assert torch.equal(
        sample(logits.double(), **where(3)), sample(logits.double(), impl="reference", **where(3))
    )
    bad = logits.clone()
    bad[2, 3] = NAN
    with pytest.raises(ValueError, match="teacher logits, row 2"):
        sample(bad, impl="reference", model="teacher", **where(3))
    if DEVICE == "cpu":  # the interpreter is for tests: without a choice it is not used
        with pytest.raises(ValueError, match="student logits, row 2"):
            sample(bad, **where(3))
    else:
        assert int(sample(bad, **where(3))[2]) == -1


def test_op():
    ids, positions = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    for seed, temperature, top_k, top_p, min_p in ((5, 0.0, 0, 1.0, 0.0), (-3, 0.7, 4, 0.9, 0.1)):
        torch.library.opcheck(
            torch.ops.switchkd.sample.default,
            (
                *(torch.randn(3, 20), ids, positions, seed),
                *(temperature, top_k, top_p, min_p, 18, 0, "student", "triton"),
            ),
        )


def test_compiled():
    torch._dynamo.reset()
    logits, ids = normal(4, 50), torch.arange(4, device=DEVICE)
    warp = {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.01, "vocab_size": 45}

    def draw(logits, ids, impl=None):
        key = {"seed": 2**63 + 9, "sequence_ids": ids, "positions": 3}
        return sample(logits * 2, impl=impl, **key, **warp) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, ids), draw(logits, ids))
    assert torch.equal(compiled(logits, ids), draw(logits, ids, "triton"))
    assert compiled(logits, ids).unique().numel() > 1
