"""What the losses do of autograd: one derivative, none that nobody asked for, in autocast, too."""

import gc

import pytest
import torch
from conftest import DEVICE
from switchkd_kernels import (
    _backend,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    reference,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

IMPLS = [
    impl
    for impl in ("reference", "cpu", "triton")
    if impl == "reference" or _backend.refuses(impl, torch.zeros(1, device=DEVICE)) is None
]
every = pytest.mark.parametrize("impl", IMPLS)


def pair(rows=4, width=12):
    teacher, student = torch.randn(2, rows, width, device=DEVICE)
    return teacher, student.requires_grad_()


def logits(teacher, student, impl):
    return divergence_loss(teacher, student, impl=impl)


def heads(teacher, student, impl):
    return linear_divergence_loss(teacher, teacher, student, student.detach(), impl=impl)


def definition(teacher, student, impl):
    return reference.divergence_loss(teacher, student)


@every
@pytest.mark.parametrize("loss", [logits, heads, definition])
def test_a_second_derivative_is_refused_not_dropped(impl, loss):
    teacher, student = pair()
    value = loss(teacher, student, impl)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once: got create_graph=True"):
        torch.autograd.grad(value, student, create_graph=True)
    assert torch.autograd.grad(value, student)[0].allclose(first)
    again = torch.autograd.grad(
        checkpoint(loss, teacher, student, impl, use_reentrant=False), student
    )
    assert again[0].allclose(first)


@pytest.mark.parametrize("loss", [logits, heads])
def test_the_ops_that_torch_compile_sees_have_one_derivative_too(loss):
    teacher, student = pair()
    want = torch.autograd.grad(loss(teacher, student, None), student)[0]
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="eager")(teacher, student, None)
    got = torch.autograd.grad(value, student, retain_graph=True)[0]
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, student, create_graph=True)


@every
@pytest.mark.parametrize("loss", [logits, heads])
def test_a_checkpoint_keeps_nothing_that_was_made_for_backward(impl, loss):
    teacher, student = pair(7, 131)

    def alive():
        gc.collect()
        return sum(type(x) is torch.Tensor and x.numel() == 7 * 131 for x in gc.get_objects())

    before = alive()
    value = checkpoint(loss, teacher, student, impl, use_reentrant=False)
    assert alive() == before
    want = torch.autograd.grad(loss(teacher, student, impl), student)[0]
    for _ in range(2):
        got = torch.autograd.grad(value, student, retain_graph=True)[0]
        torch.testing.assert_close(got, want)


@every
@pytest.mark.parametrize("loss", [logits, heads])
def test_gradients_of_several_upstreams_at_once(impl, loss):
    teacher, student = pair()
    several = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    value = loss(teacher, student, impl)
    one = torch.autograd.grad(value, student, retain_graph=True)[0]
    for _ in range(2):  # the second time nothing is left of what forward made
        got = torch.autograd.grad(
            value, student, several, is_grads_batched=True, retain_graph=True
        )[0]
        torch.testing.assert_close(got, several[:, None, None] * one)


@every
def test_the_jacobian_of_masked_rows(impl):
    teacher, student = pair()
    mask = torch.tensor([True, False, True, True], device=DEVICE)

    def rows(student):
        return divergence_loss(teacher, student, mask=mask, reduction="none", impl=impl)

    of = torch.autograd.functional.jacobian
    torch.testing.assert_close(of(rows, student, vectorize=True), of(rows, student))


class Largest(TorchDispatchMode):
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loss", [jsd, divergence_loss])
def test_no_gradient_is_made_that_cannot_be_asked_for(quiet, loss):
    teacher, student = pair(8, 100)
    student = student * 1.0  # as a model's logits, not a leaf
    with Largest() as seen:
        loss(teacher, student, impl="cpu")
    assert seen.entries == 8 * 100  # made with the loss
    with quiet(), Largest() as seen:
        loss(teacher, student, impl="cpu")
    assert seen.entries < 100


def test_float16_autocast_takes_what_can_multiply_in_it():
    teacher, student = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(2, 20, 8)

    def run(**options):
        return linear_divergence_loss(teacher, weights[0], student, weights[1], **options)

    want = run()
    with torch.autocast("cpu", torch.float16):
        got = run()
        with pytest.raises(RuntimeError, match="'cpu' cannot run: "):
            run(impl="cpu")
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    grads = (torch.autograd.grad(x, student)[0] for x in (got, want))
    torch.testing.assert_close(*grads, rtol=3e-2, atol=3e-3)


@every
def test_autocast_leaves_the_sum_of_a_weighted_bias_in_float32(impl):
    hidden, weight = torch.randn(400, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    bias = torch.zeros(20, device=DEVICE, requires_grad=True)

    def gradient(row_weights):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_divergence_loss(
                hidden, weight, hidden.flip(0), weight, student_bias=bias,
                row_weights=row_weights, impl=impl, kind="tvd",
            )  # fmt: skip
        return torch.autograd.grad(loss, bias)[0]

    want = gradient(None)
    got = gradient(torch.ones(400, device=DEVICE))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@every
def test_a_weight_of_zero_is_not_the_default(impl):
    hidden, weight = torch.randn(6, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    options = {"kind": "cross_entropy", "labels": torch.arange(6, device=DEVICE), "impl": impl}

    def run(**more):
        return linear_divergence_loss(None, None, hidden, weight, **options, **more)

    assert run(ce_weight=0.0) == 0 and run() == run(ce_weight=None) == run(ce_weight=1.0) > 0
    torch.testing.assert_close(run(ce_weight=0.25), run() / 4)


def test_offsets_take_no_digits_from_log_probabilities():
    z = 3 * torch.randn(50, 1001) + 1e4
    got, want = (
        reference.switch_select(x, x, 0.5, seed=0, sequence_ids=range(50), positions=0)
        for x in (z, z.double())
    )
    near = {"rtol": 0, "atol": 3e-6}
    torch.testing.assert_close(got.student_logprob.double(), want.student_logprob, **near)
    labels = torch.arange(50)
    args = None, None, z, torch.eye(1001)  # whose products are z
    got = linear_divergence_loss(*args, kind="cross_entropy", labels=labels, impl="reference")
    want = torch.nn.functional.cross_entropy(z.double(), labels)
    torch.testing.assert_close(got.double(), want, **near)


def test_a_graph_break_does_not_lose_what_an_op_cannot_take():
    torch._dynamo.reset()
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8, requires_grad=True)
    row_weights = torch.rand(5)

    def run(buffer):
        return linear_divergence_loss(
            hidden, weight.detach().flip(0), hidden, weight, weight_grad=buffer,
            row_weights=row_weights,
        )  # fmt: skip

    want, got = torch.zeros(2, 20, 8)
    values = run(want), torch.compile(run, backend="eager")(got)
    torch.testing.assert_close((got, values[1]), (want, values[0]))
    assert want.abs().sum() > 0
