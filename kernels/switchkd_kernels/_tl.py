"""Triton and the device functions that the kernels share: noise, softmax, mathematics of a pair.

The Triton twin of noise.py and rowwise.py. Where Triton is not installed a stand-in lets kernels be
defined, never run. Float32 throughout; formulas and notation (p, q, d) as in rowwise.py.
"""

try:
    import triton
    import triton.language as tl

    UNAVAILABLE = None
except Exception as error:  # a broken installation must not take the reference with it
    UNAVAILABLE = f"triton cannot be imported: {error}"

    class _StandIn:
        int64 = int

        @staticmethod
        def constexpr(value):
            return value

        @staticmethod
        def jit(function=None, **_options):
            return function or _StandIn.jit

    triton = tl = _StandIn


@triton.jit
def exp(x):
    """e^x by one instruction; a library exponential spends three more on results below 2^-126."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 and to one or two roundings: log(w) + (x - (w - 1)), w = 1 + x rounded.

    The correction, what rounding took from x, is exact; it matters where w is near 1, and there its
    division by w does not.
    """
    w = 1.0 + x
    return tl.log(w) + (x - (w - 1.0))


@triton.jit
def exp_tail(x):
    """(e^x - 1 - x) / (x^2 / 2) = 1 + x/3 + x^2/12 + ... for |x| < 1/2."""
    s = 1.0 + x * (1.0 / 9)
    s = 1.0 + x * (1.0 / 8) * s
    s = 1.0 + x * (1.0 / 7) * s
    s = 1.0 + x * (1.0 / 6) * s
    s = 1.0 + x * (1.0 / 5) * s
    s = 1.0 + x * (1.0 / 4) * s
    return 1.0 + x * (1.0 / 3) * s


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + 0.5 * x * x * exp_tail(x), exp(x) - 1.0)


# ------------------------------------------------------------------------------- noise


@triton.jit
def noise_words(seed, first, counter, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Philox words of tokens first .. first + BLOCK - 1, first divisible by 4: four (BLOCK // 4,)
    uint32, the k-th for tokens first + 4 i + k. Key and counter as in noise.py; `counter` is
    (position, sequence id)."""
    position, sequence = counter
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = block * 0
    high = ((sequence >> 32) | (STREAM << 24)).to(tl.uint32)
    return tl.philox(
        seed, block, position.to(tl.uint32) + zero, sequence.to(tl.uint32) + zero, high + zero
    )


@triton.jit
def gumbel_of(word):
    """-log(-log1p(-u)), u = min((float32(word) + 1/2) 2^-32, 1 - 2^-24); falls as word rises."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    return -tl.log(-log1p(-u))


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
def gumbel_bound(word):
    """At least gumbel_of(word), by up to 0.1 and a few per cent of u, with no logarithm.

    G <= -log u, and the bits of a float, read as an integer, are 2^23 (127 + log2) from below.
    """
    bits = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    return (159.0 - bits.to(tl.float32) * 1.1920928955078125e-07) * 0.6931471805599453 + 1e-4


@triton.jit
def in_order(w0, w1, w2, w3):
    """Four (N,) tensors to (4 N,): element 4 i + k is the i-th of the k-th."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def argmax_step(y, first, best):
    """(largest value, its token) of a row after one more block, which starts at token `first`."""
    value, index = tl.max(y, 0, return_indices=True)
    better = value > best[0]  # not >=: of equal values the first wins, as torch.argmax has it
    return tl.where(better, value, best[0]), tl.where(better, first + index, best[1])


@triton.jit
def noisy_step(z, temperature, first, words, best):
    """`argmax_step` of z / T + G. Evaluates the noise (two logarithms an entry) only in a block
    that could win, by a bound for each four entries that share a counter: their largest logit,
    their least word."""
    w0, w1, w2, w3 = words
    least = tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3))
    top = tl.max(tl.reshape(z, (z.shape[0] // 4, 4)), 1)
    if tl.max(tempered(top, temperature) + gumbel_bound(least), 0) > best[0]:
        y = tempered(z, temperature) + gumbel_of(in_order(w0, w1, w2, w3))
        best = argmax_step(y, first, best)
    return best


# ------------------------------------------------------------------------------- softmax


@triton.jit
def _load(ptr, cols, end, fill, MASKED: tl.constexpr):
    """Entries of `cols` in float32. Without a mask where a block lies inside: a bound that is not a
    multiple of 16 would keep the loads from being 16 bytes wide."""
    if MASKED:
        z = tl.load(ptr + cols, mask=cols < end, other=fill)
    else:
        z = tl.load(ptr + cols)
    return z.to(tl.float32)


@triton.jit
def load_block(row_ptr, first, end, BLOCK: tl.constexpr):
    """A block of one row's logits, -inf from `end` on. Only the load comes in two kinds: a sweep
    written out for whole blocks and for the rest takes twice the code and more registers."""
    cols = first + tl.arange(0, BLOCK)
    if first + BLOCK <= end:
        z = _load(row_ptr, cols, end, float("-inf"), False)
    else:
        z = _load(row_ptr, cols, end, float("-inf"), True)
    return z


@triton.jit
def load_pair(pair, first, end, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """A block of (teacher, student) logits, -inf from `end` on. pair: the two row pointers; where
    HEAD is not 0 they point at h W^T, and two bias pointers, a scale and a cap follow:
    z = cap tanh(scale (h W^T + b) / cap). HEAD is a sum: teacher bias 1, student bias 2, scale 4,
    cap 8, no teacher 16."""
    cols = first + tl.arange(0, BLOCK)
    if first + BLOCK <= end:
        zt, zs = _load_both(pair, cols, end, HEAD, False)
    else:
        zt, zs = _load_both(pair, cols, end, HEAD, True)
    return zt, zs


@triton.jit
def _load_both(pair, cols, end, HEAD: tl.constexpr, MASKED: tl.constexpr):
    zs = _head_logits(pair, 1, cols, end, HEAD, MASKED)
    zt = zs
    if not HEAD & 16:
        zt = _head_logits(pair, 0, cols, end, HEAD, MASKED)
    return zt, zs


@triton.jit
def _head_logits(pair, SIDE: tl.constexpr, cols, end, HEAD: tl.constexpr, MASKED: tl.constexpr):
    z = _load(pair[SIDE], cols, end, float("-inf"), MASKED)
    if HEAD & (1 << SIDE):
        z += _load(pair[2 + SIDE], cols, end, 0.0, MASKED)
    if HEAD & 4:
        z *= pair[4]
    if HEAD & 8:
        t = expm1(-2.0 * tl.abs(z / pair[5]))
        z = pair[5] * tl.where(z < 0.0, t, -t) / (2.0 + t)
        if MASKED:  # the cap has made -inf finite
            z = tl.where(cols < end, z, float("-inf"))
    return z


@triton.jit
def softmax_start(BLOCK: tl.constexpr):
    """(maximum, sum of e^(z - maximum)) of nothing, kept apart for each of BLOCK lanes: a sweep
    then needs no reduction, no barrier and one exponential an entry."""
    return tl.full((BLOCK,), -3.4028234663852886e38, tl.float32), tl.zeros((BLOCK,), tl.float32)


@triton.jit
def softmax_step(z, lanes):
    """`lanes` after one more block: of e^(z - new) and e^(old - new) one is always 1."""
    top, total = lanes
    e = exp(-tl.abs(z - top))
    return tl.maximum(top, z), tl.where(z > top, total * e + 1.0, total + e)


@triton.jit
def softmax_end(lanes):
    """Maximum and sum of e^(z - maximum) of a row. For a row that defines no distribution the sum
    is NaN (it holds a NaN or +inf) or 0 (all -inf): `is_distribution` tells."""
    top = tl.max(lanes[0], 0)
    return top, tl.sum(lanes[1] * exp(lanes[0] - top), 0)


@triton.jit
def is_distribution(total):
    return (total > 0.0) & (total < float("inf"))


@triton.jit
def compare(zt, zs, t_top, t_total, s_top, s_total):
    """(p, q, d, e): probabilities, d = log q - log p (0 where both vanish), e = e^-|d|.

    The larger of p and q by one exponential, the smaller as its product with e. d is the difference
    of the logits, less that of the maxima, which takes any offset with it, less that of the logs of
    the sums, which errs by about one rounding.
    """
    d = ((zs - zt) - (s_top - t_top)) - tl.log(s_total / t_total)
    d = tl.where(d == d, d, 0.0)  # -inf in both rows
    e = exp(-tl.abs(d))
    q_leads = d > 0.0
    larger = exp(tl.where(q_leads, zs - s_top, zt - t_top))
    larger *= tl.where(q_leads, 1.0 / s_total, 1.0 / t_total)
    return tl.where(q_leads, larger * e, larger), tl.where(q_leads, larger, larger * e), d, e


# ------------------------------------------------------------------------------- divergences


@triton.jit
def jsd_terms(p, q, d, e):
    """m h(tanh(d / 2)) with m = (p + q) / 2 and h(tanh s) = s tanh s - log cosh s, even in d.

    |d| < 1/2: series in s^2. Else, with x = max(p, q) and e = e^-|d|, the same terms gathered:
    x / 2 [(1 + e) (ln 2 - log1p(e)) - |d| e], which loses less than a digit there. For e <= e^-1/2
    log1p(e) = 2 atanh(t), t = e / (2 + e), is a short series; a library logarithm costs thrice.
    """
    s2 = 0.25 * d * d
    near = 0.5 + s2 * (-0.25 + s2 * (1.0 / 9 + s2 * (-17.0 / 360 + s2 * (31.0 / 1575))))
    near *= s2 * (p + q) * 0.5
    t = e / (2.0 + e)
    t2 = t * t
    log = 2.0 + t2 * (2.0 / 3 + t2 * (2.0 / 5 + t2 * (2.0 / 7 + t2 * (2.0 / 9 + t2 * (2.0 / 11)))))
    far = (1.0 + e) * (0.6931471805599453 - t * log)
    far -= tl.minimum(tl.abs(d), 100.0) * e  # not inf * 0
    return tl.where(s2 < 0.0625, near, 0.5 * tl.maximum(p, q) * far)


@triton.jit
def kl_terms(x, y, e):
    """Terms y - x - x e >= 0 of KL(x||y), e = log y - log x; a series near e = 0."""
    near = 0.5 * x * e * e * exp_tail(e)
    terms = tl.where(tl.abs(e) < 0.5, near, y - x - x * e)
    return tl.where(x > 0.0, terms, y)


@triton.jit
def log_mix(d, e, weight):
    """log(w + (1 - w) e^d) = log1p((1 - w) (e^d - 1)) = d + log1p(w (e^-d - 1)), 0 < w < 1.

    With e = e^-|d|. The first form never cancels, the second never overflows.
    """
    large = d > 1.0
    x = tl.where(large, weight * (e - 1.0), (1.0 - weight) * expm1(tl.minimum(d, 1.0)))
    return log1p(x) + tl.where(large, d, 0.0)


@triton.jit
def difference(p, q, d):
    """q - p, without cancellation where they are near."""
    near = tl.abs(d) < 0.5
    small = tl.where(near, d, 0.0)
    return tl.where(near, p * (small + 0.5 * small * small * exp_tail(small)), q - p)


@triton.jit
def divergence_terms(p, q, d, e, weight, KIND: tl.constexpr, DETACH: tl.constexpr):
    """Terms of rowwise.values, and u = q dL/dq of rowwise.gradients: dL/dz = u - q sum u.

    The two share their logarithms. For KL(p||q) u is q - p, the gradient itself: the sum that is
    taken off is 0 but for rounding, which it takes off, too.
    """
    if KIND == "cross_entropy":  # no teacher, and its own terms are added elsewhere
        return p * 0.0, p * 0.0
    elif KIND == "kl_teacher_student":
        return kl_terms(p, q, d), difference(p, q, d)
    elif KIND == "kl_student_teacher":
        return kl_terms(q, p, -d), tl.where(q > 0.0, q * d, 0.0)
    elif KIND == "tvd":
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        return 0.5 * tl.abs(difference(p, q, d)), q * sign
    elif KIND == "skew_kl":
        mix = log_mix(d, e, weight)  # log m / p
        u = (weight - 1.0) * q * expm1(-mix)
        return kl_terms(p, weight * p + (1.0 - weight) * q, mix), u
    elif KIND == "skew_reverse_kl":
        mix = log_mix(-d, e, weight)  # log m / q
        u = mix if DETACH else mix + weight * expm1(-mix)
        value = kl_terms(q, (1.0 - weight) * p + weight * q, mix)
        return value, tl.where(q > 0.0, -q * u, 0.0)
    elif KIND == "jsd":
        return jsd_terms(p, q, d, e), tl.where(q > 0.0, -0.5 * q * log_mix(-d, e, 0.5), 0.0)
    else:
        tl.static_assert(KIND == "generalized_jsd")
        m, mix = weight * p + (1.0 - weight) * q, log_mix(-d, e, 1.0 - weight)
        value = weight * kl_terms(p, m, log_mix(d, e, weight)) + (1.0 - weight) * kl_terms(
            q, m, mix
        )
        return value, tl.where(q > 0.0, (weight - 1.0) * q * mix, 0.0)
