"""The divergences and their gradients: by hand, by identity, by autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switchkd_kernels import InvalidLogits, divergence_loss, jsd
from switchkd_kernels.reference import KINDS

P, Q = (0.5, 0.3, 0.2), (0.2, 0.1, 0.7)
LN2 = math.log(2)


def mixture(weight, x, y):
    return [weight * a + (1 - weight) * b for a, b in zip(x, y, strict=True)]


def kl(x, y):
    return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))


def by_hand(kind, a, b):
    """Plain Python, one line a formula: p = P is the teacher, q = Q the student."""
    return {
        "kl_teacher_student": kl(P, Q),
        "kl_student_teacher": kl(Q, P),
        "generalized_jsd": b * kl(P, mixture(b, P, Q)) + (1 - b) * kl(Q, mixture(b, P, Q)),
        "skew_kl": kl(P, mixture(a, P, Q)),
        "skew_reverse_kl": kl(Q, mixture(1 - a, P, Q)),
        "tvd": 0.5,  # (0.3 + 0.2 + 0.5) / 2
    }[kind]


NUMBERS = {  # the same, as numbers: KL(p||q) = .5 ln 2.5 + .3 ln 3 + .2 ln(2/7), and so on
    "kl_teacher_student": 0.53718,
    "kl_student_teacher": 0.58382,
    "generalized_jsd": 0.08460,  # beta = 0.2; 0.08858 with beta on the student
    "skew_kl": 0.42742,  # alpha = 0.1, m = (0.23, 0.12, 0.65)
    "skew_reverse_kl": 0.44689,  # alpha = 0.1, m = (0.47, 0.28, 0.25)
    "tvd": 0.5,
}


def log(law, dtype=torch.float64):
    return torch.tensor([law], dtype=dtype).log()


def plain(teacher, student, kind, alpha=0.1, beta=0.5, detach=False):
    """The textbook formula on probabilities, for autograd to differentiate."""
    p, q = teacher.softmax(-1), student.softmax(-1)

    def mix(w):
        return w * p + (1 - w) * (q.detach() if detach else q)

    def divergence(x, y):
        return torch.special.xlogy(x, x).sub(torch.special.xlogy(x, y)).sum(-1)

    if kind == "kl_teacher_student" or (kind == "generalized_jsd" and beta == 0):
        return divergence(p, q)
    if kind == "kl_student_teacher" or (kind == "generalized_jsd" and beta == 1):
        return divergence(q, p)
    if kind == "generalized_jsd":
        return beta * divergence(p, mix(beta)) + (1 - beta) * divergence(q, mix(beta))
    if kind == "skew_kl":
        return divergence(p, mix(alpha))
    if kind == "skew_reverse_kl":
        return divergence(q, mix(1 - alpha))
    return 0.5 * (p - q).abs().sum(-1)


# ------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", KINDS)
def test_three_tokens_by_hand(kind):
    got = float(divergence_loss(log(P), log(Q), kind=kind, alpha=0.1, beta=0.2))
    assert got == pytest.approx(by_hand(kind, 0.1, 0.2), rel=1e-12)
    assert got == pytest.approx(NUMBERS[kind], abs=6e-6)
    if kind != "tvd":  # every one of them tells the teacher from the student
        swapped = float(divergence_loss(log(Q), log(P), kind=kind, alpha=0.1, beta=0.2))
        assert abs(got - swapped) > 1e-3


def test_jsd_by_hand_in_bits_and_nats():
    want = by_hand("generalized_jsd", 0, 0.5)
    assert float(jsd(log(P), log(Q))) == pytest.approx(want / LN2, rel=1e-12)
    assert float(jsd(log(P), log(Q), base="e")) == pytest.approx(want, rel=1e-12)
    got = divergence_loss(log(P), log(Q), kind="generalized_jsd", beta=0.5)
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_default_is_skew_reverse_kl_with_alpha_a_tenth_and_the_mean():
    teacher, student = torch.randn(4, 9), torch.randn(4, 9)
    want = plain(teacher, student, "skew_reverse_kl", 0.1).mean()
    torch.testing.assert_close(divergence_loss(teacher, student), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 12.0])
def test_equals_the_textbook_formula(kind, spread):
    base = torch.randn(6, 40, dtype=torch.float64)
    teacher, student = (
        base + spread * torch.randn_like(base),
        base + spread * torch.randn_like(base),
    )
    for weight in (0.003, 0.3, 0.9):
        got = divergence_loss(
            teacher, student, kind=kind, alpha=weight, beta=weight, reduction="none"
        )
        want = plain(teacher, student, kind, weight, weight)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)


def test_limits():
    teacher, student = torch.randn(5, 20).double(), torch.randn(5, 20).double()

    def loss(kind, **weight):
        return divergence_loss(teacher, student, kind=kind, reduction="none", **weight)

    forward, reverse = loss("kl_teacher_student"), loss("kl_student_teacher")
    torch.testing.assert_close(loss("skew_kl", alpha=0.0), forward, rtol=0, atol=0)
    torch.testing.assert_close(loss("skew_reverse_kl", alpha=0.0), reverse, rtol=0, atol=0)
    torch.testing.assert_close(loss("skew_kl", alpha=1e-9), forward, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss("skew_reverse_kl", alpha=1e-9), reverse, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss("generalized_jsd", beta=0.0), forward, rtol=0, atol=0)
    torch.testing.assert_close(loss("generalized_jsd", beta=1.0), reverse, rtol=0, atol=0)
    near = loss("generalized_jsd", beta=1e-8) / 1e-8  # the limit proper needs the weight divided
    torch.testing.assert_close(near, forward, rtol=1e-5, atol=0)


def test_identities():
    z = torch.randn(7, 50).double()
    shifted = z + torch.randint(-8, 8, (7, 1))
    for kind in KINDS:
        assert not bool(divergence_loss(z, z, kind=kind, reduction="none").any())
        assert bool((divergence_loss(z, shifted, kind=kind, reduction="none") < 1e-12).all())
    other = torch.randn(7, 50).double()
    torch.testing.assert_close(jsd(z, other), jsd(other, z), rtol=1e-6, atol=0)
    a = divergence_loss(z, other, kind="skew_kl", alpha=0.2)
    b = divergence_loss(other, z, kind="skew_reverse_kl", alpha=0.2)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99])
def test_skew_divergences_are_bounded_and_reach_their_bound(alpha):
    teacher, student = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    for kind in ("skew_kl", "skew_reverse_kl"):
        got = divergence_loss(teacher, student, kind=kind, alpha=alpha)
        assert float(got) == pytest.approx(math.log(1 / alpha), rel=1e-5)
        near = divergence_loss(teacher, torch.tensor([[0.0, 9.0]]), kind=kind, alpha=alpha)
        assert float(near) < math.log(1 / alpha)


@pytest.mark.parametrize("kind", ["jsd", *KINDS[:-1]])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 3e-5])
def test_small_divergences_keep_their_digits_in_float32(kind, size):
    """KL from about 5e-5 down to 4e-10 (JSD a quarter of it), float32 against float64."""
    teacher = torch.randn(16, 2000).mul(3)
    student = teacher + size * torch.randn_like(teacher)

    def value(dtype):
        a, b = teacher.to(dtype), student.to(dtype)
        if kind == "jsd":
            return jsd(a, b, base="e").double()
        return divergence_loss(a, b, kind=kind, beta=0.3, reduction="none").double()

    truth = value(torch.float64)
    assert float(truth.max()) < size**2
    error = ((value(torch.float32) - truth) / truth).abs().max()
    assert float(error) < max(2e-5, 5e-9 / size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.2, 0.45, 1.5])
def test_float32_keeps_its_digits_across_the_branches(kind, size):
    teacher = torch.randn(16, 500)
    student = teacher + size * (torch.randint(0, 2, teacher.shape) * 2 - 1)  # |d| near `size`
    for weight in (0.05, 0.5, 0.6):
        options = {"kind": kind, "alpha": weight, "beta": weight, "reduction": "none"}
        truth = divergence_loss(teacher.double(), student.double(), **options)
        got = divergence_loss(teacher, student, **options)
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=0)


def test_disjoint_rows_never_pass_one_bit_or_ln_2():
    teacher, student = torch.randn(2000, 40), torch.randn(2000, 40)
    teacher[:, :20], student[:, 20:] = -math.inf, -math.inf
    ln2 = torch.tensor(LN2)
    for base, bound in ((2, torch.tensor(1.0)), ("e", ln2)):
        got = jsd(teacher, student, base=base)
        assert bool((got <= bound).all()) and bool((got > bound * (1 - 5e-7)).all())


def test_divergence_of_one_part_in_a_million_millions_is_still_a_number():
    teacher = torch.randn(16, 2000)
    teacher = torch.round(teacher * 2**20) / 2**20  # so that the step below is exact
    student = teacher + 2.0**-20 * torch.randint(-1, 2, teacher.shape)
    for loss in (jsd, lambda a, b: divergence_loss(a, b, reduction="none")):
        truth, got = loss(teacher.double(), student.double()), loss(teacher, student)
        assert float(truth.min()) > 1e-14 and float(truth.max()) < 1e-12
        torch.testing.assert_close(got.double(), truth, rtol=0.1, atol=0)


def test_huge_offsets_and_wide_ranges_stay_finite():
    teacher = torch.tensor([[1e4, -1e4, 3.0], [1e30, 0.0, -1e30], [-5e4, -5e4, -5e4]])
    student = teacher.flip(-1)
    for kind in ("generalized_jsd", "skew_kl", "skew_reverse_kl", "tvd"):
        student.requires_grad_().grad = None
        loss = divergence_loss(teacher, student, kind=kind, reduction="none")
        loss.sum().backward()
        assert bool(loss.isfinite().all()) and bool(student.grad.isfinite().all())
    assert jsd(teacher, student).detach().tolist() == [1.0, 1.0, 0.0]


logit_rows = st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(logit_rows, st.data())
def test_jsd_is_a_bounded_symmetric_distance_squared(row, data):
    other = data.draw(st.lists(st.floats(-40, 40, width=32), min_size=len(row), max_size=len(row)))
    teacher, student = torch.tensor([row]), torch.tensor([other])
    ab, ba = float(jsd(teacher, student)), float(jsd(student, teacher))
    assert 0.0 <= ab <= 1.0 and ab == pytest.approx(ba, rel=1e-5, abs=1e-12)
    assert float(jsd(teacher, teacher)) == 0.0
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    total_variation = float((p - q).abs().sum()) / 2
    assert (ab > 0) or total_variation < 1e-6  # zero iff equal
    assert ab <= total_variation * (1 + 1e-4) + 1e-12 and total_variation**2 <= 2 * LN2 * ab + 1e-11


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", [*KINDS, "jsd"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.8])
def test_gradcheck(kind, weight):
    teacher = torch.randn(3, 7, dtype=torch.float64)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def loss(z):
        if kind == "jsd":
            return jsd(teacher, z)
        return divergence_loss(teacher, z, kind=kind, alpha=weight, beta=weight, reduction="none")

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("kind", ["skew_reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("weight", [0.1, 0.7])
def test_detached_mixture_equals_autograd_of_a_detached_formula(kind, weight):
    teacher = torch.randn(4, 9, dtype=torch.float64)
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    def grad(loss):
        return torch.autograd.grad(loss.sum(), student)[0]

    options = {"kind": kind, "alpha": weight, "beta": weight}
    got = grad(divergence_loss(teacher, student, detach_mixture=True, **options)) * 4
    want = grad(plain(teacher, student, kind, weight, weight, detach=True))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)
    attached = grad(divergence_loss(teacher, student, **options)) * 4
    assert torch.allclose(got, attached) == (kind == "generalized_jsd")


def test_gradient_by_hand_of_both_kl():
    student = log(Q).requires_grad_()
    divergence_loss(log(P), student, kind="kl_teacher_student").backward()
    torch.testing.assert_close(student.grad[0].tolist(), [-0.3, -0.2, 0.5])  # q - p
    student.grad = None
    divergence_loss(log(P), student, kind="kl_student_teacher").backward()
    want = [b * (math.log(b / a) - kl(Q, P)) for a, b in zip(P, Q, strict=True)]
    torch.testing.assert_close(student.grad[0].tolist(), want)


def test_only_the_student_gets_a_gradient_and_in_its_dtype():
    teacher = torch.randn(3, 8, requires_grad=True)
    student = torch.randn(3, 8).bfloat16().requires_grad_()
    loss = divergence_loss(teacher, student)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    assert teacher.grad is None
    with torch.no_grad():
        assert not divergence_loss(teacher, student).requires_grad


# ------------------------------------------------------------------------- -inf, masks, padding


def test_minus_infinity_in_one_or_both_rows():
    inf = math.inf
    teacher = torch.tensor([[-inf, 0.0, 1.0, -inf], [0.0, 0.0, -inf, -inf]])
    student = torch.tensor([[0.5, -inf, 1.0, -inf], [1.0, 0.0, -inf, -inf]], requires_grad=True)
    for kind in ("generalized_jsd", "skew_kl", "skew_reverse_kl", "tvd"):
        for beta in (0.2, 0.5):
            student.grad = None
            got = divergence_loss(teacher, student, kind=kind, beta=beta, reduction="none")
            want = plain(teacher.double(), student.detach().double(), kind, 0.1, beta)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
            got.sum().backward()
            assert bool(student.grad.isfinite().all())
            assert not bool(student.grad[student == -inf].any())
    for kind in ("kl_teacher_student", "kl_student_teacher"):
        got = divergence_loss(teacher, student, kind=kind, reduction="none")
        assert got.isfinite().tolist() == [False, True]
        assert got.detach()[0] == inf
        student.grad = None
        got[1].backward()  # a common -inf is outside both: finite
        assert bool(student.grad[1].isfinite().all())


def test_kl_where_only_the_argument_behind_the_bar_has_support():
    inf = math.inf
    narrow, wide = torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    want = math.log(3 / 2)
    assert float(divergence_loss(narrow, wide, kind="kl_teacher_student")) == pytest.approx(want)
    assert float(divergence_loss(wide, narrow, kind="kl_student_teacher")) == pytest.approx(want)
    assert float(divergence_loss(wide, narrow, kind="kl_teacher_student")) == inf
    assert float(divergence_loss(narrow, wide, kind="kl_student_teacher")) == inf


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_not_looked_at(kind):
    teacher, student = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    want = divergence_loss(teacher, student, kind=kind, reduction="none")
    teacher[mask == 0], student[mask == 0] = math.nan, -math.inf
    student.requires_grad_()

    def loss(reduction, mask=mask):
        return divergence_loss(teacher, student, kind=kind, mask=mask, reduction=reduction)

    torch.testing.assert_close(loss("none"), want * mask, rtol=0, atol=0)
    torch.testing.assert_close(loss("sum"), (want * mask).sum())
    torch.testing.assert_close(loss("mean"), (want * mask).sum() / 4)
    torch.testing.assert_close(loss("mean"), loss("mean", mask.bool()), rtol=0, atol=0)
    loss("mean").backward()
    assert not bool(student.grad[mask == 0].any()) and bool((student.grad[mask == 1] != 0).any())
    student.grad = None
    nothing = loss("mean", torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0.0 and not bool(student.grad.any())


@pytest.mark.parametrize("kind", KINDS)
def test_padded_vocabulary_has_no_part_in_value_or_gradient(kind):
    teacher, student = torch.randn(4, 10), torch.randn(4, 10, requires_grad=True)
    wide = torch.cat([student.detach(), torch.full((4, 3), math.nan)], -1).requires_grad_()
    wide_teacher = torch.cat([teacher, torch.full((4, 6), 70.0)], -1)
    a = divergence_loss(teacher, student, kind=kind)
    b = divergence_loss(wide_teacher, wide, kind=kind, vocab_size=10)
    a.backward()
    b.backward()
    assert torch.equal(a, b) and torch.equal(student.grad, wide.grad[:, :10])
    assert not bool(wide.grad[:, 10:].any())
    assert torch.equal(jsd(wide_teacher, wide, vocab_size=10), jsd(teacher, student))


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_are_refused_by_name(side, value):
    rows = {"teacher": torch.zeros(5, 6), "student": torch.zeros(5, 6)}
    rows[side][4] = value
    for mask in (None, torch.tensor([0, 1, 0, 1, 1])):  # the caller's row, masked or not
        with pytest.raises(InvalidLogits, match=f"{side} logits, row 4") as caught:
            divergence_loss(rows["teacher"], rows["student"], mask=mask)
        assert (caught.value.model, caught.value.row) == (side, 4)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "forward_kl"}, "kind must be one of kl_teacher_student, .* got 'forward_kl'"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1.0"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"beta": math.nan}, "beta"),
        ({"reduction": "batchmean"}, "reduction must be one of none, sum, mean, got 'batchmean'"),
        ({"mask": torch.ones(3)}, r"mask must have shape \(2,\), got \(3,\)"),
        ({"mask": torch.tensor([0.5, 1.0])}, "mask must be bool or hold only 0 and 1"),
        ({"vocab_size": 5}, "vocab_size must be between 1 and 4"),
        ({"kind": "skew_kl", "detach_mixture": True}, "would leave no gradient"),
        ({"kind": "tvd", "detach_mixture": True}, "has no mixture"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        divergence_loss(torch.zeros(2, 4), torch.zeros(2, 4), **options)


def test_refused_shapes():
    with pytest.raises(ValueError, match="4 and 5 logits a row: pass vocab_size"):
        divergence_loss(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="agree in all but the last dimension"):
        jsd(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="base must be one of 2, e, got 10"):
        jsd(torch.zeros(2, 4), torch.zeros(2, 4), base=10)
