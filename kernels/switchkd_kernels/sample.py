"""Tokens drawn from logits after top-k, top-p and min-p, without a sort.

    x = z / T      token = argmax of x_v + G(seed, sequence id, position, v) over the kept v

Every filter keeps all tokens from some value of x up, ties included: below a token that is not kept
none is. So the value need not be known. Draw from a superset and look at the winner alone; if it is
not kept, draw again from what lies strictly above it. A winner that is kept has won against every
kept token. Noise does not change from round to round, and a filter that leaves the mass m refuses
the first winner with probability 1 - m. Top-k alone finds its value first, by bisection.
"""

import math

import torch
from torch import Tensor

from switchkd_kernels import _arguments as arguments
from switchkd_kernels import _backend as backend
from switchkd_kernels import _checks as check
from switchkd_kernels import _cpu, reference
from switchkd_kernels._tl import (
    combine,
    exp,
    first_of_largest,
    is_distribution,
    last_to_arrive,
    load_block,
    softmax_end,
    softmax_start,
    softmax_step,
    store_partial,
    tl,
    triton,
)
from switchkd_kernels._tl_noise import (
    kept,
    lead_end,
    lead_start,
    lead_step,
    noise_bounds,
    noise_words,
    tempered,
    with_inverse,
)
from switchkd_kernels.noise import STREAM_TOKEN

# In blocks of 2048 a thread of 8 warps has 8 logits, one 16-byte load in bf16, and less than 128
# registers with nothing spilled, so that two programs share a multiprocessor; blocks of 4096 take
# more than that. Filters look at a row several times, in one program; without one it takes less
# than 64 registers, and few rows are split until four programs share a multiprocessor.
BLOCK, WARPS, PROGRAMS_PER_PROCESSOR = 2048, 8, 4


@triton.jit
def _draw(
    row_ptr, start, end, V, limits, seed, counter, temperature,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, STREAM: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of e^(x - maximum), largest x + G, its token) of the x that `limits` keep in
    columns [start, end); of z and the largest z / T + G where not FILTERED."""
    lanes = softmax_start(BLOCK, GROUP)
    places = tl.zeros((BLOCK // GROUP,), tl.int32) + start  # blocks where the maxima were met
    lead = lead_start(start, BLOCK)
    top = float("-inf")
    for first in tl.range(start, end, BLOCK):
        x = load_block(row_ptr, first, V, ROWS, BLOCK)
        inverse, can_win = temperature[1], True
        if FILTERED:
            x, inverse = kept(tempered(x, temperature), limits), 1.0
            block_top = tl.max(x, 0)
            can_win = block_top >= top - 26.0  # noise is from -2.9 to 22.9
            top = tl.maximum(top, block_top)
        tops = lanes[0]
        lanes = softmax_step(x, lanes, GROUP)
        if GREEDY:
            places = tl.where(lanes[0] > tops, first, places)
        else:
            if can_win:
                bounds = noise_bounds(noise_words(seed, first, counter, STREAM, BLOCK))
                lead = lead_step(x, inverse, bounds, first, lead)
    row = softmax_end(lanes)
    if GREEDY:
        best = first_of_largest(row_ptr, lanes[0], places, row[0], V, ROWS, BLOCK)
    else:
        best = lead_end(
            row_ptr, start, end, V, seed, counter, temperature, limits, lead,
            STREAM, FILTERED, ROWS, BLOCK,
        )  # fmt: skip
    return row + best


@triton.jit
def _mass_above(
    row_ptr, V, temperature, value, top, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum of e^(x - top) over x > value: 0, or at least 1, as the maximum is among them."""
    terms = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, V, BLOCK):
        x = tempered(load_block(row_ptr, first, V, ROWS, BLOCK), temperature)
        terms += tl.where(x > value, exp(x - top), 0.0)
    return tl.sum(terms, 0)


@triton.jit
def _count(row_ptr, V, pivot, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits are at least `pivot` > -inf, the least of them, and the most below it."""
    count = tl.zeros((BLOCK,), tl.int32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    most = -least
    for first in tl.range(0, V, BLOCK):
        z = load_block(row_ptr, first, V, ROWS, BLOCK)
        count += (z >= pivot).to(tl.int32)
        least = tl.minimum(least, tl.where(z >= pivot, z, float("inf")))
        most = tl.maximum(most, tl.where(z < pivot, z, float("-inf")))
    return tl.sum(count, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _ordered(bits):
    """Bits of a float32 to an int32 of the same order; the same step leads back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(row_ptr, V, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The logit of rank k < V, exactly: bisection on its bits in order. The bracket shrinks to
    logits that are there: about 15 sweeps, at most 17 for logits of 16 bits and 32 for others."""
    low, high = -0x7F800001, 0x7F800000  # -inf and +inf
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, within 32 bits
        pivot = _ordered(middle).to(tl.float32, bitcast=True)
        count, least, most = _count(row_ptr, V, pivot, ROWS, BLOCK)
        # Beyond the middle at least: -0 and +0 are equal and differ in bits, NaN may leave nothing.
        least = tl.maximum(_ordered(least.to(tl.int32, bitcast=True)), middle)
        most = tl.minimum(_ordered(most.to(tl.int32, bitcast=True)), middle - 1)
        low = tl.where(count >= k, least, low)
        high = tl.where(count > k, high, tl.where(count == k, least, most))
    return _ordered(low).to(tl.float32, bitcast=True)


# One kernel serves any number of rows: rows and splits are the grid's, slice_size is always a
# multiple of BLOCK, which wide loads need to know, and SPLITS is the most there may be.
@triton.jit(do_not_specialize=["seed"])
def _sample_kernel(
    logits_ptr, id_ptr, position_ptr, token_ptr, partial_ptr, partial_token_ptr,
    V, slice_size, stride, stride_id, stride_position,
    seed: tl.int64, temperature, inverse, top_k, top_p, log_min_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    STREAM: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program draws for a row; where SPLITS is not 1, for a slice of it, and the last of a row to
    arrive compares the draws. floor: what top-k and min-p keep starts here; below: the last winner,
    refused; limit: the mass above a token for which top-p refuses it."""
    FILTERED: tl.constexpr = TOP_K or TOP_P or MIN_P
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    start, end, last = 0, V, True
    if SPLITS > 1:
        start = tl.program_id(1) * slice_size
        end = tl.minimum(start + slice_size, V)
    counter = tl.load(position_ptr + row * stride_position), tl.load(id_ptr + row * stride_id)
    T = temperature, inverse
    floor, below, limit, token = float("-inf"), float("-inf"), 0.0, V * 0
    if TOP_K:
        floor = tempered(_kth_largest(row_ptr, V, top_k, ROWS, BLOCK), T)
    rejected = True
    while rejected:
        top, mass, best, token = _draw(
            row_ptr, start, end, V, (floor, below), seed, counter, T,
            GREEDY, FILTERED, STREAM, GROUP, ROWS, BLOCK,
        )  # fmt: skip
        rejected = False
        if FILTERED:
            # The maximum is the same in every round, the mass largest in the first: that of all
            # that top-k leaves, of which top-p keeps its share.
            value = tempered(tl.load(row_ptr + token).to(tl.float32), T)
            floor = tl.maximum(floor, top + log_min_p)
            rejected = value < floor
            if TOP_P:
                limit = tl.maximum(limit, top_p * mass)
                above = _mass_above(row_ptr, V, T, value, top, ROWS, BLOCK)
                rejected = rejected | (above >= limit)
            rejected = rejected & is_distribution(mass)
            below = value
        if SPLITS > 1:  # nothing is refused without a filter
            rows, splits = tl.num_programs(0), tl.num_programs(1)
            place, step = row * splits + tl.program_id(1), rows * splits
            store_partial(partial_ptr, partial_token_ptr, place, step, (top, mass, best, token))
            last = last_to_arrive(token_ptr + row, splits)  # counted where the token will be
            if last:
                drawn = combine(partial_ptr, partial_token_ptr, row, rows, splits, SPLITS)
                mass, token = drawn[1], drawn[3]
        token = tl.where(is_distribution(mass), token, -1)
    if last:
        tl.store(token_ptr + row, token.to(tl.int64))


def _launch(
    logits, ids, positions, seed, temperature, top_k, top_p, min_p, vocab_size, stream, model=None
) -> Tensor:
    rows, device = logits.shape[0], logits.device
    greedy = temperature == 0
    filters = {
        "TOP_K": 0 < top_k < vocab_size and not greedy,
        "TOP_P": top_p < 1 and not greedy,
        "MIN_P": min_p > 0 and not greedy,
    }
    splits = 1
    if not any(filters.values()):
        splits = backend.splits(rows, vocab_size, BLOCK, PROGRAMS_PER_PROCESSOR, device)
    slice_size, splits = backend.slices(vocab_size, BLOCK, splits)
    partial = partial_token = None
    if splits > 1:
        partial = torch.empty(3, rows, splits, dtype=torch.float32, device=device)
        partial_token = torch.empty(rows, splits, dtype=torch.int32, device=device)
    # Slices count their arrivals from zero, and to write that is a launch, as a kernel to compare
    # their draws would be; but one that reads nothing, and not a second one of Triton's.
    token = (torch.empty if splits == 1 else torch.zeros)(rows, dtype=torch.int64, device=device)
    with backend.on(device):
        _sample_kernel[(rows, splits)](
            logits, ids, positions, token, partial, partial_token,
            vocab_size, slice_size, logits.stride(0), ids.stride(0), positions.stride(0),
            seed, *with_inverse(temperature or 1.0), top_k if top_k < vocab_size else 0,
            max(top_p, 1e-30),  # either keeps the maximum alone, but 0 would keep nothing
            math.log(min_p) if min_p else -math.inf,
            GREEDY=greedy, **filters,
            STREAM=stream, SPLITS=1 if splits == 1 else backend.MOST_SPLITS,
            BLOCK=BLOCK, **backend.layout(vocab_size, BLOCK, logits),
            **backend.options(WARPS, device),
        )  # fmt: skip
    return token


_LAUNCH = {"triton": _launch, "cpu": _cpu.sample, "reference": reference.draw}


@torch.library.custom_op("switchkd::sample", mutates_args=())
def _op(
    logits: Tensor, ids: Tensor, positions: Tensor,
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float,
    vocab_size: int, stream: int, model: str, impl: str | None,
) -> Tensor:  # fmt: skip
    """The op as torch.compile sees it; arguments are those of `_launch`, checked before. What was
    exported may run in another process, or on another device: it chooses there."""
    return _LAUNCH[backend.choose(impl, logits)](
        logits, ids, positions, seed, temperature, top_k, top_p, min_p, vocab_size, stream, model
    )


@_op.register_fake
def _(logits, *args):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def sample(
    logits: Tensor,
    *,
    seed: int,
    sequence_ids: Tensor | int | list[int],
    positions: Tensor | int | list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
    stream: int = STREAM_TOKEN,
    model: str = "student",
    impl: str | None = None,
) -> Tensor:
    """(M,) int64 tokens drawn from (M, Vp) logits: a function of (logits, seed, id, position).

    y = argmax(z / T + G) over the first `vocab_size` columns (default all), after the filters in
    the order of Hugging Face transformers: temperature, top_k (0 is off), top_p (1 is off), min_p
    (0 is off); tokens that tie with a filter's threshold all stay. Temperature 0 is greedy, the
    first of equal logits, and looks at no filter. Source: Maddison et al. 2014 (Gumbel-max).
    `sequence_ids` and `positions` are (M,) integers or one integer; `stream` picks one of 256
    independent fields G; `model` is named in errors. impl: None (Triton for float32, float16 and
    bfloat16 on a GPU, native code for float32 and bfloat16 on a CPU, else reference), "triton",
    "cpu" or "reference".
    Raises ValueError and TypeError, and InvalidLogits on a CPU. On a GPU nothing waits for
    the device: a row that defines no distribution (NaN, +inf, all -inf, or z / T beyond float32
    where it is filtered) comes back as token -1; ids and positions that are already on the device
    are not checked. Rows may have any stride.
    """
    args = arguments.sampling(
        logits, seed=seed, sequence_ids=sequence_ids, positions=positions, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, vocab_size=vocab_size, stream=stream, model=model,
    )  # fmt: skip
    chosen = backend.choose(impl, logits)
    if torch.compiler.is_compiling() or check.valueless(logits):
        return _op(*args, impl)
    return _LAUNCH[chosen](*args)
