"""The Triton divergences and their gradients against the float64 reference."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, as_stored, check_close, logits, poisoned
from switchkd_kernels import divergence_loss, jsd
from test_linear_divergence_loss import Memory
from test_reference_divergence import plain as textbook

MODULE = sys.modules["switchkd_kernels.divergence_loss"]  # the package's attribute is the function
INF, NAN = math.inf, math.nan
MASK = torch.tensor([[True, False], [True, True]], device=DEVICE)

FORMS = [
    *({"kind": kind} for kind in ("kl_teacher_student", "kl_student_teacher", "tvd")),
    *({"kind": "skew_kl", "alpha": alpha} for alpha in (0.1, 0, 0.9)),
    *({"kind": "skew_reverse_kl", "alpha": alpha} for alpha in (0.1, 0, 0.9)),
    *({"kind": "skew_reverse_kl", "alpha": a, "detach_mixture": True} for a in (0.1, 0.9)),
    *({"kind": "generalized_jsd", "beta": beta} for beta in (0.1, 0, 0.5, 0.9, 1)),
    {"kind": "generalized_jsd", "beta": 0.1, "detach_mixture": True},
    *({"base": base} for base in (2, "e")),  # jsd
]
ONE_EACH = [FORMS[i] for i in (0, 1, 2, 3, 6, 9, 11, 17)]  # one of every kernel
TVD, SKEW, JSD = FORMS[2], FORMS[6], FORMS[17]


def name(form):
    return "-".join(map(str, form.values())) if isinstance(form, dict) else None


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, the last one cut, for little work."""
    monkeypatch.setattr(MODULE, "BLOCK", 64)
    monkeypatch.setattr(MODULE, "BACKWARD_BLOCK", 64)


@pytest.fixture(autouse=True)
def _poisoned():
    """Whatever a kernel does not write is NaN."""
    with poisoned():
        yield


def call(form, teacher, student, reduction="none", **options):
    loss = jsd if "base" in form else divergence_loss
    return loss(teacher, student, **{"reduction": reduction} | form | options)


def run(form, teacher, student, upstream=None, **options):
    """Losses of the rows, and the student's gradient of their sum weighted by `upstream`."""
    student = student.detach().requires_grad_()
    loss = call(form, teacher, student, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def triton(*args, **options):
    return run(*args, impl="triton", **options)


def agree(form, teacher, student, scale=0.1):
    """Value and gradient by the tolerance rule: plain torch in float32 sets the scale.

    Gradients smaller than `scale` are measured against it: where a student is sure of a token, they
    are differences of terms many times their size, in plain torch as well.
    """
    upstream = torch.rand(student.shape[:-1], device=DEVICE) + 0.5
    value, grad = triton(form, teacher, student, upstream)
    truth = run(form, teacher.double(), student.double(), upstream)
    plain = run(form, teacher.float(), student.float(), upstream)
    assert value.dtype == torch.float32 and grad.dtype == student.dtype
    # float32 knows a sum of exponentials to 1e-7, which moves all terms of a TVD; the other
    # divergences are flat there
    check_close(value, plain[0], truth[0], what="value", scale=0.1 if form == TVD else 0.0)
    finite = truth[0].isfinite()  # elsewhere no gradient is defined
    stored = as_stored(plain[1], student.dtype)
    check_close(grad[finite], stored[finite], truth[1][finite], what="gradient", scale=scale)
    return value, grad


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_values_and_gradients(form, small_blocks):
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if form in ONE_EACH else 1]:
        # near rows, common ones, nearly disjoint ones: every branch of the formulas
        teacher, student = logits(3, 130, dtype, spread=(3e-3, 1, 12))
        _, grad = agree(form, teacher, student, torch.tensor([0, 0.1, 1], device=DEVICE))
        rest = grad.double().sum(-1).abs()  # a shift of all logits changes nothing
        assert bool((rest < 2e-6 + torch.finfo(dtype).eps * grad.double().abs().sum(-1)).all())


@pytest.mark.parametrize("form", [TVD, SKEW, JSD], ids=name)
def test_shapes_around_a_block_and_leading_dimensions(form, small_blocks):
    for shape in ((1, 2), (3, 7), (1, 64), (1, 65), (1, 128), (2, 1, 2, 9)):
        teacher, student = logits(math.prod(shape[:-1]), shape[-1])
        value, grad = agree(form, teacher.view(shape), student.view(shape))
        assert value.shape == shape[:-1] and grad.shape == shape


@pytest.mark.parametrize("vocab", [4096, 4097, 32000, 50257, 151936])
def test_vocabularies_in_the_blocks_of_the_launch(vocab):
    """Whole blocks alone, one logit more, and the vocabularies of real models."""
    assert 4096 % MODULE.BLOCK == 0 == 4096 % MODULE.BACKWARD_BLOCK
    agree(ONE_EACH[vocab % 8], *logits(1, vocab, torch.bfloat16))


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_one_token_equal_rows_and_no_row(form, small_blocks):
    z = logits(1, 80)[0]
    for teacher, student in (logits(2, 1), (z, z)):  # one token is certain in both
        value, grad = triton(form, teacher, student)
        assert not bool(value.any()) and not bool(grad.any())
    empty = torch.zeros(2, 0, 5, device=DEVICE)
    assert [x.shape for x in triton(form, empty, empty)] == [(2, 0), (2, 0, 5)]
    assert float(call(form, empty, empty, "mean", impl="triton")) == 0.0


@pytest.mark.parametrize("form", [FORMS[0], JSD], ids=name)
def test_strides(form, small_blocks):
    wide, deep = (z.view(4, 2, 66) for z in logits(8, 66))
    for teacher, student in (
        (wide[::2, 0], deep[1::2, 1]),  # rows apart
        (wide[:, 0, 1:], deep[:, 1, :-1]),  # rows that start anywhere
        (wide[0, :1].expand(2, -1), deep[1, :1].expand(2, -1)),  # stride 0
        (wide[:2, :1].expand(-1, 2, -1), deep[:2, 1:].expand(-1, 2, -1)),  # no view as rows
        (wide[:, 0, :5].t(), deep[:, 1, :5].t()),  # columns
        (wide[0].expand(2, 2, 66), deep[:2]),  # one teacher row for several of the student's
        (wide.transpose(0, 1)[..., :9], deep.transpose(0, 1)[..., :9]),
    ):
        value, _ = agree(form, teacher, student)
        dense = call(form, teacher.contiguous(), student.contiguous(), impl="triton")
        # rows that begin at multiples of 16 bytes are summed in another order
        torch.testing.assert_close(value, dense, rtol=1e-6, atol=0, equal_nan=True)


def test_rows_further_apart_than_32_bits(small_blocks):
    teacher, student = logits(3, 70, torch.bfloat16)
    # Row 2 begins past 2^31; what lies between the rows is never touched. Odd: were it a multiple
    # of 16, loads would be wider than those of near rows, and sums in another order.
    step = 1_100_000_007
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty_strided((3, 140), (step, 1), dtype=torch.bfloat16, device=DEVICE)
    far[:, :70], far[:, 70:] = teacher, student
    got = jsd(far[:, :70], far[:, 70:], impl="triton")
    assert torch.equal(got, jsd(teacher, student, impl="triton"))


# ------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("form", ONE_EACH, ids=name)
def test_small_divergences_keep_their_digits(form):
    """Largest relative errors of 12 such rows, Triton / plain torch in float32:

                         value at 1e-6      value at 1e-9      gradient at 1e-9
    kl_teacher_student   2.8e-7 / 2.0e-7    7.4e-6 / 4.7e-5    3.0e-7 / 2.1e-7
    kl_student_teacher   2.9e-7 / 1.4e-7    8.3e-6 / 3.2e-5    1.7e-7 / 2.0e-7
    skew_kl              3.6e-7 / 2.5e-7    5.4e-6 / 1.2e-5    2.1e-7 / 3.6e-7
    tvd                  6.2e-3 / 1.4e-2    first order in the error of a sum, 1e-7 in all
    """
    teacher, student = logits(4, 2000)
    noise = student - teacher
    cases = ((1e-3, 2e-4), (1e-6, 0.2)) if form == TVD else ((1e-6, 1e-6), (1e-9, 5e-5))
    for target, limit in cases:
        size = target / call(form, teacher.double(), (teacher + 0.01 * noise).double())
        size = 0.01 * size ** (1.0 if form == TVD else 0.5)
        student = teacher + size.float()[:, None] * noise
        truth = run(form, teacher.double(), student.double())
        value, grad = triton(form, teacher, student)
        assert bool((truth[0] / target - 1).abs().max() < 0.1)  # the rows are what they should be
        assert float((value / truth[0] - 1).abs().max()) < limit
        error = (grad - truth[1]).norm(dim=-1) / truth[1].norm(dim=-1)
        assert form == TVD or float(error.max()) < 1e-6  # it loses the signs of terms


def test_disjoint_rows_are_one_bit_or_ln_2_and_never_more(small_blocks):
    teacher, student = logits(8, 80)
    teacher[:, :40], student[:, 40:] = -INF, -INF
    for base, most in ((2, torch.tensor(1.0)), ("e", torch.tensor(2.0).log())):
        got = jsd(teacher, student, base=base, impl="triton").cpu()
        assert bool((got <= most).all()) and bool((got > most * (1 - 5e-7)).all())
    apart = torch.tensor([[0.0, -INF, -INF], [-INF, 0.0, 0.0]], device=DEVICE)
    assert jsd(apart, apart.flip(0), impl="triton").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("form", ONE_EACH, ids=name)
def test_huge_logits(form, small_blocks):
    teacher, student = logits(2, 80)
    agree(form, teacher + 1e4, student + 1e4)
    agree(form, teacher + 1e4, student + 5e3)  # in float32 the difference is still exact
    wild = torch.tensor([[1e4, -1e4, 3.0], [1e30, 0.0, -1e30], [-5e4] * 3], device=DEVICE)
    value, grad = triton(form, wild, wild.flip(-1))
    if form not in FORMS[:2]:  # a KL is as large as those logits
        assert bool(value.isfinite().all()) and bool(grad.isfinite().all()) and value[2] == 0


@pytest.mark.parametrize("form", ONE_EACH, ids=name)
def test_minus_infinity(form, small_blocks):
    """In the teacher, in the student, in both: inf for a KL that is, else finite."""
    teacher, student = logits(4, 130)
    teacher[0, 3:80] = student[1, 64:128] = -INF  # a whole block in the second
    teacher[2, 5:120], student[2, 2:110] = -INF, -INF
    teacher[3, 70:], student[3, 70:] = -INF, -INF  # the same tokens
    value, grad = agree(form, teacher, student)
    infinite = {"kl_teacher_student": [1, 2], "kl_student_teacher": [0, 2]}.get(
        form.get("kind"), []
    )
    finite = [i for i in range(4) if i not in infinite]
    assert value.isfinite().nonzero().flatten().tolist() == finite
    grad, student = grad[finite], student[finite]
    assert bool(grad.isfinite().all()) and not bool(grad[student == -INF].any())


@pytest.mark.parametrize("form", ONE_EACH, ids=name)
def test_rows_that_are_no_distribution_are_nan_and_leave_the_others_alone(form, small_blocks):
    teacher, student = logits(7, 80)
    clean = triton(form, teacher[3:4], student[3:4])
    for z, first in ((teacher, 0), (student, 4)):
        z[first, 70], z[first + 1, 7], z[first + 2] = NAN, INF, -INF
    value, grad = triton(form, teacher, student)
    bad = [i != 3 for i in range(7)]
    assert value.isnan().tolist() == bad and grad.isnan().all(-1).tolist() == bad
    assert torch.equal(value[3:4], clean[0]) and torch.equal(grad[3:4], clean[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_small_case(data):
    form, vocab = data.draw(st.sampled_from(FORMS)), data.draw(st.integers(1, 9))
    logit = st.one_of(st.floats(-30, 30, width=16), st.just(-INF))
    rows = st.lists(logit, min_size=vocab, max_size=vocab).filter(lambda row: max(row) > -INF)
    teacher, student = (torch.tensor([data.draw(rows)], device=DEVICE) for _ in range(2))
    value, grad = triton(form, teacher, student)
    truth, true_grad = run(form, teacher.double(), student.double())
    torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-7)
    if bool(truth.isfinite()):  # terms up to 60 cancel
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS[:17], ids=name)
def test_gradient_is_that_of_the_textbook_formula_and_of_the_kernels_values(form):
    """float64 autograd through softmax and logarithms; differences of float32 values."""
    teacher, student = logits(1, 9)
    grad = triton(form, teacher, student)[1]
    options = dict(form)
    options["detach"] = options.pop("detach_mixture", False)
    z = student.double().requires_grad_()
    truth = torch.autograd.grad(textbook(teacher.double(), z, **options).sum(), z)[0]
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-7)
    if options["detach"] and form["kind"] == "skew_reverse_kl":
        return  # not the gradient of any value
    step = 0.02 * torch.randn(3, 9, device=DEVICE)
    rows = teacher.expand(3, -1)
    up, down = (call(form, rows, student + x, impl="triton") for x in (step, -step))
    torch.testing.assert_close((up - down) / 2, step @ grad[0], rtol=2e-2, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_the_student_gets_a_gradient_in_its_dtype_and_only_once(dtype):
    teacher, student = (z.requires_grad_() for z in logits(2, 7, dtype))
    loss = divergence_loss(teacher, student, impl="triton")
    loss.backward(retain_graph=True)
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype and teacher.grad is None
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss.square(), student, create_graph=True)
    with torch.no_grad():
        assert not divergence_loss(teacher, student, impl="triton").requires_grad


def test_memory_is_five_floats_a_row_and_the_gradient():
    (teacher, student), kept = logits(4, 500), []
    student.requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with Memory() as memory, hooks:
        loss = divergence_loss(teacher, student, reduction="sum", impl="triton")
    given = {x.untyped_storage().data_ptr() for x in (teacher, student)}
    own = [len(x.flatten()) for x in kept if x.untyped_storage().data_ptr() not in given]
    assert own == [5 * 4] and len(kept) == 3
    assert memory.peak <= 6 * 4 + 1  # those, and the losses
    with Memory() as memory:
        loss.backward()
    assert 4 * 500 <= memory.peak <= 4 * 500 + 8


@pytest.mark.parametrize(
    ("form", "dtype"), [(FORMS[0], torch.bool), (SKEW, torch.int64), (JSD, torch.float32)], ids=name
)
def test_masked_rows_are_not_looked_at(form, dtype, small_blocks):
    teacher, student = (z.view(2, 2, 66) for z in logits(4, 66))
    mask = MASK.to(dtype)
    upstream = torch.rand(2, 2, device=DEVICE) + 0.5
    want, want_grad = triton(form, teacher, student, upstream)
    want[0, 1], want_grad[0, 1] = 0.0, 0.0
    teacher[0, 1], student[0, 1], upstream[0, 1] = NAN, -INF, NAN
    value, grad = triton(form, teacher, student, upstream, mask=mask)
    assert torch.equal(value, want) and torch.equal(grad, want_grad)

    each, student = (want_grad / upstream[..., None]).nan_to_num(), student.requires_grad_()
    for reduction, count in (("sum", 1), ("mean", 3)):
        loss = call(form, teacher, student, reduction, mask=mask, impl="triton")
        torch.testing.assert_close(loss, want.sum() / count)
        grad = torch.autograd.grad(-3 * loss, student)[0]
        torch.testing.assert_close(grad, -3 / count * each)
        loss = call(form, teacher, student, reduction, mask=0 * mask, impl="triton")
        assert loss.item() == 0.0 and not bool(torch.autograd.grad(loss, student)[0].any())


@pytest.mark.parametrize("vocab", [63, 64, 66])
def test_padding_has_no_part_in_value_or_gradient(vocab, small_blocks):
    form = ONE_EACH[vocab % 8]
    teacher, student = logits(2, vocab)
    wide = torch.cat([student, torch.full((2, 70), NAN, device=DEVICE)], -1)  # a block of its own
    wide_teacher = torch.cat([teacher, torch.full((2, 2), 70.0, device=DEVICE)], -1)
    value, grad = triton(form, teacher, student)
    got, wide_grad = triton(form, wide_teacher, wide, vocab_size=vocab)
    near = {"rtol": 1e-5, "atol": 1e-7}  # rows that begin elsewhere are summed in another order
    torch.testing.assert_close(got, value, **near)
    torch.testing.assert_close(wide_grad[:, :vocab], grad, **near)
    assert not bool(wide_grad[:, vocab:].any())


# ------------------------------------------------------------------------------- ops


@pytest.fixture(params=["reference", "triton"])
def chosen(request):
    return request.param


def test_opcheck(chosen):
    (teacher, student), ops = logits(4, 10), torch.ops.switchkd
    mask, form = MASK.flatten(), ("skew_reverse_kl", 0.1, True, 8, chosen)
    loss, saved = ops.divergence(teacher, student, mask, *form)
    torch.library.opcheck(ops.divergence_backward, (loss, teacher, student, mask, saved, *form))
    torch.library.opcheck(ops.divergence, (teacher, student.requires_grad_(), mask, *form))


@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK.long(), "reduction": "none", "kind": "tvd"}, {"mask": MASK}]
)
def test_compiles_whole_and_equals_eager(chosen, options):
    backend = "inductor" if list(options) == ["mask"] else "aot_eager"
    teacher, z = logits(4, 12)
    teacher, z = teacher.view(2, 2, 12), z.view(2, 2, 12).requires_grad_()

    def loss(z):
        return divergence_loss(teacher, z, impl=chosen, vocab_size=11, **options)

    torch._dynamo.reset()
    want, got = loss(z), torch.compile(loss, fullgraph=True, backend=backend)(z)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(x.square().sum(), z)[0] for x in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind must be one of kl_teacher_student, .* got 'kl'"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1.0"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\), got -0.1"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"reduction": "batchmean"}, "reduction must be one of none, sum, mean, got 'batchmean'"),
        ({"mask": torch.ones(3)}, r"mask must have shape \(2,\), got \(3,\)"),
        ({"mask": torch.tensor([0.5, 1.0])}, "mask must be bool or hold only 0 and 1"),
        ({"vocab_size": 5}, "vocab_size must be between 1 and 4, .* got 5"),
        ({"kind": "skew_kl", "detach_mixture": True}, "got kind 'skew_kl', which would leave no"),
        ({"base": 10}, "base must be one of 2, e, got 10"),
        ({"impl": "cudnn"}, "impl must be one of None, reference, .*got 'cudnn'"),
    ],
)
def test_refused_arguments(options, message):
    z = torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        call({"impl": "triton"} | options, z, z)


@pytest.mark.parametrize("loss", [jsd, divergence_loss])
def test_refused_shapes_dtypes_and_devices(loss):
    z = torch.zeros(2, 4, device=DEVICE)
    for teacher, student, error, message in (
        (z, z[:, :3], ValueError, "4 and 3 logits a row: pass vocab_size"),
        (z, z[:1], ValueError, r"all but the last dimension, got \(2, 4\) and \(1, 4\)"),
        (z, z.double(), RuntimeError, "cannot run: its kernels take float32, .* got torch.float64"),
        (z.long(), z, TypeError, "must be floating point, got torch.int64"),
        (z, z.to("meta"), ValueError, "must be on one device, got .*meta"),
    ):
        with pytest.raises(error, match=message):
            loss(teacher, student, impl="triton")
    with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
        loss(z, z.long(), impl="reference")
