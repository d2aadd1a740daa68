"""The native CPU kernels against the reference, for every instruction set of this processor."""

import math

import pytest
import torch
from oracle import check_close, logits, poisoned
from switchkd_kernels import (
    InvalidLogits,
    _backend,
    _native,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    reference,
    sample,
    switch_select,
)
from switchkd_kernels.rowwise import KINDS

pytestmark = pytest.mark.skipif(_native.unavailable() is not None, reason="no native library")

# 1 token, fewer than a register, odd, one over a block, and a block and a register
WIDTHS = (1, 7, 50, 513, 1025, 5003)


def instruction_sets():
    flags = torch.backends.cpu.get_cpu_capability()
    return [
        "baseline",
        *["avx2"] * (flags in ("AVX2", "AVX512")),
        *["avx512"] * (flags == "AVX512"),
    ]


@pytest.fixture(params=instruction_sets())
def instructions(request):
    torch.ops.switchkd_native.use(request.param)
    yield request.param
    torch.ops.switchkd_native.use("")


def where(rows, seed=7):
    ids = torch.arange(rows) * 2**33 + 5
    return {"seed": seed, "sequence_ids": ids, "positions": torch.arange(rows) * 3}


HARD = {  # arguments of `logits`; of the rows in turn
    "mixed": {"spread": (3e-3, 1, 1, 20), "holes": (0, 0.5, 0, 0)},
    "equal": {"spread": 0.0},
    "offset": {"offset": 1e4, "spread": 0.3},
    "disjoint": {"spread": 300.0},
}


def check_selection(got, teacher, student, threshold, **options):
    """Tokens and writers equal those in float64, values are as good as the plain ones."""
    want = reference.switch_select(teacher.double(), student.double(), threshold, **options)
    plain = reference.switch_select(teacher, student, threshold, **options)
    margin = (want.divergence - threshold).abs() > 1e-4 * want.divergence
    assert torch.equal(got.from_teacher[margin], want.from_teacher[margin])
    same = got.from_teacher == want.from_teacher
    assert torch.equal(got.token[same], want.token[same])
    for name in ("divergence", "teacher_logprob", "student_logprob"):
        fields = (getattr(x, name)[same] for x in (got, plain, want))
        check_close(*fields, what=name, scale=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", HARD)
def test_switch_select(instructions, hard, dtype):
    for V in WIDTHS:
        teacher, student = logits(6, V, dtype, **HARD[hard])
        for metric in ("jsd", "kl", "rank"):
            for t, s in ((1.0, 1.0), (0.7, 0.0), (0.0, 1.3)):
                options = where(6) | {
                    "metric": metric, "teacher_temperature": t, "student_temperature": s,
                    "base": "e" if V % 2 else 2,
                }  # fmt: skip
                with poisoned():
                    got = switch_select(teacher, student, 0.31, impl="cpu", **options)
                check_selection(got, teacher, student, 0.31, **options)


def test_known_tokens_padding_and_strides(instructions):
    teacher, student = logits(9, 700, seed=3)
    teacher = torch.cat([teacher, torch.full((9, 68), math.nan)], 1)[::2, :]
    student = torch.cat([torch.zeros(9, 1), student, torch.full((9, 2), math.inf)], 1)[::2, 1:]
    known = torch.tensor([0, 699, 5, 5, 77])
    for options in ({}, {"student_token": known}, {"student_token": known, "teacher_token": known}):
        options = options | where(5) | {"vocab_size": 700}
        got = switch_select(teacher, student, 0.3, impl="cpu", **options)
        check_selection(got, teacher[:, :700], student[:, :700], 0.3, **options)
    with pytest.raises(ValueError, match="student_token must be"):
        switch_select(teacher, student, 0.3, impl="cpu", vocab_size=700, student_token=known + 1,
                      **where(5))  # fmt: skip


def test_disjoint_rows_are_one_bit_and_equal_rows_zero(instructions):
    teacher = torch.full((2, 600), -math.inf)
    teacher[0, :300], teacher[1] = 0.0, torch.randn(600)
    student = teacher.clone()
    student[0] = -math.inf
    student[0, 300:] = 0.0
    got = switch_select(teacher, student, torch.tensor([1.0, 0.0]), impl="cpu", **where(2))
    disjoint, equal = got.divergence.tolist()
    assert 1 - 5e-7 <= disjoint <= 1.0 and equal == 0.0 and not got.from_teacher.any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_few_long_rows_are_split(instructions, rows, threads):
    teacher, student = logits(rows, 151936, spread=0.5)
    torch.set_num_threads(threads)
    try:
        got = switch_select(teacher, student, 0.01, impl="cpu", **where(rows))
        drawn = sample(student, impl="cpu", **where(rows))
        loss = divergence_loss(teacher, student, impl="cpu", reduction="none")
    finally:
        torch.set_num_threads(1)
    check_selection(got, teacher, student, 0.01, **where(rows))
    assert torch.equal(drawn, reference.sample(student.double(), **where(rows)))
    plain = reference.divergence_loss(teacher, student, reduction="none")
    want = reference.divergence_loss(teacher.double(), student.double(), reduction="none")
    check_close(loss, plain, want, what="loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch_or_on_threads(instructions, dtype):
    teacher, student = logits(3, 151936, dtype, spread=0.5)
    key = where(3)

    def run(part, threads):
        torch.set_num_threads(threads)
        try:
            options = key | {name: key[name][part] for name in ("sequence_ids", "positions")}
            z = teacher[part], student[part]
            chosen = switch_select(*z, 0.01, impl="cpu", **options)
            return *chosen, *loss_and_gradient(divergence_loss, *z, impl="cpu")
        finally:
            torch.set_num_threads(1)

    want = run(slice(None), 1)
    for threads in (1, 2):
        for part in (slice(None), *(slice(i, i + 1) for i in range(3))):
            for got, whole in zip(run(part, threads), want, strict=True):
                assert torch.equal(got, whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample(instructions, dtype):
    filters = (
        {}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 20}, {"top_p": 0.4}, {"min_p": 0.05},
        {"temperature": 0.6, "top_k": 100, "top_p": 0.8, "min_p": 0.01}, {"stream": 3},
    )  # fmt: skip
    for V in WIDTHS:
        _, z = logits(8, V, dtype, holes=(0, 0.4), spread=(1, 0.1))
        for options in filters:
            got = sample(z, impl="cpu", **where(8), **options)
            want = reference.sample(z.double(), **where(8), **options)
            assert torch.equal(got, want), (V, options)


def test_tokens_have_the_distribution(instructions):
    z = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5]).expand(20000, 5)
    drawn = sample(z, impl="cpu", seed=3, sequence_ids=torch.arange(20000), positions=0)
    want = 20000 * z[0].softmax(-1)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[3] == 0
    kept = want > 0
    assert ((counts - want)[kept] ** 2 / want[kept]).sum() < 18.5  # 3 degrees: 1 in 3000


def loss_and_gradient(run, teacher, student, **options):
    student = student.clone().requires_grad_()
    loss = run(teacher, student, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "jsd"])
def test_losses(instructions, kind, dtype):
    for V in WIDTHS:
        for weight, detach in ((0.1, False), (0.5, kind == "skew_reverse_kl")):
            for hard in ("mixed", "equal", "offset"):
                teacher, student = logits(6, V, dtype, **HARD[hard])
                if hard == "mixed":  # -inf in the same places, where every kind is finite
                    student = student.masked_fill(teacher == -math.inf, -math.inf)
                    teacher = teacher.masked_fill(student == -math.inf, -math.inf)
                options = {"kind": kind, "alpha": weight, "beta": 0.6 * weight,
                           "detach_mixture": detach}  # fmt: skip
                ours, plain = divergence_loss, reference.divergence_loss
                if kind == "jsd":
                    ours, plain, options = jsd, reference.jsd, {"base": "e"}
                with poisoned():
                    got = loss_and_gradient(ours, teacher, student, impl="cpu", **options)
                near = loss_and_gradient(plain, teacher, student, **options)
                want = loss_and_gradient(plain, teacher.double(), student.double(), **options)
                name = f"{kind} {hard} V={V}"
                tvd = 0.1 if kind == "tvd" else 1e-9  # linear in d, so in its rounding, too
                check_close(got[0], near[0], want[0], what=name, scale=tvd)
                check_close(got[1], near[1], want[1], what=f"gradient of {name}", scale=0.1)


@pytest.mark.parametrize("kind", [*KINDS, "jsd"])
def test_a_token_that_is_ruled_out_has_no_gradient(instructions, kind):
    teacher, student = logits(4, 700)
    teacher[:, 3:600:7] = student[:, 3:600:7] = -math.inf
    if not kind.startswith("kl"):  # which would be infinite
        teacher[0, 650], student[1, 651] = -math.inf, -math.inf
    z = student.requires_grad_()
    options = {"impl": "cpu", "reduction": "sum"}
    loss = jsd(teacher, z, **options) if kind == "jsd" else divergence_loss(
        teacher, z, kind=kind, **options
    )  # fmt: skip
    for _ in range(2):  # made with the loss, then by itself
        grad = torch.autograd.grad(loss, z, retain_graph=True)[0]
        assert grad.isfinite().all() and not grad[student == -math.inf].any()
        assert grad[:, 4:10].all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kl_teacher_student"])
def test_a_certain_student_has_no_gradient(instructions, kind):
    """It is a difference of equals where q is 1; of a q of 1 - 1e-7 it would be noise."""
    teacher, student = logits(8, 513, spread=3.0)
    student[:, 5] = 200.0
    for alpha in (0.1, 0.9):
        options = {"kind": kind, "alpha": alpha, "beta": alpha}
        loss, grad = loss_and_gradient(divergence_loss, teacher, student, impl="cpu", **options)
        assert (loss > 0.01).all() and grad.abs().max() < 1e-30


def test_losses_of_masked_padded_and_strided_rows(instructions):
    teacher, student = logits(12, 300, seed=1)
    teacher = torch.cat([teacher, torch.full((12, 20), math.nan)], 1)
    student = torch.cat([student, torch.full((12, 4), math.nan)], 1)
    teacher[3] = math.nan  # masked
    mask = torch.arange(12) % 4 != 3
    teacher[7], teacher[11] = math.nan, math.nan
    options = {"mask": mask.reshape(3, 4), "vocab_size": 300, "kind": "skew_kl"}
    shaped = teacher.reshape(3, 4, -1), student.reshape(3, 4, -1)
    got = loss_and_gradient(divergence_loss, *shaped, impl="cpu", **options)
    want = loss_and_gradient(reference.divergence_loss, *shaped, **options)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert not got[1][..., 300:].any() and not got[1].reshape(12, -1)[~mask].any()
    mean = divergence_loss(*shaped, impl="cpu", **options)
    torch.testing.assert_close(mean, want[0].sum() / 9, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_undefined_rows_raise(instructions, side, bad):
    pair = dict(zip(("teacher", "student"), logits(5, 600), strict=True))
    pair[side][3, slice(None) if bad == -math.inf else 513] = bad
    z = tuple(pair.values())
    runs = (
        lambda: switch_select(*z, 0.5, impl="cpu", **where(5)),
        lambda: divergence_loss(*z, impl="cpu"),
        lambda: sample(pair[side], impl="cpu", model=side, **where(5)),
        lambda: sample(pair[side], impl="cpu", model=side, top_p=0.5, **where(5)),
    )
    for run in runs:
        with pytest.raises(InvalidLogits, match=f"{side} logits, row 3") as caught:
            run()
        assert (caught.value.model, caught.value.row) == (side, 3)


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.9}])
def test_logits_that_leave_float32_when_divided_raise(instructions, filters):
    z = torch.tensor([[0.0, 0.0, 1.0], [1e35, 0.0, 1.0]])
    with pytest.raises(InvalidLogits, match=r"student logits, row 1: \+inf"):
        sample(z, temperature=1e-5, impl="cpu", **filters, **where(2))


HEADS = {
    "plain": {},
    "all": {"logit_scale": 0.7, "softcap": 2.5, "ce_weight": 0.3, "biases": True},
    "labels": {"kind": "cross_entropy", "ce_weight": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_linear_divergence_loss(instructions, head, dtype):
    options = dict(HEADS[head])
    kinds = [options.pop("kind")] if "kind" in options else [*KINDS]
    V, biases = 531, options.pop("biases", False)
    heads = [torch.randn(s) for s in ((10, 8), (V + 3, 8), (10, 6), (V, 6), (V + 3,), (V,))]
    heads = [x.to(dtype) for x in heads]
    if options.get("ce_weight"):
        options["labels"] = torch.randint(0, V, (10,))

    def run(impl, x, kind):
        x = [one.clone().requires_grad_() for one in x]
        given = (None, None, *x[2:4]) if kind == "cross_entropy" else x[:4]
        more = {"teacher_bias": x[4], "student_bias": x[5]} if biases else {}
        if kind == "cross_entropy":
            more.pop("teacher_bias", None)
        loss = linear_divergence_loss(
            *given, kind=kind, vocab_size=V if kind != "cross_entropy" else None, chunk_size=4,
            mask=torch.arange(10) != 4, impl=impl, **options, **more,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, [x[2], x[3], *[x[5]] * biases])

    for kind in kinds:
        got, near = run("cpu", heads, kind), run("reference", heads, kind)
        want = run("reference", [x.double() for x in heads], kind)
        for i, (one, plain, truth) in enumerate(zip(got, near, want, strict=True)):
            norm = truth.flatten().norm()
            one, plain, truth = (x.reshape(1, -1) for x in (one, plain, truth))
            # bfloat16 gradients of a chunk are rounded in both, each in its own way
            tiny = 1e-6 if dtype == torch.float32 else 4e-3
            check_close(one, plain, truth, what=f"{kind} {i}", tiny=tiny, scale=float(norm))


def test_rows_of_a_head_that_define_no_distribution_raise():
    heads = [torch.randn(s) for s in ((6, 4), (9, 4), (6, 4), (9, 4))]
    heads[2][4] = math.nan
    with pytest.raises(InvalidLogits, match="student logits, row 4"):
        linear_divergence_loss(*heads, chunk_size=3, impl="cpu")


def test_the_ops_refuse_what_they_cannot_take():
    z, ids = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    native = torch.ops.switchkd_native
    rest = (ids, ids, 0, 1.0, 0, 1.0, 0.0)
    for bad, vocab, message in (
        (z.double(), 8, "must be float32 or bfloat16, got Double"),
        (z.t().contiguous().t(), 8, "rows with stride 1, got 2"),
        (z[0], 8, r"must be \(rows, vocabulary\)|Dimension out of range"),
        (z, 9, r"vocab_size must be in \[1, 8\] and below 2\^31, got 9"),
    ):
        with pytest.raises((RuntimeError, IndexError), match=message):
            native.sample(bad, *rest, vocab, 0)
    with pytest.raises(RuntimeError, match="sequence_ids must be Long"):
        native.sample(z, ids.int(), ids, *rest[2:], 8, 0)
    with pytest.raises(RuntimeError, match="as many rows, got 2 and 1"):
        native.divergence(z, z[:1], None, 0, 0.1, False, 8, True, False)
    with pytest.raises(RuntimeError, match="kind must be in"):
        native.divergence(z, z, None, 99, 0.1, False, 8, True, False)
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 8\), got 8"):
        native.head_chunk(z, z, None, None, ids + 8, 0, 0.1, False, 8, 1.0, 0.0, 1.0, True)
    with pytest.raises(RuntimeError, match="instruction set must be one of"):
        native.use("mmx")


def test_the_choice_of_implementation():
    z = torch.randn(2, 8)
    assert _backend.choose(None, z) == _backend.choose(None, z.bfloat16(), z) == "cpu"
    assert _backend.choose(None, z.double()) == _backend.choose(None, z.half()) == "reference"
    with pytest.raises(RuntimeError, match="'cpu' cannot run: .* got torch.float64"):
        jsd(z.double(), z.double(), impl="cpu")


def test_under_torch_compile():
    teacher, student = logits(4, 300)

    def run(t, s):
        chosen = switch_select(t, s, 0.4, **where(4))
        return chosen.token, sample(s, **where(4)), divergence_loss(t, s)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grads = []
    for one in (compiled, run):
        z = student.clone().requires_grad_()
        tokens, drawn, loss = one(teacher, z)
        loss.backward()
        grads.append((tokens, drawn, loss.detach(), z.grad))
    for one, other in zip(*(found[:3] for found in grads), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(grads[0][3], grads[1][3], rtol=1e-5, atol=1e-8)  # two ways to it


def test_a_second_backward_is_the_first(instructions):
    teacher, student = logits(6, 700)
    z, mask = student.requires_grad_(), torch.tensor([1, 1, 0, 1, 1, 1])
    loss = divergence_loss(teacher, z, mask=mask, vocab_size=690, impl="cpu")
    first, second = (torch.autograd.grad(3 * loss, z, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)
    assert first[:2, :690].any(1).all() and not first[2].any() and not first[:, 690:].any()
    each = divergence_loss(teacher, z, mask=mask, reduction="none", impl="cpu")
    upstream = torch.where(mask > 0, 1.0, math.nan)
    assert not torch.autograd.grad(each, z, upstream)[0][2].any()


def test_no_rows():
    z = torch.empty(0, 8)
    assert switch_select(
        z, z, 0.5, seed=0, sequence_ids=0, positions=0, impl="cpu"
    ).token.shape == (0,)
    assert sample(z, seed=0, sequence_ids=0, positions=0, impl="cpu").shape == (0,)
    assert divergence_loss(z, z, reduction="sum", impl="cpu") == 0
