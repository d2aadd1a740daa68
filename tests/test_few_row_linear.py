"""Linear layers over few rows: against float64, in every instruction set, and inside a model."""

import pytest
import torch
from conftest import ARCHITECTURES, EOS, PAD, VOCAB, tiny_model
from oracle import check_close
from switchkd_kernels import few_row_linear
from switchkd_kernels.few_row_linear import usable
from torch import nn
from transformers.pytorch_utils import Conv1D

from switchkd.decoder import rollout
from switchkd.layers import few_rows
from switchkd.policies import Switch

pytestmark = pytest.mark.skipif(not usable(), reason="the native kernels cannot be built here")
CPU = torch.device("cpu")


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    try:
        torch.ops.switchkd_native.use(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.switchkd_native.use("")


# (rows, inputs, outputs): one row, rows short of and over a tile, widths short of a register
SHAPES = [
    (1, 1, 1), (1, 64, 64), (5, 3, 7), (6, 17, 65), (7, 576, 130), (13, 100, 257), (48, 33, 64)
]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, transposed, instruction_set):
    M, K, N = shape
    x, w, b = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    given = w.t().contiguous() if transposed else w
    for bias in (b, None):
        want = nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
        plain = nn.functional.linear(x, w, bias)
        got = few_row_linear(x, given, bias, transposed=transposed)
        check_close(got, plain, want, what=f"{shape}", tiny=1e-6)


def test_rows_of_a_stride_and_leading_dimensions():
    x = torch.randn(2, 3, 40)[:, :, :24]
    w = torch.randn(50, 30)[:, :24]
    want = nn.functional.linear(x, w)
    torch.testing.assert_close(few_row_linear(x, w), want, rtol=1e-5, atol=1e-5)
    assert few_row_linear(x[:0], w).shape == (0, 3, 50)
    nothing = few_row_linear(torch.zeros(2, 0), torch.zeros(5, 0), torch.ones(5))
    assert torch.equal(nothing, torch.ones(2, 5))


def test_infinite_and_undefined_inputs_stay_where_they_are():
    x = torch.randn(4, 40)
    x[1, 3], x[2, 7] = float("inf"), float("nan")
    for transposed in (False, True):
        y = few_row_linear(x, torch.ones(40, 70), transposed=True) if transposed else (
            few_row_linear(x, torch.ones(70, 40)))  # fmt: skip
        assert y[1].isposinf().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


def test_wrong_arguments_are_told():
    x, w = torch.randn(2, 5), torch.randn(3, 5)
    for args, message in (
        ((x[:, :4], w), r"x must be \(rows, 5\), got \[2, 4\]"),
        ((x.double(), w), "must be float32, got Double and Float"),
        ((x, w.t().contiguous().t()), "rows of stride 1, got 1 and 3"),
        ((x, w[0]), r"weight must have two dimensions, got \[5\]"),
        ((x[0, 0], w), r"x must be \(rows, 5\), got \[1\]"),
        ((x, w, torch.zeros(4)), r"bias must be \(3,\) float32, got \[4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            few_row_linear(*args)


def test_the_result_has_no_gradient():
    x, w = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert not few_row_linear(x, w).requires_grad


def test_layers_change_within_the_context_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "switchkd.layers.few_row_linear", lambda *a, **k: calls.append(1) or few_row_linear(*a, **k)
    )
    linear, conv = nn.Linear(6, 4), Conv1D(4, 6)
    nn.init.normal_(conv.bias)
    x = torch.randn(3, 5, 6)
    with few_rows(CPU), torch.no_grad():
        got = linear(x), conv(x)
        assert len(calls) == 2
        nn.Linear(6, 4, dtype=torch.float64)(x.double())
        linear(torch.randn(49, 6))  # a library's product is as fast
        nn.Linear(6, 4, dtype=torch.bfloat16)(x.bfloat16())
    with few_rows(CPU):
        linear(x).sum().backward()  # training is not touched
    assert len(calls) == 2 and linear.weight.grad is not None
    with pytest.raises(ValueError), few_rows(CPU):
        raise ValueError
    for layer, value in ((linear, got[0]), (conv, got[1])):
        torch.testing.assert_close(layer(x), value, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rollouts_are_those_without_it(name, monkeypatch):
    teacher, student = (tiny_model(name, seed=seed, dtype=torch.float32) for seed in (1, 2))
    given = dict(max_new_tokens=12, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB)
    prompts = [[5, 6, 7], [8], [9, 10]]
    with_it = rollout(teacher, student, prompts, Switch(), block=3, drafter="student", **given)
    monkeypatch.setattr("switchkd.layers.usable", lambda: False)
    without = rollout(teacher, student, prompts, Switch(), block=3, drafter="student", **given)
    assert torch.equal(with_it.tokens, without.tokens)
    torch.testing.assert_close(
        with_it.divergence, without.divergence, rtol=1e-3, atol=1e-5, equal_nan=True
    )
