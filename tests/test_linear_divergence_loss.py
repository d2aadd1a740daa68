"""The chunked loss equals the loss on full logits: values, every gradient, bounded memory."""

import math
import sys
import weakref

import pytest
import torch
from switchkd_kernels import InvalidLogits, divergence_loss, linear_divergence_loss
from switchkd_kernels.reference import KINDS
from torch.utils._python_dispatch import TorchDispatchMode

N, V, HT, HS = 13, 23, 7, 5


def heads(dtype=torch.float64, teacher_rows=V, student_rows=V):
    """Teacher and student (hidden, weight, bias); the student's want gradients."""
    teacher = [torch.randn(*shape, dtype=dtype) for shape in ((N, HT), (teacher_rows, HT))]
    student = [torch.randn(*shape, dtype=dtype) for shape in ((N, HS), (student_rows, HS))]
    teacher.append(torch.randn(teacher_rows, dtype=dtype))
    student.append(torch.randn(student_rows, dtype=dtype))
    return teacher, [x.requires_grad_() for x in student]


def full(teacher, student, *, labels=None, ce_weight=0.0, logit_scale=1.0, softcap=None, **options):
    """The same loss with both models' logits at once, and autograd."""

    def logits(hidden, weight, bias):
        z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    a, b = logits(*teacher), logits(*student)
    loss = divergence_loss(a, b, **options)
    if labels is None:
        return loss
    size = options.get("vocab_size") or b.shape[-1]
    ce = torch.nn.functional.cross_entropy(b[..., :size], labels, reduction="none")
    mask = options.get("mask")
    ce = ce if mask is None else ce[mask.bool()]
    return loss + ce_weight * (ce.sum() if options.get("reduction") == "sum" else ce.mean())


def chunked(teacher, student, **options):
    (th, tw, tb), (sh, sw, sb) = teacher, student
    return linear_divergence_loss(th, tw, sh, sw, teacher_bias=tb, student_bias=sb, **options)


def grads(loss, tensors):
    return torch.autograd.grad(3.0 * loss, tensors)


CASES = [
    {},
    {"reduction": "sum"},
    {"mask": (torch.arange(N) % 3 > 0)},
    {"mask": (torch.arange(N) % 3 > 0).long(), "reduction": "sum", "labels": True},
    {"softcap": 2.0, "logit_scale": 0.7},
    {"softcap": 1.5, "labels": True, "logit_scale": 3.0},
    {"labels": True},
    {"detach_mixture": True},
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
def test_equals_full_logits(case, chunk_size):
    options = dict(CASES[case])
    if options.get("labels"):
        options |= {"labels": torch.randint(0, V, (N,)), "ce_weight": 0.4}
    teacher, student = heads()
    want = full(teacher, student, **options)
    got = chunked(teacher, student, chunk_size=chunk_size, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(grads(got, student), grads(want, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(chunked(teacher, student, chunk_size=chunk_size, **options), got)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    teacher, student = heads()
    options = {"kind": kind, "alpha": 0.2, "beta": 0.3}
    want, got = (
        full(teacher, student, **options),
        chunked(teacher, student, chunk_size=5, **options),
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(grads(got, student), grads(want, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_row_weights_multiply_each_rows_loss_and_gradient(impl, reduction):
    dtype = torch.float64 if impl == "reference" else torch.float32
    teacher, student = heads(dtype)
    weights = torch.rand(N, dtype=dtype) * 2
    mask, labels = torch.arange(N) % 4 > 0, torch.randint(0, V, (N,))
    options = {"mask": mask, "labels": labels, "ce_weight": 0.3}
    with torch.no_grad():
        rows = chunked(teacher, student, reduction="none", **options)
        weighted = chunked(teacher, student, reduction="none", row_weights=weights, **options)
    torch.testing.assert_close(weighted, weights * rows)
    options |= {"chunk_size": 4, "impl": impl}
    got = chunked(teacher, student, reduction=reduction, row_weights=weights, **options)
    each = [  # a row alone, by its mask
        weights[i] * chunked(teacher, student, reduction="sum", **options | {"mask": one})
        for i in range(N)
        if mask[i] and (one := torch.arange(N) == i) is not None
    ]
    want = sum(each) / (len(each) if reduction == "mean" else 1)
    tolerance = dict(rtol=1e-9, atol=1e-14) if impl == "reference" else dict(rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(got, want, **tolerance)
    wanted = grads(want, student)
    for a, b in zip(grads(got, student), wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    weight_grad = torch.zeros(V, HS) if impl == "triton" else None
    if weight_grad is not None:
        chunked(
            teacher, student, reduction=reduction, row_weights=weights, weight_grad=weight_grad,
            weight_grad_scale=3.0, **options,
        )  # fmt: skip
        torch.testing.assert_close(weight_grad, wanted[1], **tolerance)


def test_row_weights_of_another_shape_or_type_are_refused():
    teacher, student = heads()
    with pytest.raises(ValueError, match=r"row_weights must be floats of shape \(13,\), got .*12"):
        chunked(teacher, student, row_weights=torch.ones(12))
    with pytest.raises(ValueError, match=r"row_weights must be floats .* got torch.int64"):
        chunked(teacher, student, row_weights=torch.ones(N, dtype=torch.int64))


def test_gradcheck():
    teacher, student = heads()
    labels = torch.randint(0, V, (N,))

    def loss(*student):
        return chunked(teacher, student, labels=labels, ce_weight=0.3, softcap=3.0, chunk_size=4)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(V + 9, V + 4), (V, V + 1), (V + 1, V)])
def test_padded_vocabularies(teacher_rows, student_rows):
    teacher, student = heads(torch.float64, teacher_rows, student_rows)
    with torch.no_grad():
        student[1][V:] = math.nan  # padding is not looked at
    labels = torch.randint(0, V, (N,))
    cut = [[h, w[:V], b[:V]] for h, w, b in (teacher, student)]
    options = {"labels": labels, "ce_weight": 0.5}
    got = chunked(teacher, student, vocab_size=V, chunk_size=4, **options)
    want = full(*cut, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(grads(got, student), grads(want, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    _, weight, bias = grads(chunked(teacher, student, vocab_size=V), student)
    assert not bool(weight[V:].any()) and not bool(bias[V:].any())


def test_leading_dimensions():
    teacher, student = heads()
    folded = [[h[:12].unflatten(0, (3, 4)), w, b] for h, w, b in (teacher, student)]
    mask = torch.arange(12) % 2 == 0
    options = {"labels": torch.randint(0, V, (12,)), "ce_weight": 0.2, "mask": mask}
    flat = [[h[:12], w, b] for h, w, b in (teacher, student)]
    got = chunked(
        *folded, **{k: v if k == "ce_weight" else v.view(3, 4) for k, v in options.items()}
    )
    torch.testing.assert_close(got, chunked(*flat, **options), rtol=0, atol=0)
    with torch.no_grad():
        rows = chunked(*folded, reduction="none", mask=mask.view(3, 4))
    assert rows.shape == (3, 4) and not bool(rows[~mask.view(3, 4)].any())
    want = chunked(*flat, mask=mask, reduction="sum")
    torch.testing.assert_close(rows.sum(), want.detach())


def test_masked_rows_are_not_looked_at_and_no_row_is_zero():
    teacher, student = heads()
    mask = torch.arange(N) < 8
    want = chunked([teacher[0][:8], *teacher[1:]], [student[0][:8], *student[1:]])
    with torch.no_grad():
        teacher[0][8:], student[0][8:] = math.nan, math.inf
    got = chunked(teacher, student, mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not bool(grads(got, student)[0][8:].any())
    nothing = chunked(teacher, student, mask=torch.zeros(N))
    assert nothing.item() == 0.0 and not any(bool(g.any()) for g in grads(nothing, student))


def test_frozen_parts_get_no_gradient_and_cost_no_product():
    teacher, student = heads(torch.float32)
    products = []
    for frozen in ((), (1,), (0,), (0, 1, 2)):
        for i, tensor in enumerate(student):
            tensor.requires_grad_(i not in frozen)
        with Products() as counted:
            loss = chunked(teacher, student)
        products.append(counted.count)
        assert loss.requires_grad == (len(frozen) < 3)
        if loss.requires_grad:
            live = [x for x in student if x.requires_grad]
            for a, b in zip(grads(loss, live), grads(full(teacher, student), live), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert products == [4, 3, 3, 2]
    for tensor in student:
        tensor.requires_grad_()
    with torch.no_grad(), Products() as counted:
        chunked(teacher, student, reduction="none")
    assert counted.count == 2


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


def test_tied_head_adds_both_gradients():
    teacher, (hidden, weight, _) = heads()
    embedded = hidden + weight[torch.randint(0, V, (N,))]  # one matrix embeds and projects
    ours = linear_divergence_loss(*teacher[:2], embedded, weight, chunk_size=4)
    plain = full([*teacher[:2], None], [embedded, weight, None])
    got = torch.autograd.grad(ours, weight, retain_graph=True)[0]
    want = torch.autograd.grad(plain, weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_autocast_multiplies_in_bfloat16_and_sums_the_weight_in_float32():
    teacher, student = heads(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(teacher, student, chunk_size=3)
        want = full(teacher, student)
    got, plain = grads(loss, student), grads(want, student)
    exact = grads(full(*[[x.double() for x in t] for t in (teacher, student)]), student)
    assert loss.dtype == torch.float32 and [g.dtype for g in got] == [torch.float32] * 3
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=1e-2)
    for ours, other, truth in zip(got, plain, exact, strict=True):
        assert float((ours - truth).norm()) <= 1.5 * float((other - truth).norm()) + 1e-6
        assert float((ours - truth).norm()) > 1e-4 * float(truth.norm())  # it was bfloat16


def test_half_precision_inputs_keep_their_dtype_in_the_gradient():
    teacher, student = heads(torch.float32)
    exact = grads(chunked(teacher, student), student)
    half = [[x.detach().bfloat16() for x in t] for t in (teacher, student)]
    for x in half[1]:
        x.requires_grad_()
    loss = chunked(*half, chunk_size=2)
    got = grads(loss, half[1])
    assert loss.dtype == torch.float32 and {g.dtype for g in got} == {torch.bfloat16}
    for a, b in zip(got, exact, strict=True):
        assert float((a - b).norm()) < 0.05 * float(b.norm())


class Memory(TorchDispatchMode):
    """The largest tensor made, and the most elements alive at once, among those made inside."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen = {}

    def _free(self, key, size):
        self.seen.pop(key, None)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.seen or func.is_view or func._schema.name.endswith("_"):
                continue
            size = storage.nbytes() // tensor.element_size()
            self.seen[key] = weakref.finalize(tensor, self._free, key, size)
            self.alive += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self.alive)
        return out


@pytest.mark.parametrize("n", [256, 1024])
def test_memory_is_that_of_a_chunk_whatever_the_number_of_rows(n):
    v, h, chunk = 2000, 8, 16
    teacher = torch.randn(n, h), torch.randn(v, h)
    student = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    with Memory() as memory:
        loss = linear_divergence_loss(*teacher, *student, chunk_size=chunk)
        loss.backward()
    assert memory.largest <= chunk * v  # dW has v * h = half as many
    assert memory.peak < 16 * chunk * v  # never n * v = 16 or 64 chunks of one model
    with Memory() as memory:
        divergence_loss(teacher[0] @ teacher[1].t(), student[0] @ student[1].t()).backward()
    assert memory.largest >= n * v  # the measure can see it


def test_default_chunk_keeps_one_models_logits_within_64_mib(monkeypatch):
    module = sys.modules[linear_divergence_loss.__module__]
    chosen = module.backend.choose(None, torch.zeros(1))
    monkeypatch.setitem(module.CHUNK_BYTES, chosen, 4 * V * 20)
    n = 50
    with Memory() as memory, torch.no_grad():
        linear_divergence_loss(
            torch.randn(n, 3), torch.randn(V, 3), torch.randn(n, 3), torch.randn(V, 3)
        )
    assert memory.largest == 20 * V
    assert chosen == "reference" or memory.peak < 4 * 20 * V  # two, and the heads
    monkeypatch.setitem(module.CHUNK_BYTES, chosen, 1)
    with Memory() as memory, torch.no_grad():
        linear_divergence_loss(
            torch.randn(n, 3), torch.randn(V, 3), torch.randn(n, 3), torch.randn(V, 3)
        )
    assert memory.largest == 16 * V


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_rows_without_a_distribution_are_refused_by_the_callers_row(side):
    teacher, student = heads()
    with torch.no_grad():
        (teacher if side == "teacher" else student)[0][9, 0] = math.nan
    for mask in (None, torch.arange(N) > 4):
        with pytest.raises(InvalidLogits, match=f"{side} logits, row 9") as caught:
            chunked(teacher, student, mask=mask, chunk_size=4)
        assert (caught.value.model, caught.value.row) == (side, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction 'none' has no gradient"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"softcap": 0.0}, r"softcap must be in \(0, inf\), got 0.0"),
        ({"logit_scale": math.inf}, "logit_scale"),
        ({"ce_weight": 1.0}, r"ce_weight 1.0 needs labels of shape \(13,\), got None"),
        ({"ce_weight": -1.0}, "ce_weight"),
        ({"ce_weight": 1.0, "labels": torch.full((N,), V)}, r"labels must be in \[0, 23\)"),
        ({"ce_weight": 1.0, "labels": torch.full((N,), -100)}, "labels"),
        ({"mask": torch.ones(4)}, "mask must have shape"),
        ({"kind": "kl"}, "kind must be one of"),
        ({"student_bias": torch.zeros(3)}, r"student_bias must be \(23,\), got \(3,\)"),
        ({"vocab_size": 99}, "vocab_size"),
    ],
)
def test_refused_arguments(options, message):
    (th, tw, _), (sh, sw, _) = heads()
    with pytest.raises(ValueError, match=message):
        linear_divergence_loss(th, tw, sh, sw, **options)


def test_a_frozen_weight_has_no_gradient_for_a_buffer():
    (th, tw, _), (sh, sw, _) = heads(torch.float32)
    buffer = torch.zeros(V, HS)
    with pytest.raises(ValueError, match="weight_grad: got a frozen student_weight, expected"):
        linear_divergence_loss(th, tw, sh, sw.detach(), weight_grad=buffer)
    with torch.no_grad():
        linear_divergence_loss(th, tw, sh, sw.detach(), weight_grad=buffer)


def test_refused_shapes_and_dtypes():
    (th, tw, _), (sh, sw, _) = heads()
    with pytest.raises(ValueError, match="student_hidden must be"):
        linear_divergence_loss(th, tw, sh, tw)
    with pytest.raises(ValueError, match="agree in all but the last"):
        linear_divergence_loss(th[:3], tw, sh, sw)
    with pytest.raises(ValueError, match="23 and 20 logits a row: pass vocab_size"):
        linear_divergence_loss(th, tw, sh, sw[:20])
    with pytest.raises(TypeError, match="teacher_hidden and teacher_weight must have one dtype"):
        linear_divergence_loss(th.float(), tw, sh, sw)


def test_cross_entropy_alone_needs_no_teacher():
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (9,))
    loss = linear_divergence_loss(
        None, None, hidden, weight,
        kind="cross_entropy", labels=labels, vocab_size=11, chunk_size=4, softcap=3.0,
    )  # fmt: skip
    logits = 3 * torch.tanh(hidden @ weight[:11].T / 3)
    want = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="takes no teacher"):
        linear_divergence_loss(hidden, weight, hidden, weight, kind="cross_entropy", labels=labels)
    with pytest.raises(ValueError, match="needs a teacher"):
        linear_divergence_loss(None, None, hidden, weight)
