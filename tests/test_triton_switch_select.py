"""The Triton kernel of switch_select against the reference in float64, decision by decision."""

import math
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, MIXED, check_close, logits, poisoned
from switchkd_kernels import _backend, _tl_noise, noise, reference, switch_select
from test_reference_noise import chi_square

pytest.importorskip("triton")
kernel = sys.modules["switchkd_kernels.switch_select"]  # the package's attribute is the function
INF, NAN = math.inf, math.nan
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ON_CPU = DEVICE == "cpu"  # in the interpreter, where a block of a row takes tens of milliseconds
WIDE = 2**14 if ON_CPU else 2048  # long rows are cut into few blocks there
KNOWN = torch.tensor([0, 36, 7, 19, 3, 36], device=DEVICE)
GOOD = torch.zeros(2, 3, device=DEVICE)
GREEDY = {"teacher_temperature": 0, "student_temperature": 0}


def where(rows):
    """Key and counters that use all of their bits."""
    n = torch.arange(rows, device=DEVICE)
    return {"seed": 2**64 - 3, "sequence_ids": n * (2**33 + 1) + 5, "positions": 2**32 - 1 - 7 * n}


def select(teacher, student, threshold, **options):
    with poisoned():  # what is left unwritten shows
        options = {"impl": "triton"} | where(len(teacher)) | options
        return switch_select(teacher, student, threshold, **options)


def same(a, b):
    """Equal in every value, NaN included, and of one type."""
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    return all(x.dtype == y.dtype and x.allclose(y, **exactly) for x, y in zip(a, b, strict=True))


@pytest.fixture
def cut(monkeypatch):
    """Sets the width of a block and the number of programs a row."""

    def cut(block=kernel.BLOCK, splits=1):
        monkeypatch.setattr(kernel, "BLOCK", block)
        monkeypatch.setattr(kernel, "_splits", lambda *_: splits)

    cut()
    return cut


def check(teacher, student, threshold=None, *, close=0, **options):
    """The kernel against the reference in float64: writer and token exactly, but for `close` rows
    where rounding may decide. The default threshold: half and twice the divergence, in turn."""
    options = where(len(teacher)) | options
    wide = teacher.double(), student.double()
    if threshold is None:
        threshold = reference.switch_select(*wide, 0.0, **options).divergence
        threshold = threshold * (0.5 + 1.5 * (torch.arange(len(teacher), device=DEVICE) % 2))
    want = reference.switch_select(*wide, threshold, **options)
    plain = reference.switch_select(teacher.float(), student.float(), threshold, **options)
    got = select(teacher, student, threshold, **options)
    assert [x.dtype for x in got] == [torch.int64, torch.bool, F32, F32, F32]
    ok = (got.token == want.token) & (got.from_teacher == want.from_teacher)
    assert int((~ok).sum()) <= close
    for i, scale in ((2, 0), (3, 1), (4, 1)):  # log p near 0 is a difference of larger numbers
        check_close(got[i][ok], plain[i][ok], want[i][ok], what=got._fields[i], scale=scale)
    return got


@pytest.mark.parametrize(("rows", "V", "dtype", "block", "splits", "options"), [
    (1, 1, F32, 2048, 1, {}),  # the smallest
    (4, 7, F16, 4, 2, {}),
    (4, 4097, F32, 2048, 1, {}),  # one over a block: the last has a single column
    (2, 4097, F16, 2048, 2, {}),
    (4, 4097, BF16, 2048, 3, {}),
    (1, 4097, F32, 256, 17, {}),  # as many programs as blocks, not a power of two
    (1, 32000, BF16, 2048, 1, {}),  # vocabularies of Llama 2, GPT-2, Llama 3, Qwen
    (3, 50257, F32, WIDE, 2, {}), (2, 128256, F16, WIDE, 1, {}),
    (2, 151936, F32, WIDE, 5, {}), (2, 151936, BF16, WIDE, 1, {}),
    (8, 37, F32, 32, 1, {"base": "e"}),
    (8, 37, F32, 32, 2, {"metric": "kl"}), (8, 37, F32, 32, 2, {"metric": "rank"}),
    (8, 37, BF16, 64, 1, {"metric": "rank", "student_temperature": 0.5}),
    (8, 37, F32, 32, 1, {"teacher_temperature": 0.7, "student_temperature": 1.3}),
    (8, 37, BF16, 32, 2, {"teacher_temperature": 5.0, "student_temperature": 0}),
    (4, 37, F32, 64, 1, {"teacher_temperature": 0, "student_temperature": 1e-5}),
    (6, 37, F32, 32, 2, {"teacher_token": KNOWN}),
    (6, 37, F32, 64, 1, {"metric": "kl", "student_token": KNOWN}),
    (6, 37, F16, 64, 1, {"metric": "rank", "student_token": KNOWN}),
    (6, 37, BF16, 64, 1, {"teacher_token": KNOWN, "student_token": KNOWN.flip(0)}),
])  # fmt: skip
def test_equals_the_reference(cut, rows, V, dtype, block, splits, options):
    case = logits(rows, V, dtype, **MIXED)
    cut(block, splits)
    got = check(*case, **options)
    if splits > 1:
        cut(block)
        assert same(check(*case, **options)[:2], got[:2])


def test_greedy_takes_the_first_of_equal_logits(cut):
    cut(8, 2)
    z = torch.randn(6, 30, device=DEVICE).round().clamp(-1, 1)  # ties in and across slices
    z[0] = 0
    got = check(z, z.flip(0), torch.tensor([INF, -INF] * 3), **GREEDY)
    writer = torch.where(got.from_teacher[:, None], z, z.flip(0)).tolist()
    assert got.token.tolist() == [row.index(max(row)) for row in writer]


def test_equality_is_the_students(cut):
    case = [z.expand(5, -1) for z in logits(1, 20)]
    d = select(*case, 0.0).divergence[0]
    below, above = (torch.nextafter(d, d.new_tensor(end)) for end in (-INF, INF))
    tau = torch.stack([d, below, above, d * -INF, d * INF])
    assert select(*case, tau).from_teacher.tolist() == [False, True, False, True, False]
    z = case[0].mul(256).round() / 256  # so that the shift is exact
    for metric, student in (("jsd", z), ("jsd", z + 64), ("kl", z + 64), ("rank", z)):
        got = select(z, student, 0.0, metric=metric, **GREEDY)
        assert got.divergence.tolist() == [0] * 5 and not bool(got.from_teacher.any())


def test_disjoint_rows_are_one_bit_apart_and_not_over_one(cut):
    cut(32)
    teacher, student = (3 * torch.randn(6, 45, device=DEVICE) for _ in range(2))
    teacher[:, 22:], student[:, :22] = -INF, -INF
    got = select(teacher, student, 1.0, **GREEDY)
    assert 1 - 3e-7 < float(got.divergence.min()) <= float(got.divergence.max()) <= 1
    assert not bool(got.from_teacher.any()) and bool((got.teacher_logprob == -INF).all())
    got = select(teacher, student, 50.0, metric="kl", **GREEDY)  # AdaSwitch cuts at 50 nats
    assert got.divergence.tolist() == [50.0] * 6 and not bool(got.from_teacher.any())


def test_near_equal_rows_keep_their_digits(cut):
    """Thresholds fall below 1e-6, where a difference of float32 entropies has no digit left."""
    case = logits(6, 1500, F32, spread=(0.3, 3e-3, 3e-4))
    want = reference.switch_select(*(z.double() for z in case), 0.0, **where(6), **GREEDY)
    truth = want.divergence
    assert 1e-8 < float(truth.min()) < 2e-8 and 1e-6 < float(truth.median()) < 2e-6
    got = select(*case, 0.0, **GREEDY).divergence
    assert float((got / truth - 1).abs().max()) < 5e-7


def test_entries_of_minus_infinity(cut):
    """In one row, in both, in all but one entry; and the finite stand-in some models mask with."""
    cut(16)
    teacher, student = logits(8, 21)
    teacher[0, 4], student[1, 4], teacher[3, 1:], student[4, :-1] = [-INF] * 4
    teacher[2, 3:18], student[2, 3:18] = -INF, -INF
    teacher[5, 1:], student[5, 1:] = -INF, -INF  # both sure of the same token: JSD 0
    teacher[6, 1:], student[6, :-1] = -INF, -INF  # of different ones: 1 bit
    teacher[7, 2:9], student[7, 5:20] = torch.finfo(F32).min, torch.finfo(F32).min
    got = check(teacher, student)
    assert got.divergence[5] == 0 and got.divergence[6] == 1 and got.token[5] == 0
    check(teacher, student, metric="kl", **GREEDY)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_huge_offsets(cut, dtype):
    """1e4 and -5e3: a divergence errs by the rounding of their difference, a logarithm by none."""
    case = logits(4, 40, dtype, offset=1e4)
    got = select(*case, 0.01, **GREEDY)
    want = reference.switch_select(*(z.double() for z in case), 0.01, **where(4), **GREEDY)
    assert same(got[:2], want[:2])
    for i, rtol in ((2, 15000 * 2.0**-23), (3, 1e-6), (4, 1e-6)):
        torch.testing.assert_close(got[i].double(), want[i], rtol=rtol, atol=1e-6)


@pytest.mark.skipif(not ON_CPU, reason="counts calls in Triton's interpreter")
def test_noise_is_evaluated_only_where_it_can_matter(cut, monkeypatch):
    """Words: once a block for both models, twice for two streams. Logarithms: once a model, for the
    leaders of its lanes; in every block that could win only where a lane's second could."""
    cut(16)
    calls = []

    for module, name in ((kernel, "noise_words"), (_tl_noise, "gumbel_of")):
        spy = partial(lambda name, f, *args: (calls.append(name), f(*args))[1], name)
        monkeypatch.setattr(module, name, partial(spy, getattr(module, name)))
    known, cold = {"student_token": KNOWN[:1]}, {"teacher_temperature": 0}
    both, sixteen = {"teacher_token": KNOWN[:1]} | known, {"student_token": KNOWN[:1].repeat(16)}
    at = torch.arange(64)
    peak = torch.where(at == 5, 100.0, 0.0)[None]  # leads its lane, whose others are far below
    lane = torch.where(at % 16 == 5, 100.0, 0.0).repeat(16, 1)  # here all of one lane are near
    for z, options, words, logarithms in (
        (peak, {}, 4, [2]), (peak, {"metric": "rank"}, 8, [2]),
        (peak, {"metric": "rank", **known}, 4, [1]), (peak, cold, 4, [1]),
        (peak, cold | known, 0, [0]), (peak, both, 0, [0]),
        (lane, sixteen, 16 * 4, range(16 + 1, 16 * 5)),  # some rows are swept again
    ):  # fmt: skip
        calls.clear()
        select(z, z, 0.5, **options)
        assert calls.count("noise_words") == words and calls.count("gumbel_of") in logarithms


def test_a_second_of_a_lane_can_win(cut):
    """The tokens of one lane alone can win: often the one whose bound was not the largest."""
    cut(16)
    rows, V = 14, 80
    z = torch.where(torch.arange(V, device=DEVICE) % 16 == 5, 30.0, 0.0).repeat(rows, 1)
    z[:, 6::16] = 30.0  # a neighbour of each, so that bounds say little
    z[1::2, 5::16] -= 3.0
    check(z, z.flip(0), student_temperature=0.7)
    check(z, z.flip(0), metric="rank", threshold=torch.ones(rows, device=DEVICE))


@pytest.mark.parametrize("options", [{}, {"metric": "rank"}, GREEDY, {"metric": "kl"}])
def test_rows_that_begin_anywhere(cut, options):
    """By four loads of every fourth entry, whose last ends within one."""
    cut(16, splits=2)
    wide = 3 * torch.randn(6, 2, 75, device=DEVICE)
    threshold = torch.ones(6, device=DEVICE) if options.get("metric") == "rank" else None
    check(wide[:, 0], wide[:, 1], threshold, **options)
    check(wide[:, 0].bfloat16(), wide[:, 1].bfloat16(), threshold, **options)


def test_skipped_noise_never_changes_a_token(cut):
    """The worst case for a bound on the noise: every perturbed logit within a hair of the best."""
    cut(16)
    rows, V, models = 14, 80, []
    rise = torch.arange(V, device=DEVICE) * 1e-4  # the winner is last: no block can be skipped
    hair = torch.rand(rows, V, device=DEVICE).argsort(-1) * 1e-4
    for stream, temperature in ((noise.STREAM_REDRAW, 1.0), (noise.STREAM_TOKEN, 0.6)):  # as rank
        field = noise.gumbel(*where(rows).values(), V, stream, device=DEVICE).double()
        peaked = field + 20 * torch.randn_like(field)
        shapes = rise, -rise, hair, hair + 50, (hair == 0) * 1e-3, field, peaked
        y = torch.stack([shapes[i % 7].expand(rows, V)[i] for i in range(rows)])
        models.append(((y - field) * temperature).float())
    threshold = torch.tensor([-INF, INF]).repeat_interleave(7)  # either model meets every shape
    got = check(*models, threshold, metric="rank", student_temperature=0.6).token.tolist()
    assert got[0::7] == [V - 1] * 2 and got[1::7] == [0] * 2


def test_teacher_student_and_mixture_have_their_laws(cut):
    cut(16)
    rows = 80 if ON_CPU else 20000
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    case = (x.log().expand(rows, -1).to(DEVICE) for x in (p, q))
    token = check(*case, torch.tensor([-INF, INF] * (rows // 2)), close=rows // 1000).token
    for tokens, law, other in ((token[::2], p, q), (token[1::2], q, p), (token, (p + q) / 2, p)):
        counts = torch.bincount(tokens, minlength=3).tolist()
        assert chi_square(counts, law.tolist()) and not chi_square(counts, other.tolist())


@pytest.mark.parametrize(("metric", "splits"), [("jsd", 1), ("jsd", 2), ("kl", 1), ("rank", 1)])
def test_a_row_without_a_distribution_is_flagged_and_spoils_no_other(cut, metric, splits):
    cut(32, splits)
    teacher, student = logits(8, 50)
    teacher[1, 3], student[2, 45], teacher[3, 49], student[4, 0] = NAN, NAN, INF, INF
    teacher[5], student[6] = -INF, -INF
    got = select(teacher, student, 0.05, metric=metric)
    good = {k: v if k == "seed" else v[::7] for k, v in where(8).items()}
    want = reference.switch_select(teacher[::7], student[::7], 0.05, metric=metric, **good)
    assert same((x[::7] for x in got[:2]), want[:2])
    torch.testing.assert_close(got.divergence[::7], want.divergence)
    assert got.token[1:7].tolist() == [-1] * 6 and not bool(got.from_teacher[1:7].any())
    assert all(bool(values[1:7].isnan().all()) for values in got[2:])


@pytest.mark.parametrize("splits", [1, 2])
def test_a_known_token_out_of_range_is_flagged(cut, splits):
    """Tokens that are on a device are not looked at before the launch."""
    cut(16)
    token = torch.tensor([0, -1, 20, 2**40], device=DEVICE)
    args = (*logits(4, 20), torch.ones(4, device=DEVICE), *list(where(4).values())[1:])
    for known in ((token, None), (None, token)):
        got = kernel._launch(*args, *known, -3, 1.0, 1.0, "jsd", True, 20, splits)
        assert (got[0] == -1).tolist() == [False, True, True, True]
        assert [values.isnan().tolist() for values in got[2:]] == [[False, True, True, True]] * 3


@pytest.mark.parametrize("metric", ["jsd", "rank"])
def test_padding_strides_and_single_numbers(cut, metric):
    """Slices, one row for all (stride 0), a transpose (copied), garbage behind the vocabulary."""
    cut(64)
    wide = torch.randn(6, 60, device=DEVICE)
    garbage = [torch.full((3, n), value, device=DEVICE) for n, value in ((48, NAN), (44, INF))]
    garbage[0][:, :37], garbage[1][:, :37], garbage[0][:, 40:] = wide[:3, :37], wide[3:, :37], 1e9
    one = {"sequence_ids": 3, "positions": torch.tensor([7], dtype=torch.int32), "metric": metric}
    each = one | {"sequence_ids": [3] * 3, "positions": torch.full((3,), 7)}
    for case in (
        (wide[::2, 5:42], wide[1, 9:46].expand(3, -1)),
        (wide[1:4, :37], wide.flatten()[:111].view(37, 3).t()),
        garbage,
    ):
        clean = (z[:, :37].contiguous() for z in case)
        want = select(*clean, torch.full((3,), 0.2), **each)
        assert same(select(*case, 0.2, vocab_size=37, **one), want)


def test_addresses_beyond_two_to_the_31():
    """Rows 2.2 GB apart, nothing between them touched; odd, so that both load, and add, alike."""
    gap, near = 1_100_000_007, logits(3, 9, BF16)
    far = torch.empty(2 * gap + 18, dtype=BF16, device=DEVICE)
    case = [far.as_strided((3, 9), (gap, 1), i * 9).copy_(near[i]) for i in (0, 1)]
    assert same(select(*case, 0.1), select(*near, 0.1))


def test_programs_a_row_no_rows_and_repeated_calls(cut, monkeypatch):
    cut(16, 3)
    none = torch.zeros(0, 40, device=DEVICE)
    assert [x.shape for x in select(none, none, 0.5)] == [(0,)] * 5
    once, *again = (select(*logits(1, 40), 0.1) for _ in range(3))
    assert all(same(result, once) for result in again)  # each counts its arrivals from zero
    monkeypatch.undo()  # programs to fill the device, at most one a block, at most 128
    monkeypatch.setattr(_backend, "multiprocessors", lambda _: 132)
    shapes = (0, 10**7), (1, 151936), (16, 151936), (4096, 32000)
    assert [kernel._splits(*shape, None) for shape in shapes] == [128, 75, 33, 1]


@settings(max_examples=20 if ON_CPU else 200, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 2), V=st.integers(1, 40), dtype=st.sampled_from([F32, BF16, F16]),
    spread=st.sampled_from([0, 1e-3, 1, 30]), holes=st.sampled_from([0, 0.5, 1]),
    metric=st.sampled_from(["jsd", "kl", "rank"]), base=st.sampled_from([2, "e"]),
    heat=st.tuples(*[st.sampled_from([0, 0.5, 1, 2.5])] * 2), splits=st.integers(1, 3),
    known=st.sets(st.sampled_from(["teacher_token", "student_token"])), seed=st.integers(0, 2**63),
)  # fmt: skip
def test_any_small_case(rows, V, dtype, spread, holes, metric, base, heat, known, splits, seed):
    options = {"metric": metric, "base": base, "seed": seed}
    options |= dict(zip(("teacher_temperature", "student_temperature"), heat, strict=True))
    options |= {name: torch.arange(rows, device=DEVICE) * 7 % V for name in known}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", 16)
        patch.setattr(kernel, "_splits", lambda *_: splits)
        check(*logits(rows, V, dtype, spread, holes=holes, seed=seed // 2), **options)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
def test_the_op_is_as_torch_wants_it(dtype):
    """And where it runs the kernel, as on a GPU, no two results share memory: torch refuses."""
    args = *logits(3, 11, dtype), torch.full((3,), 0.1, device=DEVICE), *list(where(3).values())[1:]
    args += KNOWN[2:5] % 11, None, -3, 1.0, 0.7, "jsd", True, 11
    torch.library.opcheck(torch.ops.switchkd.switch_select.default, (*args, "reference"))
    if dtype != torch.float64:
        assert same(torch.ops.switchkd.switch_select(*args, "triton"), kernel._launch(*args))


def test_compiled_without_a_break_it_is_the_same():
    def step(teacher, student):
        return switch_select(2 * teacher, student, 0.1, metric="kl", **where(3) | {"seed": 5})

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert same(compiled(*logits(3, 17)), step(*logits(3, 17)))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"teacher": GOOD[..., None]}, ValueError, r"got \(2, 3, 1\) and \(2, 3\)"),
    ({"student": GOOD.new_zeros(2, 4)}, ValueError, "3 and 4 logits a row: pass vocab_size"),
    ({"student": GOOD.long()}, TypeError, "must be floating point, got torch.int64"),
    ({"teacher": GOOD.double()}, RuntimeError, "'triton' cannot run: .* got torch.float64"),
    ({"student": GOOD.to("meta")}, ValueError, "one device, got .*meta"),
    ({"impl": "cudnn"}, ValueError, "impl must be one of None, reference, .*got 'cudnn'"),
    ({"metric": "tv"}, ValueError, "metric must be one of jsd, kl, rank, got 'tv'"),
    ({"base": 10}, ValueError, "base must be one of 2, e, got 10"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\), got 1844"),
    ({"threshold": NAN}, ValueError, "threshold must be a number in every row, got NaN"),
    ({"threshold": torch.zeros(3)}, ValueError, r"a number or \(2,\), got \(3,\)"),
    ({"teacher_temperature": -1}, ValueError, "teacher_temperature must be 0 .* got -1"),
    ({"student_token": torch.tensor([0, 3])}, ValueError, r"student_token .* got 0\.\.3"),
    ({"teacher_token": torch.zeros(2)}, TypeError, "teacher_token must be integers"),
    ({"positions": [0, 2**32]}, ValueError, "positions must be in .* got 0..4294967296"),
    ({"vocab_size": 4}, ValueError, "vocab_size must be between 1 and 3, .* got 4"),
])  # fmt: skip
def test_refused_arguments(change, error, message):
    with pytest.raises(error, match=message):
        select(**{"teacher": GOOD, "student": GOOD, "threshold": 0.5} | change)


def test_tensors_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="'triton' cannot run: .* on a CPU, .*TRITON_INTERPRET"):
        _backend.choose("triton", GOOD.cpu())
    assert _backend.choose(None, GOOD.cpu()) != "triton"
