"""The random numbers: published Philox vectors, the counter's layout, and draws made from them."""

import math
import random
import struct

import pytest
import torch
from switchkd_kernels import InvalidLogits, noise, sample, uniform
from switchkd_kernels.noise import STREAM_COIN, STREAM_REDRAW, STREAM_TOKEN, gumbel, philox

MASK = 0xFFFFFFFF


def plain_philox(counter, key):
    """Philox4x32-10 on Python integers, which do not wrap."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK, (a >> 32) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def chi_square(counts, probabilities):
    """Within five standard deviations of the statistic's own law."""
    total, used = sum(counts), [(c, p) for c, p in zip(counts, probabilities, strict=True) if p > 0]
    statistic = sum((c - total * p) ** 2 / (total * p) for c, p in used)
    df = len(used) - 1
    return statistic < df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123 1.14, philox4x32 10
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MASK] * 4, [MASK] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_published_vectors(counter, key, expected):
    words = philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_philox_equals_unbounded_integers_and_leaves_its_input():
    rng = random.Random(3)
    counters = [[rng.getrandbits(32) for _ in range(4)] for _ in range(200)]
    seed = rng.getrandbits(64)
    columns = [torch.tensor(c) for c in zip(*counters, strict=True)]
    kept = [c.clone() for c in columns]
    got = torch.stack(philox(seed, *columns), -1).tolist()
    assert [tuple(g) for g in got] == [plain_philox(c, (seed & MASK, seed >> 32)) for c in counters]
    assert all(torch.equal(a, b) for a, b in zip(columns, kept, strict=True))


@pytest.mark.parametrize("stream", [0, 1, 255])
def test_counter_layout_and_gumbel_map(stream):
    seed, ids, positions = 2**64 - 7, [0, 5, 2**56 - 3, 2**40 + 9], [0, 2**32 - 1, 17, 3]
    field = gumbel(seed, torch.tensor(ids), torch.tensor(positions), 11, stream)
    assert field.shape == (4, 11) and field.dtype == torch.float32
    for row, (i, t) in enumerate(zip(ids, positions, strict=True)):
        for v in range(11):
            counter = (v // 4, t, i & MASK, (i >> 32) | stream << 24)
            x = plain_philox(counter, (seed & MASK, seed >> 32))[v % 4]
            u = min(float32(float32(x) + 0.5) * 2.0**-32, 1 - 2.0**-24)
            assert float(field[row, v]) == pytest.approx(-math.log(-math.log1p(-u)), rel=3e-6)


@pytest.mark.parametrize(
    ("word", "coin", "noise_value"),
    [(0, 2.0**-24, 33 * math.log(2)), (MASK, 1 - 2.0**-24, -math.log(24 * math.log(2)))],
)
def test_extreme_words(monkeypatch, word, coin, noise_value):
    words = (torch.full((1, 1), word),) * 4
    monkeypatch.setattr(noise, "philox", lambda *_: words)
    assert float(uniform(0, 0, 0, STREAM_COIN)) == coin  # never 0 or 1
    assert float(gumbel(0, 0, 0, 1)[0, 0]) == pytest.approx(noise_value, rel=1e-6)


def test_uniform_is_exact_and_uniform():
    coins = uniform(11, torch.arange(20000), 4, STREAM_COIN)
    assert coins.shape == (20000,) and coins.dtype == torch.float32
    scaled = coins.double() * 2**24
    assert torch.equal(scaled, scaled.round()) and bool((scaled % 2 == 1).all())  # (n + 1/2) 2^-23
    assert chi_square(torch.histc(coins, 16, 0, 1).tolist(), [1 / 16] * 16)
    assert torch.equal(uniform(11, [3, 7], [4, 4], STREAM_COIN), coins[[3, 7]])


def test_gumbel_moments():
    field = gumbel(5, torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double()
    n = field.numel()
    assert abs(float(field.mean()) - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(float(field.var()) - math.pi**2 / 6) < 0.02


def test_every_part_of_the_key_matters_and_the_field_does_not_depend_on_its_width():
    one = gumbel(5, [9], [3], 100)
    assert torch.equal(gumbel(5, [9], [3], 7), one[:, :7])
    others = [(6, [9], [3]), (5 + 2**40, [9], [3]), (5, [10], [3]), (5, [9 + 2**33], [3])]
    for seed, ids, positions in [*others, (5, [9], [4])]:
        assert not bool((gumbel(seed, ids, positions, 100) == one).any())
    assert not bool((gumbel(5, [9], [3], 100, STREAM_REDRAW) == one).any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"sequence_ids": [2**56]}, ValueError, "sequence_ids"),
        ({"sequence_ids": [1.5]}, TypeError, "sequence_ids"),
        ({"positions": [-1]}, ValueError, "positions"),
        ({"positions": [2**32]}, ValueError, "positions"),
        ({"stream": 256}, ValueError, "stream"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": 1e-9}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"min_p": 1.5}, ValueError, "min_p"),
        ({"vocab_size": 9}, ValueError, "vocab_size"),
        ({"logits": torch.zeros(4)}, ValueError, "logits"),
        ({"logits": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "floating"),
    ],
)
def test_refused_arguments(change, error, message):
    arguments = {"logits": torch.zeros(1, 4), "seed": 0, "sequence_ids": [0], "positions": [0]}
    arguments |= change
    with pytest.raises(error, match=message):
        sample(arguments.pop("logits"), **arguments)


# --------------------------------------------------------------------------------- tokens


def draw(logits, n=None, **options):
    n = logits.shape[0] if n is None else n
    where = {"seed": 1, "sequence_ids": torch.arange(n), "positions": torch.full((n,), 8)}
    return sample(logits.expand(n, -1), **(where | options))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sample_law(temperature):
    logits = torch.tensor([[0.3, -1.0, 2.0, -math.inf, 0.0, 1.0]])
    law = torch.softmax(logits[0].double() / temperature, -1).tolist()
    tokens = draw(logits, 30000, temperature=temperature)
    counts = torch.bincount(tokens, minlength=6).tolist()
    assert counts[3] == 0 and chi_square(counts, law)
    wrong = torch.softmax(logits[0].double() / (temperature * 1.1), -1).tolist()
    assert not chi_square(counts, wrong)  # the test can fail


def test_sample_is_argmax_of_logits_plus_noise_in_every_dtype():
    logits = torch.randn(20, 50).bfloat16()
    field = gumbel(1, torch.arange(20), torch.full((20,), 8), 50)
    expected = (logits.double() / 0.7 + field.double()).argmax(-1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(draw(logits.to(dtype), temperature=0.7), expected)


def test_sample_does_not_depend_on_how_rows_are_split():
    logits, ids = torch.randn(12, 33), torch.randint(0, 2**56, (12,))
    positions = torch.randint(0, 2**32, (12,))
    whole = sample(logits, seed=3, sequence_ids=ids, positions=positions)
    order = torch.randperm(12)
    for part in order.split(5):
        got = sample(logits[part], seed=3, sequence_ids=ids[part], positions=positions[part])
        assert torch.equal(got, whole[part])


def test_greedy_and_ties_take_the_first():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    assert draw(logits, temperature=0).tolist() == [1, 0]


def sorted_filter(row, top_k, top_p, min_p):
    """One row, as Hugging Face orders it: the set of tokens left by top-k, top-p, min-p."""
    order = sorted(range(len(row)), key=lambda v: -row[v])
    if top_k:
        order = [v for v in order if row[v] >= row[order[min(top_k, len(row)) - 1]]]
    weight = {v: math.exp(row[v]) for v in order}
    total = sum(weight.values())
    left, above = [], 0.0
    for v in order:
        if above / total < top_p or row[v] == row[left[-1]]:
            left.append(v)
        above += weight[v]
    return {v for v in left if weight[v] >= min_p * weight[order[0]]}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (6, 0.8, 0.1), (100, 0.01, 0.0), (0, 1.0, 1.0)],
)
def test_filters_equal_a_plain_sorted_implementation(top_k, top_p, min_p):
    logits = torch.randn(40, 12, dtype=torch.float64).mul(2)
    logits[20:] = logits[20:].round()  # ties
    field = gumbel(1, torch.arange(40), torch.full((40,), 8), 12).double()
    tokens = draw(logits, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    for row, token, g in zip((logits / 0.8).tolist(), tokens.tolist(), field.tolist(), strict=True):
        kept = sorted_filter(row, top_k, top_p, min_p)
        assert token == max(kept, key=lambda v: row[v] + g[v])


def test_tokens_tied_at_a_threshold_all_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for option in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.36}):
        assert set(draw(logits, 400, **option).tolist()) == {0, 1, 2, 3}


def test_padding_is_not_drawn_nor_looked_at():
    logits = torch.randn(50, 10)
    padded = torch.cat([logits, torch.full((50, 3), math.nan)], -1)
    padded[:, 11] = 1e9
    assert torch.equal(draw(padded, vocab_size=10), draw(logits))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_is_named(value):
    logits = torch.zeros(5, 7)
    logits[3, 2] = value
    if value == -math.inf:
        assert draw(logits)[3] != 2  # one -inf is a token that is never drawn
        logits[3] = value
    with pytest.raises(InvalidLogits, match="teacher logits, row 3") as caught:
        draw(logits, model="teacher")
    assert (caught.value.model, caught.value.row) == ("teacher", 3)
    assert STREAM_TOKEN == 0
