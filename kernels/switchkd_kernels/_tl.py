"""Triton and the device functions that the kernels share: logarithms, loads, softmax, slices.

Where Triton is not installed a stand-in lets kernels be defined, never run. Float32 throughout.
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
def _log_split(w):
    """(n 2^23, f) with w = 2^n (1 + f), 1 + f in [1/sqrt 2, sqrt 2), for w > 0: integer steps."""
    bits = w.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000
    return power, (bits - power).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _log_bend(f):
    """log(1 + f) - f for 1/sqrt 2 <= 1 + f < sqrt 2: minimax, within 3e-7 of itself."""
    b = -0.14212730526924133 + f * 0.0890195295214653
    b = 0.14820295572280884 + f * b
    b = -0.1658124178647995 + f * b
    b = 0.19972553849220276 + f * b
    b = -0.25001394748687744 + f * b
    b = 0.33333665132522583 + f * b
    b = -0.4999999701976776 + f * b
    return f * f * b


@triton.jit
def log(w):
    """log w for w > 0 that is normal and finite; the library's costs twice as much."""
    power, f = _log_split(w)
    return power.to(tl.float32) * 8.262958294867817e-08 + (f + _log_bend(f))


@triton.jit
def log1p_parts(x):
    """(log(1 + x), whether 1 + x in [1/sqrt 2, sqrt 2), there log(1 + x) - x) for x > -1.

    There what rounding takes from 1 + x does not enter, and the last has all its digits.
    """
    power, f = _log_split(1.0 + x)
    near = power == 0
    f = tl.where(near, x, f)
    b = _log_bend(f)
    return power.to(tl.float32) * 8.262958294867817e-08 + (f + b), near, b


@triton.jit
def log1p(x):
    value, _near, _bend = log1p_parts(x)
    return value


@triton.jit
def exp_bend(x):
    """(e^x - 1 - x) / x^2 for |x| < 1/2: minimax, within 2e-8 of itself."""
    s = 0.0013981998199597 + x * 0.00019875625730492175
    s = 0.008333452045917511 + x * s
    s = 0.04166579619050026 + x * s
    s = 0.1666666567325592 + x * s
    return 0.5 + x * s


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + x * x * exp_bend(x), exp(x) - 1.0)


# ------------------------------------------------------------------------------- softmax


@triton.jit
def in_order(w0, w1, w2, w3):
    """Four (N,) tensors to (4 N,): element 4 i + k is the i-th of the k-th."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * w0.shape[0],))


@triton.jit
def _load_columns(ptr, columns, end, FILL: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        z = tl.load(ptr + columns, mask=columns < end, other=FILL)
    else:
        z = tl.load(ptr + columns)
    return z.to(tl.float32)


@triton.jit
def load(
    ptr, first, end, FILL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries from `first` on in float32, FILL from `end` on. Of a ragged row a thread loads
    one entry at a time; by four loads of every fourth it still has four neighbours, which softmax
    and noise then need not collect from other threads."""
    if ROWS == "ragged":
        fourth = first + 4 * tl.arange(0, BLOCK // 4)
        z = in_order(
            _load_columns(ptr, fourth, end, FILL, MASKED),
            _load_columns(ptr + 1, fourth, end - 1, FILL, MASKED),
            _load_columns(ptr + 2, fourth, end - 2, FILL, MASKED),
            _load_columns(ptr + 3, fourth, end - 3, FILL, MASKED),
        )
    else:
        z = _load_columns(ptr, first + tl.arange(0, BLOCK), end, FILL, MASKED)
    return z


@triton.jit
def _load_even(row_ptr, first, end, BLOCK: tl.constexpr):
    """As `load`, of a row of logits that begins at a multiple of 16 bytes, for `first` and `end`
    that are multiples of 16: a mask leaves its loads 16 bytes wide, so that there is no branch and
    they are on their way while other work is done. Two bfloat16, each the upper half of a float32,
    are read as one integer: to take it apart costs one instruction for each."""
    if row_ptr.dtype.element_ty == tl.bfloat16:
        pairs = first // 2 + tl.arange(0, BLOCK // 2)
        ptr = row_ptr.to(tl.pointer_type(tl.uint32))
        two = tl.load(ptr + pairs, mask=pairs < end // 2, other=0xFF80FF80)  # -inf
        low = (two << 16).to(tl.float32, bitcast=True)
        z = tl.interleave(low, (two & 0xFFFF0000).to(tl.float32, bitcast=True))
    else:
        z = load(row_ptr, first, end, float("-inf"), True, "even", BLOCK)
    return z


@triton.jit
def load_block(row_ptr, first, end, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one row's logits, -inf from `end` on. Where rows are not even it is only masked
    where it must be; a sweep written out for whole blocks and for the rest would be twice the
    code."""
    if ROWS == "even":
        z = _load_even(row_ptr, first, end, BLOCK)
    elif first + BLOCK <= end:
        z = load(row_ptr, first, end, float("-inf"), False, ROWS, BLOCK)
    else:
        z = load(row_ptr, first, end, float("-inf"), True, ROWS, BLOCK)
    return z


@triton.jit
def load_pair(pair, first, end, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of (teacher, student) logits, as `load_block`, and the slope of the student's. pair:
    the two row pointers; where HEAD is not 0 they point at h W^T, and two bias pointers, a scale
    and a cap follow: z = cap tanh(scale (h W^T + b) / cap), slope = dz / d(h W^T). HEAD is a sum:
    teacher bias 1, student bias 2, scale 4, cap 8, no teacher 16."""
    if ROWS == "even":
        zt, zs, slope = _load_both(pair, first, end, HEAD, ROWS, True, BLOCK)
    elif first + BLOCK <= end:
        zt, zs, slope = _load_both(pair, first, end, HEAD, ROWS, False, BLOCK)
    else:
        zt, zs, slope = _load_both(pair, first, end, HEAD, ROWS, True, BLOCK)
    return zt, zs, slope


@triton.jit
def _load_both(
    pair, first, end, HEAD: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    zs, slope = _head_logits(pair, 1, first, end, HEAD, ROWS, MASKED, BLOCK)
    zt = zs
    if not HEAD & 16:
        zt, _slope = _head_logits(pair, 0, first, end, HEAD, ROWS, MASKED, BLOCK)
    return zt, zs, slope


@triton.jit
def _head_logits(
    pair, SIDE: tl.constexpr, first, end, HEAD: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if ROWS == "even":
        z = _load_even(pair[SIDE], first, end, BLOCK)
    else:
        z = load(pair[SIDE], first, end, float("-inf"), MASKED, ROWS, BLOCK)
    if HEAD & (1 << SIDE):
        z += load(pair[2 + SIDE], first, end, 0.0, MASKED, ROWS, BLOCK)
    slope = tl.full((), 1.0, tl.float32)
    if HEAD & 4:
        z *= pair[4]
        slope = pair[4]
    if HEAD & 8:  # tanh |x| = -t / (2 + t), t = e^(-2 |x|) - 1, and its slope 4 (1 + t) / (2 + t)^2
        x = tl.abs(z) * (-2.0 / pair[5])
        t = expm1(x)
        root = tl.rsqrt(2.0 + t)  # its square, with a step of Newton's: cheaper than a division
        inverse = root * root
        inverse = tl.fma(inverse, tl.fma(-2.0 - t, inverse, 1.0), inverse)
        slope *= 4.0 * exp(x) * (inverse * inverse)  # 1 - tanh^2 would cancel
        z = pair[5] * (tl.where(z < 0.0, t, -t) * inverse)
        if MASKED:  # the cap has made -inf finite
            z = tl.where(first + tl.arange(0, BLOCK) < end, z, float("-inf"))
    return z, slope


@triton.jit
def softmax_start(BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(maximum, sum of e^(z - maximum)) of nothing, for each GROUP neighbours of BLOCK logits.

    GROUP logits that one load brings to a thread share a maximum: a sweep then needs no reduction
    between threads, no barrier and little more than one exponential a logit.
    """
    top = tl.full((BLOCK // GROUP,), -3.4028234663852886e38, tl.float32)
    return top, tl.zeros((BLOCK // GROUP,), tl.float32)


@triton.jit
def softmax_step(z, lanes, GROUP: tl.constexpr):
    """`lanes` after one more block."""
    top, total = lanes
    z = tl.reshape(z, (z.shape[0] // GROUP, GROUP))
    new = tl.maximum(top, tl.max(z, 1))
    return new, total * exp(top - new) + tl.sum(exp(z - new[:, None]), 1)


@triton.jit
def softmax_end(lanes):
    """Maximum and sum of e^(z - maximum) of a row. For a row that defines no distribution the sum
    is NaN (it holds a NaN or +inf) or 0 (all -inf): `is_distribution` tells."""
    top = tl.max(lanes[0], 0)
    return top, tl.sum(lanes[1] * exp(lanes[0] - top), 0)


@triton.jit
def first_of_largest(
    row_ptr, tops, places, top, end, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(largest logit, its first token) of a row whose groups of lanes met their largest, `tops`,
    in the blocks that start at `places`."""
    place = tl.min(tl.where(tops == top, places, end), 0)
    z = load_block(row_ptr, place, end, ROWS, BLOCK)
    token = tl.min(tl.where(z == top, place + tl.arange(0, BLOCK), end - 1), 0)
    return top, token  # the last token of a row that has no largest


@triton.jit
def is_distribution(total):
    return (total > 0.0) & (total < float("inf"))


# ------------------------------------------------------------------------------- rows in slices


@triton.jit
def combine(partial_ptr, token_ptr, row, rows, splits, SPLITS: tl.constexpr):
    """(maximum, sum of exponentials, best value, its token) of a row, from those of its slices."""
    each = tl.arange(0, SPLITS)
    place, inside = row * splits + each, each < splits
    step = rows * splits
    tops = tl.load(partial_ptr + place, mask=inside, other=float("-inf"))
    totals = tl.load(partial_ptr + step + place, mask=inside, other=0.0)
    bests = tl.load(partial_ptr + 2 * step + place, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    total = tl.sum(totals * exp(tops - tl.where(top == float("-inf"), 0.0, top)), 0)
    best, index = tl.max(bests, 0, return_indices=True)
    return top, total, best, tl.load(token_ptr + row * splits + index)


@triton.jit
def store_partial(partial_ptr, token_ptr, place, step, model):
    tl.store(partial_ptr + place, model[0])
    tl.store(partial_ptr + step + place, model[1])
    tl.store(partial_ptr + 2 * step + place, model[2])
    tl.store(token_ptr + place, model[3])


@triton.jit
def last_to_arrive(count_ptr, splits):
    """Whether all other slices of a row have been here; what they stored before is then seen."""
    tl.debug_barrier()  # what any thread stored comes before the arrival
    return tl.atomic_add(count_ptr, 1, sem="acq_rel") == splits - 1
