"""Gumbel noise in Triton, and the token whose logit it lifts highest: argmax of z / T + G.

The Triton twin of noise.py. A sweep over a row knows each token's Philox word, and does not pay for
the two logarithms that make noise of it: for each four tokens of a block it has an upper bound of
the sum, and every lane (the same four columns of all blocks) keeps its largest bound, the block
where that was met, and its second largest (`lead_start`, `lead_step`). Noise is evaluated once, for
the leader of each lane (`lead_end`). Only if a lane's second has a bound above the best of them, in
about one row of a hundred, is it swept again. So a sweep has no branch and no reduction between
threads, which would keep the loads of its next block from being on their way.
"""

from switchkd_kernels._tl import in_order, load_block, log, log1p, tl, triton


@triton.jit
def noise_words(seed, first, counter, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Philox words of tokens first .. first + BLOCK - 1, first divisible by 4: four (BLOCK // 4,)
    uint32, the k-th for tokens first + 4 i + k; `first` may differ from lane to lane. Key and
    counter as in noise.py; `counter` is (position, sequence id). Both halves of a product by one
    instruction, which tl.philox needs two for."""
    position, sequence = counter
    w0 = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w1 = position.to(tl.uint32)
    w2 = sequence.to(tl.uint32)
    w3 = ((sequence >> 32) | (STREAM << 24)).to(tl.uint32)
    key = seed.to(tl.uint64)  # the interpreter's >> takes one of 2^31 to 2^32 for negative
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = w0.to(tl.uint64) * 0xD2511F53, w2.to(tl.uint64) * 0xCD9E8D57
        w0, w1 = (b >> 32).to(tl.uint32) ^ w1 ^ key0, b.to(tl.uint32)
        w2, w3 = (a >> 32).to(tl.uint32) ^ w3 ^ key1, a.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return w0, w1, w2, w3


@triton.jit
def gumbel_of(word):
    """-log(-log1p(-u)), u = min((float32(word) + 1/2) 2^-32, 1 - 2^-24); falls as word rises, from
    22.9 to -2.9."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    return -log(-log1p(-u))


@triton.jit
def gumbel_bound(word):
    """At least gumbel_of(word), by up to 0.1 and a few per cent of u, with no logarithm.

    G <= -log u, and the bits of a float, read as an integer, are 2^23 (127 + log2) from below. For
    word 0 it is 110.
    """
    bits = word.to(tl.float32).to(tl.int32, bitcast=True)
    return bits.to(tl.float32) * -8.262958294867817e-08 + 110.2105


@triton.jit
def noise_bounds(words):
    """(BLOCK // 4,): at least the noise of each four tokens that share a counter."""
    w0, w1, w2, w3 = words
    return gumbel_bound(tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3)))


def with_inverse(temperature: float) -> tuple[float, float]:
    return temperature, 1 / temperature if temperature else 0.0


@triton.jit
def tempered(z, temperature):
    """z / T rounded once; `temperature` is (T, 1 / T rounded). Markstein's division (1990): the
    instruction that rounds so is a subroutine with a slow path, for every entry."""
    T, inverse = temperature
    quotient = z * inverse
    exact = tl.fma(tl.fma(-quotient, T, z), inverse, quotient)
    return tl.where(exact == exact, exact, quotient)  # -inf stays


@triton.jit
def kept(x, limits):
    """-inf where a filter drops an entry: below the floor, or not below the last winner that was
    refused. `limits` is (floor, refused). NaN stays, and is found."""
    floor, refused = limits
    return tl.where((x < floor) | (x <= refused), float("-inf"), x)


@triton.jit
def lead_start(start, BLOCK: tl.constexpr):
    """(largest bound, start of its block, second largest bound) of each lane of four columns."""
    none = tl.full((BLOCK // 4,), float("-inf"), tl.float32)
    return none, tl.zeros((BLOCK // 4,), tl.int32) + start, none


@triton.jit
def _bounds_of(z, inverse, bounds):
    """(BLOCK // 4,): at least z / T + G of each four tokens, but for rounding."""
    return tl.max(tl.reshape(z, (z.shape[0] // 4, 4)), 1) * inverse + bounds


@triton.jit
def lead_step(z, inverse, bounds, first, lanes):
    """`lanes` after the block that starts at `first`."""
    lead, place, second = lanes
    bound = _bounds_of(z, inverse, bounds)
    place = tl.where(bound > lead, first, place)
    return tl.maximum(lead, bound), place, tl.maximum(second, tl.minimum(lead, bound))


@triton.jit
def _need(best):
    """What a sum with one or two roundings must exceed for its exact value to exceed the best."""
    return best - tl.abs(best) * 1e-6 - 1e-4


@triton.jit
def lead_end(
    row_ptr, start, end, V, seed, counter, temperature, limits, lanes,
    STREAM: tl.constexpr, FILTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest z / T + G of columns [start, end), its token, the first of equals)."""
    _lead, place, second = lanes
    w0, w1, w2, w3 = noise_words(seed, place, counter, STREAM, BLOCK)
    token = place + 4 * tl.arange(0, BLOCK // 4)
    token = in_order(token, token + 1, token + 2, token + 3)
    z = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    x = tempered(z, temperature)
    if FILTERED:
        x = kept(x, limits)
    y = x + gumbel_of(in_order(w0, w1, w2, w3))
    best = tl.max(y, 0)
    winner = tl.min(tl.where(y == best, token, V - 1), 0)  # in the row, whatever the row holds
    if tl.max(second, 0) > _need(best):
        best, winner = _sweep_again(
            row_ptr, start, end, V, seed, counter, temperature, limits, (_need(best), winner),
            STREAM, FILTERED, ROWS, BLOCK,
        )  # fmt: skip
    return best, winner


@triton.jit
def _sweep_again(
    row_ptr, start, end, V, seed, counter, temperature, limits, best,
    STREAM: tl.constexpr, FILTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `lead_end`, from a value below the best sum: noise is evaluated in every block whose
    bounds leave room for a better one."""
    for first in tl.range(start, end, BLOCK):
        x = load_block(row_ptr, first, V, ROWS, BLOCK)
        words = noise_words(seed, first, counter, STREAM, BLOCK)
        x = tempered(x, temperature)
        if FILTERED:
            x = kept(x, limits)
        could_win = _bounds_of(x, 1.0, noise_bounds(words)) > _need(best[0])
        if tl.sum(could_win.to(tl.int32), 0) != 0:
            w0, w1, w2, w3 = words
            value, index = tl.max(x + gumbel_of(in_order(w0, w1, w2, w3)), 0, return_indices=True)
            better = value > best[0]  # not >=: of equal values the first wins, as torch.argmax
            best = tl.where(better, value, best[0]), tl.where(better, first + index, best[1])
    return best
