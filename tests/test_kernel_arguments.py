"""Arguments mean the same to every implementation, and so do refusals."""

import importlib
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE
from switchkd_kernels import (
    _backend,
    _native,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    sample,
    switch_select,
    uniform,
)
from torch._subclasses.fake_tensor import FakeTensorMode

ZEROS = torch.zeros(4, 6, device=DEVICE)
PATHS = {"PYTHONPATH": str(Path(_native.__file__).parents[1])}
KEY = {"seed": 1, "sequence_ids": torch.arange(4), "positions": 2}
IMPLS = [
    impl
    for impl in ("reference", "cpu", "triton")
    if impl == "reference" or _backend.refuses(impl, ZEROS) is None
]
every = pytest.mark.parametrize("impl", IMPLS)


def draw(z, impl, **options):
    return sample(z, impl=impl, **KEY | options)


def select(z, impl, threshold=0.5, **options):
    return switch_select(z, z, threshold, impl=impl, **KEY | options)


def loss(z, impl, **options):
    return divergence_loss(z, z, impl=impl, **options)


def distance(z, impl, **options):
    return jsd(z, z, impl=impl, **options)


def linear(z, impl, **options):
    return linear_divergence_loss(z, z, z, z, impl=impl, **options)


DRAWS = [
    ({"sequence_ids": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"\(4,\), got \(4, 1\)"),
    ({"positions": [0, 1, 2]}, ValueError, r"positions must be a number or \(4,\), got \(3,\)"),
    ({"positions": []}, ValueError, r"positions must be a number or \(4,\), got \(0,\)"),
    ({"positions": range(3)}, ValueError, r"\(4,\), got \(3,\)"),
    ({"sequence_ids": None}, TypeError, "sequence_ids must be a number or numbers, got NoneType"),
    ({"sequence_ids": "ab"}, TypeError, "sequence_ids must be a number or numbers, got str"),
    ({"sequence_ids": np.full(4, 0.5)}, TypeError, "must be integers, got torch.float64"),
    ({"positions": 2**80}, TypeError, "positions must be a number or numbers, got int: "),
    ({"positions": -1}, ValueError, "positions must be in .*, got -1"),
    ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
    ({"vocab_size": 3.0}, TypeError, "vocab_size must be an int, got float"),
    ({"seed": 10**400}, ValueError, r"seed must be in \[0, 2\^64\), got 10000"),
]
BY_OP = [
    *((op, *case) for op in (draw, select) for case in DRAWS),
    (draw, {"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    (draw, {"temperature": 1e300}, ValueError, r"0 \(greedy\) or in \[1e-5, 1e30\], got 1e\+300"),
    (draw, {"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
    (draw, {"top_k": 2**70}, ValueError, "top_k must be in .*, got 1180591620717411303424"),
    (draw, {"top_p": None}, TypeError, "top_p must be a number, got NoneType"),
    (draw, {"min_p": None}, TypeError, "min_p must be a number, got NoneType"),
    (draw, {"stream": 1.0}, TypeError, "stream must be an int, got float"),
    (draw, {"stream": 256}, ValueError, r"stream must be in \[0, 255\], got 256"),
    (select, {"threshold": None}, TypeError, "threshold must be a number or numbers, got None"),
    (select, {"threshold": [0.5] * 3}, ValueError, r"threshold must be .* \(4,\), got \(3,\)"),
    (select, {"threshold": [math.nan] * 4}, ValueError, "threshold must be .*, got NaN"),
    (select, {"teacher_temperature": None}, TypeError, "teacher_temperature must be a number"),
    (select, {"student_token": [0, 1, 2, 6]}, ValueError, r"student_token must be in \[0, 6\)"),
    (select, {"student_token": [[0]] * 4}, ValueError, r"student_token must be .*, got \(4, 1\)"),
    *(
        (op, {"mask": [True] * 4}, TypeError, "mask must be a tensor, got list")
        for op in (loss, distance, linear)
    ),
    (loss, {"vocab_size": 3.0}, TypeError, "vocab_size must be an int, got float"),
    (linear, {"labels": [0] * 4, "ce_weight": 1.0}, ValueError, r"shape \(4,\), got list"),
    (linear, {"logit_scale": None}, TypeError, "logit_scale must be a number, got NoneType"),
    (linear, {"chunk_size": 1.5}, TypeError, "chunk_size must be an int, got float"),
    (linear, {"weight_grad": [0.0]}, TypeError, "weight_grad must be a tensor, got list"),
    (linear, {"row_weights": [1.0] * 4}, TypeError, "row_weights must be a tensor, got list"),
    (linear, {"student_bias": [0.0] * 4}, TypeError, "biases must be a tensor, got list"),
    *(
        (op, change, error, message)
        for op in (loss, linear)
        for change, error, message in (
            ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
            ({"alpha": 1e-8}, ValueError, "alpha must be at least 1e-04 from .*, got 1e-08"),
            ({"alpha": 1 - 1e-9}, ValueError, "alpha must be at least 1e-04 from 0 and 1"),
            ({"beta": 1e-46}, ValueError, "beta must be at least 1e-04 from .*, got 1e-46"),
            ({"beta": 1 - 1e-5}, ValueError, "beta must be at least 1e-04 from 0 and 1"),
        )
    ),
]


@every
@pytest.mark.parametrize(("op", "change", "error", "message"), BY_OP)
def test_refusals(impl, op, change, error, message):
    with pytest.raises(error, match=message):
        op(ZEROS, impl, **change)


@every
@pytest.mark.parametrize("op", [draw, select, loss, distance, linear])
def test_logits_that_are_no_tensors(impl, op):
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        op(ZEROS.cpu().numpy(), impl)


@every
@pytest.mark.parametrize("op", [draw, select, loss, distance, linear])
def test_a_vocabulary_of_no_tokens_and_one_of_numpy(impl, op):
    with pytest.raises(ValueError, match="vocab_size must be between 1 and 0"):
        op(ZEROS[:, :0] if op is not linear else ZEROS[:0], impl)
    few, same = (op(ZEROS, impl, vocab_size=kind(3)) for kind in (np.int64, int))
    torch.testing.assert_close(few, same)


def test_logits_without_a_dimension():
    with pytest.raises(
        ValueError, match=r"agree in all but the last dimension, got \(5,\) and \(\)"
    ):
        divergence_loss(torch.randn(5), torch.tensor(1.0))


class Ops(torch.nn.Module):
    """What was exported."""

    def forward(self, z):
        options = {"vocab_size": z.shape[1], "sequence_ids": 3, "positions": 2}
        token = switch_select(z, z + 1, 0.5, seed=1, **options).token
        return token, sample(z, seed=1, **options), divergence_loss(z, z * 2)


@pytest.mark.skipif(DEVICE != "cpu", reason="native code for a CPU")
def test_what_was_exported_runs_in_a_process_that_has_loaded_no_native_code(tmp_path):
    z = torch.randn(4, 6)
    program = torch.export.export(Ops(), (z,), strict=False)
    torch.export.save(program, tmp_path / "ops.pt2")
    torch.save((z, Ops()(z)), tmp_path / "want.pt")
    text = (
        "import torch, switchkd_kernels\n"
        "z, want = torch.load('want.pt')\n"
        "got = torch.export.load('ops.pt2').module()(z)\n"
        "torch.testing.assert_close(got, want)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | PATHS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_streams_of_uniform_and_an_unknown_instruction_set(monkeypatch):
    with pytest.raises(TypeError, match="stream must be an int, got float"):
        uniform(0, 1, 2, 1.0)
    with pytest.raises(ValueError, match=r"positions must broadcast, got \(2,\) and \(3,\)"):
        uniform(0, [0, 1], [0, 1, 2], 1)
    monkeypatch.setenv("SWITCHKD_CPU", "foo")
    with pytest.raises(ValueError, match="one of baseline, avx2, avx512, got 'foo'"):
        _native.unavailable.__wrapped__()


@every
def test_whatever_holds_the_numbers(impl):
    z = torch.randn(4, 6, device=DEVICE)
    want = select(z, impl, 0.0), draw(z, impl)
    for ids in (range(4), [0, 1, 2, 3], np.arange(4), np.arange(4, dtype=np.uint8)):
        where = {"sequence_ids": ids, "positions": np.int64(2)}
        got = select(z, impl, torch.zeros(1), **where), draw(z, impl, **where)
        assert torch.equal(got[0].token, want[0].token) and torch.equal(got[1], want[1])
    assert draw(z[:0], impl, sequence_ids=[], positions=[]).shape == (0,)


@every
def test_numbers_of_any_kind(impl):
    z = torch.randn(4, 6, device=DEVICE)
    tenth, half = Fraction(1, 10), Fraction(1, 2)
    assert loss(z, impl, alpha=tenth, detach_mixture=1) == loss(
        z, impl, alpha=0.1, detach_mixture=True
    )
    numbers = {"alpha": tenth, "logit_scale": half, "softcap": Fraction(3)}
    assert linear(z[:, :4], impl, **numbers) == linear(
        z[:, :4], impl, **{name: float(x) for name, x in numbers.items()}
    )


def test_a_sharded_tensor_is_refused_not_read(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        z = torch.distributed.tensor.distribute_tensor(torch.zeros(4, 6), mesh)
        for op in (draw, select, loss, distance, linear):
            with pytest.raises(TypeError, match="must be whole, got a DTensor"):
                op(z, None)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def defaults():
    """Sets torch's default dtype and device, for the test alone."""

    def set_defaults(dtype=torch.float32, device=None):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield set_defaults
    set_defaults()


@every
def test_a_list_of_thresholds_keeps_its_digits_whatever_the_default_dtype(impl, defaults):
    teacher, student = torch.randn(2, 4, 6, device=DEVICE)
    near = [float(d) * (1 - 1e-5) for d in jsd(teacher, student, impl=impl)]
    defaults(torch.bfloat16)
    assert switch_select(teacher, student, near, impl=impl, **KEY).from_teacher.all()
    defaults()
    if impl == "reference":
        pair = teacher.double(), student.double()
        near = [float(d) * (1 - 1e-12) for d in jsd(*pair)]
        assert switch_select(*pair, near, **KEY).from_teacher.all()


@every
def test_lists_and_numbers_whatever_the_default_device(impl, defaults):
    z = torch.randn(4, 6, device=DEVICE)
    options = {"sequence_ids": [0, 1, 2, 3], "positions": [2] * 4}

    def run():
        chosen = select(z, impl, [0.0] * 4, **options)
        return *chosen, draw(z, impl, **options), loss(z, impl), linear(z, impl)

    want = run()
    defaults(device="meta")  # where nothing has a value
    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@every
@pytest.mark.parametrize("kind", ["skew_kl", "skew_reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("weight", [1e-4, 1 - 1e-4])
def test_the_weights_nearest_to_an_end(impl, kind, weight):
    teacher, student = 3 * torch.randn(2, 20, 300, dtype=torch.float64, device=DEVICE)
    student[::2, :150] = -math.inf

    def run(impl, dtype):
        z = student.to(dtype).requires_grad_()
        value = divergence_loss(
            teacher.to(dtype), z, kind=kind, alpha=weight, beta=weight, reduction="none", impl=impl
        )
        return value.detach().double(), torch.autograd.grad(value.sum(), z)[0]

    (got, grad), (want, _) = run(impl, torch.float32), run("reference", torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    assert grad.isfinite().all()


def test_the_implementation_for_a_device_without_kernels():
    nowhere = torch.zeros(2, 3, device="meta")
    assert _backend.choose(None, nowhere) == "reference"
    with pytest.raises(RuntimeError, match="'triton' cannot run: the tensors are on meta"):
        _backend.choose("triton", nowhere)


@pytest.mark.parametrize("nowhere", [FakeTensorMode, lambda: torch.device("meta")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_without_values_get_results_without_values(nowhere, dtype):
    def run():
        z = torch.zeros(4, 6, dtype=dtype)
        learns = [torch.zeros(4, 6, dtype=dtype, requires_grad=True) for _ in range(3)]
        mask, labels = torch.ones(4), torch.zeros(4, dtype=torch.int64)
        values = [
            divergence_loss(z, learns[0], mask=mask),
            jsd(z, learns[0], reduction="sum"),
            linear_divergence_loss(z, z, *learns[1:], mask=mask, labels=labels, ce_weight=0.5),
        ]
        sum(values).backward()
        chosen = select(z, None, [0.5] * 4, sequence_ids=labels)
        return *values, *(x.grad for x in learns), *chosen, draw(z, None, sequence_ids=labels)

    with nowhere():
        got = run()
    for a, b in zip(got, run(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("op", [draw, select, loss, distance, linear])
def test_one_trace_serves_any_number_of_rows_and_every_step(op):
    traces = []

    def backend(module, _inputs):
        traces.append(module)
        return module.forward

    def run(z, step):
        where = {"sequence_ids": step, "positions": step} if op in (draw, select) else {}
        return op(z, None, vocab_size=4, **where)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 5, 7):
        z = torch.randn(rows, 6, device=DEVICE)
        torch.testing.assert_close(compiled(z, rows), run(z, rows))
    assert len(traces) == 1


@pytest.mark.parametrize("op", [draw, select, loss])
def test_compiled_the_chosen_implementation_runs(op, monkeypatch):
    def refuse(*_args):
        raise AssertionError("not the one that was asked for")

    for name in ("sample", "switch_select", "divergence_loss"):
        launch = importlib.import_module(f"switchkd_kernels.{name}")._LAUNCH
        for other in ("cpu", "triton"):
            monkeypatch.setitem(launch, other, (refuse, refuse) if name[0] == "d" else refuse)
    torch._dynamo.reset()

    def run(z):
        return op(z, "reference", vocab_size=z.shape[1] - 1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    got, want = compiled(ZEROS), run(ZEROS)
    assert torch.equal(*(x[0] if isinstance(x, tuple) else x for x in (got, want)))
