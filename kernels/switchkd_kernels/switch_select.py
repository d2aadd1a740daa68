"""Softmax, divergence, threshold and token of two models in one fused pass over both rows.

    d = JSD(softmax(z_t), softmax(z_s))      writer = teacher if d > threshold else student
    token = argmax_v(z_writer / T_writer + G(seed, sequence id, position, v))

A first sweep over the vocabulary leaves, for either model, maximum, sum of exponentials and the
largest perturbed logit; a second one, served by the cache as far as the rows fit, the divergence.
"""

import torch
from torch import Tensor

from switchkd_kernels import _arguments as arguments
from switchkd_kernels import _backend as backend
from switchkd_kernels import _checks as check
from switchkd_kernels import _cpu, _cuda, reference
from switchkd_kernels._tl import (
    combine,
    first_of_largest,
    is_distribution,
    last_to_arrive,
    load_block,
    load_pair,
    softmax_end,
    softmax_start,
    softmax_step,
    store_partial,
    tl,
    triton,
)
from switchkd_kernels._tl_noise import (
    lead_end,
    lead_start,
    lead_step,
    noise_bounds,
    noise_words,
    with_inverse,
)
from switchkd_kernels._tl_rowwise import compare, jsd_terms, kl_terms, pair_of
from switchkd_kernels.noise import STREAM_REDRAW, STREAM_TOKEN
from switchkd_kernels.reference import SwitchSelection

KNOWN, GREEDY, NOISE = 0, 1, 2  # how a model's token is found
_SHARED, _REDRAW = tl.constexpr(STREAM_TOKEN), tl.constexpr(STREAM_REDRAW)

# Launch parameters; benchmarks/sweep_kernels.py measures them. In blocks of 2048 a thread of 8
# warps has 8 logits of either row, one 16-byte load each in bf16; wider blocks spill or halve the
# occupancy, which is what holds published two-row kernels at a seventh of the bandwidth. Within 80
# registers nothing spills (kernel_resources.csv), and three programs share a multiprocessor; 64 and
# four spill in float16. Rows are split until there are four programs for each, so that one loads
# while another computes.
BLOCK, WARPS, REGISTERS, PROGRAMS_PER_PROCESSOR = 2048, 8, 80, 4


@triton.jit
def _scan(
    pair, start, end, V, seed, counter, temperatures,
    DRAW_T: tl.constexpr, DRAW_S: tl.constexpr, T_STREAM: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First sweep, over columns [start, end): (maximum, sum of exponentials, largest perturbed
    logit, its token) of either model."""
    t_lanes, s_lanes = softmax_start(BLOCK, GROUP), softmax_start(BLOCK, GROUP)
    t_place = tl.zeros((BLOCK // GROUP,), tl.int32) + start  # blocks where the maxima were met
    s_place = t_place
    t_lead, s_lead = lead_start(start, BLOCK), lead_start(start, BLOCK)
    for first in tl.range(start, end, BLOCK):
        zt, zs, _slope = load_pair(pair, first, V, 0, ROWS, BLOCK)
        t_top, s_top = t_lanes[0], s_lanes[0]
        t_lanes, s_lanes = softmax_step(zt, t_lanes, GROUP), softmax_step(zs, s_lanes, GROUP)
        if DRAW_T == 1:
            t_place = tl.where(t_lanes[0] > t_top, first, t_place)
        if DRAW_S == 1:
            s_place = tl.where(s_lanes[0] > s_top, first, s_place)
        if DRAW_S == 2:
            bounds = noise_bounds(noise_words(seed, first, counter, _SHARED, BLOCK))
            s_lead = lead_step(zs, temperatures[1][1], bounds, first, s_lead)
        if DRAW_T == 2:
            if (DRAW_S != 2) or (T_STREAM != _SHARED):
                bounds = noise_bounds(noise_words(seed, first, counter, T_STREAM, BLOCK))
            t_lead = lead_step(zt, temperatures[0][1], bounds, first, t_lead)
    teacher, student = softmax_end(t_lanes), softmax_end(s_lanes)
    t_best = float("-inf"), start * 0
    s_best = t_best
    if DRAW_T == 1:
        t_best = first_of_largest(pair[0], t_lanes[0], t_place, teacher[0], V, ROWS, BLOCK)
    if DRAW_S == 1:
        s_best = first_of_largest(pair[1], s_lanes[0], s_place, student[0], V, ROWS, BLOCK)
    if DRAW_T == 2:
        t_best = lead_end(
            pair[0], start, end, V, seed, counter, temperatures[0], None, t_lead,
            T_STREAM, False, ROWS, BLOCK,
        )  # fmt: skip
    if DRAW_S == 2:
        s_best = lead_end(
            pair[1], start, end, V, seed, counter, temperatures[1], None, s_lead,
            _SHARED, False, ROWS, BLOCK,
        )  # fmt: skip
    return teacher + t_best, student + s_best


@triton.jit
def _measure(
    pair, start, end, V, teacher, student, rival,
    METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second sweep, over columns [start, end) from the last block, which is still in the cache, to
    the first: the divergence in nats, or the teacher's rank of a token whose logit is `rival`."""
    terms = tl.zeros((BLOCK,), tl.float32)
    relation = pair_of(teacher, student)
    last = start + (tl.cdiv(end - start, BLOCK) - 1) * BLOCK
    for back in tl.range(0, end - start, BLOCK):
        first = last - back
        if METRIC == "rank":
            terms += (load_block(pair[0], first, V, ROWS, BLOCK) > rival).to(tl.float32)
        else:
            zt, zs, _slope = load_pair(pair, first, V, 0, ROWS, BLOCK)
            log_p, log_q, d = compare(zt, zs, relation)
            if METRIC == "kl":
                terms += kl_terms(tl.exp2(log_p), tl.exp2(log_q), tl.minimum(d, 100.0))
            else:
                value, _ = jsd_terms(log_p, log_q, d)
                terms += value
    total = tl.sum(terms, 0)
    return 0.5 * total if METRIC == "jsd" else total


@triton.jit
def _known(token_ptr, V, model):
    """`model` with a given token. A token out of range makes the total NaN, which flags the row."""
    token = tl.load(token_ptr)
    inside = (token >= 0) & (token < V)
    total = tl.where(inside, model[1], float("nan"))
    return model[0], total, model[2], tl.where(inside, token, 0).to(tl.int32)


@triton.jit
def _decide(
    pair, row, divergence, threshold, teacher, student, token_ptr, writer_ptr, value_ptr, rows,
    METRIC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    if METRIC == "kl":
        divergence = tl.minimum(divergence, 50.0)
    if METRIC == "jsd":  # rounding does not lift disjoint rows over one bit
        divergence = tl.minimum(divergence, 0.6931471805599453)
        if BITS:
            divergence = tl.minimum(divergence * 1.4426950408889634, 1.0)
    valid = is_distribution(teacher[1]) & is_distribution(student[1])
    from_teacher = (divergence > threshold) & valid
    token = tl.where(valid, tl.where(from_teacher, teacher[3], student[3]), 0)
    log_p = (tl.load(pair[0] + token).to(tl.float32) - teacher[0]) - tl.log(teacher[1])
    log_q = (tl.load(pair[1] + token).to(tl.float32) - student[0]) - tl.log(student[1])
    tl.store(token_ptr + row, tl.where(valid, token, -1).to(tl.int64))
    tl.store(writer_ptr + row, from_teacher.to(tl.uint8))
    tl.store(value_ptr + row, tl.where(valid, divergence, float("nan")))
    tl.store(value_ptr + rows + row, tl.where(valid, log_p, float("nan")))
    tl.store(value_ptr + 2 * rows + row, tl.where(valid, log_q, float("nan")))


# Rows and splits change from round to round of a decoder, and would be compiled anew; slice_size is
# always a multiple of BLOCK, which wide loads need to know.
@triton.jit(do_not_specialize=["seed", "rows", "splits"])
def _switch_select_kernel(
    teacher_ptr, student_ptr, threshold_ptr, id_ptr, position_ptr,  # in
    teacher_token_ptr, student_token_ptr,
    token_ptr, writer_ptr, value_ptr,  # out
    partial_ptr, partial_token_ptr,  # between the launches of a split
    rows, V, slice_size, splits,  # shapes
    stride_t, stride_s, stride_threshold, stride_id, stride_position, stride_tt, stride_st,
    seed: tl.int64,
    teacher_temperature, teacher_inverse, student_temperature, student_inverse,
    DRAW_T: tl.constexpr, DRAW_S: tl.constexpr, METRIC: tl.constexpr, BITS: tl.constexpr,
    PHASE: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PHASE "row": a program decides a row. Else one has a slice of it, "scan" and then "decide",
    where the last program of a row to arrive adds up and writes."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if PHASE == "decide":  # what was read last is still in the cache, and read first
        row, split = rows - 1 - row, splits - 1 - split
    pair = teacher_ptr + row * stride_t, student_ptr + row * stride_s
    start = split * slice_size
    end = tl.minimum(start + slice_size, V)
    place, step = row * splits + split, rows * splits
    T_STREAM: tl.constexpr = _REDRAW if METRIC == "rank" else _SHARED
    if PHASE != "decide":
        counter = tl.load(position_ptr + row * stride_position), tl.load(id_ptr + row * stride_id)
        teacher, student = _scan(
            pair, start, end, V, seed, counter,
            ((teacher_temperature, teacher_inverse), (student_temperature, student_inverse)),
            DRAW_T, DRAW_S, T_STREAM, GROUP, ROWS, BLOCK,
        )  # fmt: skip
    if PHASE == "scan":
        store_partial(partial_ptr, partial_token_ptr, place, step, teacher)
        store_partial(partial_ptr + 3 * step, partial_token_ptr + step, place, step, student)
        tl.store(partial_token_ptr + 2 * step + row, 0)  # arrivals; all slices store the same
    else:
        if PHASE == "decide":
            teacher = combine(partial_ptr, partial_token_ptr, row, rows, splits, SPLITS)
            student = combine(
                partial_ptr + 3 * step, partial_token_ptr + step, row, rows, splits, SPLITS
            )
        if DRAW_T == 0:
            teacher = _known(teacher_token_ptr + row * stride_tt, V, teacher)
        if DRAW_S == 0:
            student = _known(student_token_ptr + row * stride_st, V, student)
        rival = tl.load(pair[0] + student[3]).to(tl.float32)
        divergence = _measure(pair, start, end, V, teacher, student, rival, METRIC, ROWS, BLOCK)
        last = True
        if PHASE == "decide":
            measured_ptr = partial_ptr + 6 * step + row * splits
            tl.store(measured_ptr + split, divergence)
            last = last_to_arrive(partial_token_ptr + 2 * step + row, splits)
            if last:
                each = tl.arange(0, SPLITS)
                parts = measured_ptr + each
                # .cg: past the first-level cache, which may hold what was there before
                parts = tl.load(parts, mask=each < splits, other=0.0, cache_modifier=".cg")
                divergence = tl.sum(parts, 0)
        if last:
            threshold = tl.load(threshold_ptr + row * stride_threshold)
            _decide(
                pair, row, divergence, threshold, teacher, student,
                token_ptr, writer_ptr, value_ptr, rows, METRIC, BITS,
            )  # fmt: skip


def _splits(rows: int, vocab_size: int, device: torch.device) -> int:
    return backend.splits(rows, vocab_size, BLOCK, PROGRAMS_PER_PROCESSOR, device)


def _launch(
    teacher, student, threshold, ids, positions, teacher_token, student_token,
    seed, teacher_temperature, student_temperature, metric, bits, vocab_size, splits=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, device = teacher.shape[0], teacher.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    writer = torch.empty(rows, dtype=torch.uint8, device=device)
    values = torch.empty(3, rows, dtype=torch.float32, device=device)
    splits = splits or _splits(rows, vocab_size, device)
    slice_size, splits = backend.slices(vocab_size, BLOCK, splits)
    partial = partial_token = None
    if splits > 1:
        partial = torch.empty(7, rows, splits, dtype=torch.float32, device=device)
        partial_token = torch.empty(3, rows, splits, dtype=torch.int32, device=device)

    layout = backend.layout(vocab_size, BLOCK, teacher, student)
    options = backend.options(WARPS, device, REGISTERS)

    def draw(known: Tensor | None, temperature: float) -> int:
        return KNOWN if known is not None else GREEDY if temperature == 0 else NOISE

    draws = draw(teacher_token, teacher_temperature), draw(student_token, student_temperature)
    teacher_token = ids if teacher_token is None else teacher_token
    student_token = ids if student_token is None else student_token
    with backend.on(device):
        for phase in ("row",) if splits == 1 else ("scan", "decide"):
            # Of what is decided later the scan needs to know only whose noise it is.
            scan = phase == "scan"
            _switch_select_kernel[(rows, splits)](
                teacher, student, threshold, ids, positions, teacher_token, student_token,
                token, writer, values, partial, partial_token,
                rows, vocab_size, slice_size, splits,
                teacher.stride(0), student.stride(0), threshold.stride(0), ids.stride(0),
                positions.stride(0), teacher_token.stride(0), student_token.stride(0),
                seed, *with_inverse(teacher_temperature), *with_inverse(student_temperature),
                *draws, "jsd" if scan and metric != "rank" else metric,
                bits and metric == "jsd" and not scan,
                PHASE=phase, SPLITS=backend.MOST_SPLITS if phase == "decide" else 1,
                BLOCK=BLOCK, **layout, **options,
            )  # fmt: skip
    return token, writer.view(torch.bool), *values


_LAUNCH = {
    "triton": _launch,
    "cpu": _cpu.switch_select,
    "cuda": _cuda.switch_select,
    "reference": reference.select,
}


@torch.library.custom_op("switchkd::switch_select", mutates_args=())
def _op(
    teacher: Tensor, student: Tensor, threshold: Tensor, ids: Tensor, positions: Tensor,
    teacher_token: Tensor | None, student_token: Tensor | None,
    seed: int, teacher_temperature: float, student_temperature: float,
    metric: str, bits: bool, vocab_size: int, impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op as torch.compile sees it; arguments are those of `_launch`, checked before."""
    token, writer, *values = _LAUNCH[backend.choose(impl, teacher, student, cuda=True)](
        teacher, student, threshold, ids, positions, teacher_token, student_token,
        seed, teacher_temperature, student_temperature, metric, bits, vocab_size,
    )  # fmt: skip
    return token, writer, *(value.clone() for value in values)  # outputs must not share memory


@_op.register_fake
def _(teacher, student, *args):
    rows = teacher.shape[0]
    value = teacher.new_empty(rows, dtype=check.compute_dtype(teacher, student))
    token = teacher.new_empty(rows, dtype=torch.int64)
    writer = teacher.new_empty(rows, dtype=torch.bool)
    return token, writer, value, torch.empty_like(value), torch.empty_like(value)


def switch_select(
    teacher_logits: Tensor,
    student_logits: Tensor,
    threshold: Tensor | float,
    *,
    seed: int,
    sequence_ids: Tensor | int | list[int],
    positions: Tensor | int | list[int],
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    metric: str = "jsd",
    base: int | str = 2,
    teacher_token: Tensor | None = None,
    student_token: Tensor | None = None,
    vocab_size: int | None = None,
    impl: str | None = None,
) -> SwitchSelection:
    """Decide for M positions which model writes, and the token it writes: a SwitchSelection.

    Its fields, (M,) each: token int64, from_teacher bool, and in float32 (float64 for float64)
    divergence, teacher_logprob and student_logprob, of the token in nats, untempered.
    The teacher writes iff divergence > threshold, (M,) or a number, +-inf allowed; equality is the
    student's (SWITCH, arXiv 2410.19503, Algorithm 1). The divergence compares the full softmax of
    (M, Vt) `teacher_logits` and (M, Vs) `student_logits` over the shared vocabulary, untempered:
    "jsd" in units of `base` (2 or "e"), "kl" = KL(p||q) in nats cut at 50 (AdaSwitch, arXiv
    2510.07842), or "rank", the number of tokens that the teacher likes strictly better than the
    student's draw (SKD, arXiv 2410.11325: kept iff rank <= K - 1).
    Both draws are argmax(z / T + G) with one G, so each marginal is exact and the token does not
    depend on which model was run first. Rank alone looks at a drawn token: a token refused by rank
    says something about G, so the teacher's redraw takes noise of its own (STREAM_REDRAW).
    `teacher_token`, `student_token` (M,) replace that model's draw, e.g. by one from `sample`, and
    save its noise. `sequence_ids`, `positions`: (M,) integers or one integer. impl: None (Triton
    for float32, float16 and bfloat16 on a GPU, native code for float32 and bfloat16 on a CPU, else
    reference), "triton", "cpu", "cuda" (C++ for NVIDIA GPUs, csrc/cuda) or "reference".
    Raises ValueError and TypeError, and InvalidLogits (with model and row) on a CPU. On a GPU
    nothing waits for the device: a row of logits that defines no distribution, or a known token
    out of range, comes back as token -1 with NaN; ids, positions and NaN thresholds that are
    already on the device are not checked. Rows may have any stride.
    """
    args = arguments.selection(
        teacher_logits, student_logits, threshold, seed=seed, sequence_ids=sequence_ids,
        positions=positions, teacher_temperature=teacher_temperature,
        student_temperature=student_temperature, metric=metric, base=base,
        teacher_token=teacher_token, student_token=student_token, vocab_size=vocab_size,
    )  # fmt: skip
    chosen = backend.choose(impl, teacher_logits, student_logits, cuda=True)
    if torch.compiler.is_compiling() or check.valueless(teacher_logits, student_logits):
        return SwitchSelection(*_op(*args, impl))
    return SwitchSelection(*_LAUNCH[chosen](*args))
