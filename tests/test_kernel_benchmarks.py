"""benchmarks/kernels.py on small shapes: rows as promised, a gate that stops what is wrong."""

import csv
import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from switchkd_kernels import _native

from benchmarks import kernel_cases, kernels, sweep_kernels, timing
from benchmarks.kernel_cases import Case, bytes_moved

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
NATIVE = ["cpu"] * (_native.unavailable() is None)
KEYS = [
    "op", "impl", "mode", "rows", "vocab", "dtype", "median_ms", "p20_ms", "p80_ms", "gbps",
    "ceiling_share", "peak_mb", "speedup_vs_eager", "speedup_vs_compile", "device",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One tiny shape an op, and no peer: importing them takes longer than everything here."""

    def one(op, device, quick):
        kind, widths = "", (0, 0)
        if op == "linear_divergence_loss":
            kind, widths = "generalized_jsd", (8, 12)
        elif op == "divergence_loss":
            kind = "skew_reverse_kl"
        found = [Case(op, 4, 300, torch.float32, kind, widths)]
        if op == "switch_select":
            found += [found[0]._replace(kind=kind) for kind in ("known", "student known")]
        return found

    def absent(case):
        raise ModuleNotFoundError("a peer")

    monkeypatch.setattr(kernels, "cases", one)
    for peer in ("trl", "orda"):
        monkeypatch.setattr(kernel_cases, peer, absent)


def test_every_op_writes_the_promised_rows(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("rows.json", "rows.csv")]
    command = ["--quick", "--device", "cpu", "--json", paths[0], "--csv", paths[1]]
    assert kernels.main([*command, "--op", "switch_select,sample,jsd", "--op", "divergence_loss",
                         "--op", "linear_divergence_loss"]) == 0  # fmt: skip
    with open(paths[0], encoding="utf-8") as file:
        rows = json.load(file)
    with open(paths[1], encoding="utf-8") as file:
        assert [row["op"] for row in csv.DictReader(file)] == [row["op"] for row in rows]
    for row in rows:
        assert list(row) == KEYS
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] < math.inf
        assert row["device"] and row["speedup_vs_compile"] is None
        if row["op"] != "ceiling":
            assert row["ceiling_share"] > 0 and 0 < row["speedup_vs_eager"] < math.inf
            assert (row["gbps"] is None) == (row["op"] == "linear_divergence_loss")
    found = {(row["op"], row["impl"], row["mode"]) for row in rows}
    ours = {
        "switch_select": ["fwd", "fwd known", "fwd student known"],
        "sample": ["fwd"],
        "jsd": ["fwd", "bwd", "full"],
        "divergence_loss": [f"{mode} skew_reverse_kl" for mode in ("fwd", "bwd", "full")],
        "linear_divergence_loss": ["full generalized_jsd 8/12"],
    }
    want = {
        (op, impl, mode)
        for op, modes in ours.items()
        for mode in modes
        for impl in (*NATIVE, "reference", "eager")
    }
    want |= {("ceiling", "copy", "copy"), ("ceiling", "gemm", "gemm k=512")}
    want |= {("ceiling", "copy", mode) for mode in ours["switch_select"]}
    assert found == want | {("ceiling", "gemms", "full generalized_jsd 8/12")}
    out = capsys.readouterr().out
    for line in (
        "triton (needs a GPU: its interpreter is never timed)",
        "compile (left out of --quick)",
        "liger (needs a GPU)",
        "trl (not installed)",
    ):
        assert f"not measured: {line}" in out


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("switch_select", "teacher's log-probability off by"),
        ("sample", "below the largest perturbed logit"),
        ("divergence_loss", "expected"),
    ],
)
def test_one_of_ours_that_is_wrong_stops_the_run(op, message, monkeypatch, capsys):
    right = getattr(kernel_cases, op)

    def wrong(*args, **options):
        out = right(*args, **options)
        if op == "switch_select":
            return out._replace(token=(out.token + 1) % 300)
        return (out + 1) % 300 if op == "sample" else 1.001 * out

    monkeypatch.setattr(kernel_cases, op, wrong)
    assert kernels.main(["--quick", "--device", "cpu", "--op", op]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"{[*NATIVE, 'reference'][0]} failed the gate of {op} 4 x 300" in out
    assert message in out


def test_a_wrong_gradient_writer_or_divergence_is_found():
    case = Case("jsd", 4, 300, torch.float32)
    data = kernel_cases.inputs(case, CPU, 0)
    want = kernel_cases.expected(case, data)
    run = kernel_cases.eager(case)

    def half(t, s):
        loss = run(t, s)
        return loss.detach() + 0.5 * (loss - loss.detach())

    assert kernel_cases.differs(case, "eager", run, data, want) is None
    assert "gradient off by 0.5" in kernel_cases.differs(case, "eager", half, data, want)

    case = Case("switch_select", 4, 300, torch.float32)
    data = kernel_cases.inputs(case, CPU, 0)
    want = kernel_cases.expected(case, data)
    run = kernel_cases.ours(case, "reference")
    changes = {
        "1 of 4 writers differ": lambda got: got.from_teacher.logical_xor(torch.arange(4) == 2),
        "divergence off by 0.01": lambda got: got.divergence + 0.01,
        "student's log-probability off by": lambda got: got.student_logprob - 0.01,
    }
    fields = "from_teacher", "divergence", "student_logprob"
    for field, (message, change) in zip(fields, changes.items(), strict=True):

        def wrong(*args, field=field, change=change):
            got = run(*args)
            return got._replace(**{field: change(got)})

        assert message in kernel_cases.differs(case, "reference", wrong, data, want)


def test_a_peer_that_is_wrong_or_out_of_memory_is_not_timed(monkeypatch, capsys, tmp_path):
    def too_large(case):
        def run(*heads):
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")

        return run

    def wrong(case):
        return lambda *heads: sum(x.sum() for x in heads)

    monkeypatch.setattr(kernel_cases, "trl", too_large)
    monkeypatch.setattr(kernel_cases, "orda", wrong)
    path = str(tmp_path / "rows.json")
    options = ["--quick", "--device", "cpu", "--json", path]
    assert kernels.main([*options, "--op", "linear_divergence_loss"]) == 0
    with open(path, encoding="utf-8") as file:
        rows = {row["impl"]: row for row in json.load(file)}
    assert "orda" not in rows
    assert rows["trl"]["median_ms"] is None and rows["trl"]["speedup_vs_eager"] is None
    assert rows["reference"]["median_ms"] > 0
    assert (
        "failed its gate: orda, linear_divergence_loss 4 x 300 generalized_jsd 8/12: value"
        in " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize(
    ("op", "mode", "passes"),
    [
        ("switch_select", "fwd graph", 2), ("sample", "fwd", 1), ("jsd", "fwd", 2),
        ("divergence_loss", "bwd skew_kl", 3), ("divergence_loss", "full skew_kl", 5),
        ("linear_divergence_loss", "full skew_kl 8/12", 0),
    ],
)  # fmt: skip
def test_bytes_by_hand(op, mode, passes):
    assert bytes_moved(Case(op, 3, 10, torch.bfloat16), mode) == passes * 3 * 10 * 2


def test_shares_of_ceilings(monkeypatch):
    """2 rows of 8 bytes a ms in 1e-3 of the copy; half the time of the products."""
    bench = kernels.Bench(CPU, None, True, 1.0)
    bench.copy_gbps = 0.016
    monkeypatch.setattr(bench, "timer", lambda run, prepare: timing.Times(0.5, 1.0, 2.0))
    bench.timer.peak_mb = lambda run, prepare: None
    row = bench.row(Case("jsd", 1, 2000, torch.float32), "jsd", "eager", "fwd", None, None)
    assert row.gbps == pytest.approx(0.032) and row.ceiling_share == pytest.approx(2.0)
    bench.typical = "median_ms"  # as on a GPU
    row = bench.row(Case("jsd", 1, 2000, torch.float32), "jsd", "eager", "fwd", None, None)
    assert row.gbps == pytest.approx(0.016) and row.ceiling_share == pytest.approx(1.0)
    case = Case("linear_divergence_loss", 1, 2000, torch.float32, "tvd", (3, 4))
    floor = bench.row(case, "ceiling", "gemms", "full", None, None)
    floor.median_ms = 0.5
    row = bench.row(case, case.op, "eager", "full", None, None, floor)
    assert row.ceiling_share == 0.5 and row.gbps is None and row.mode == "full tvd 3/4"


def test_implementations_take_turns():
    order = []
    tasks = [(order.append, lambda i, name=name: ((name, i),)) for name in "ab"]
    times = timing.Timer(CPU).in_turns(tasks, 0.0)
    assert len(times) == 2 and all(0 < one.p20 <= one.median <= one.p80 for one in times)
    measured = order[4:]  # after two of each to warm up
    assert measured[:20] == [(name, i) for name in "ab" for i in range(10)]
    assert len(measured) == 5 * 2 * 10 and measured[-1] == ("b", 49)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as Linux counts")
def test_memory_of_a_cpu_run():
    """80 MiB that live at once, and 80 that follow them; in a process whose heap has no holes."""
    code = """
import torch
from benchmarks.timing import Timer

def run(size):
    for _ in range(2):
        torch.ones(size), torch.ones(size)

print(Timer(torch.device("cpu")).peak_mb(run, lambda i: (10 * 2**20,)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 75 < float(done.stdout) < 100


def test_process_time_needs_threads_that_do_not_spin(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", "--clock", "cpu"])
    assert "needs OMP_WAIT_POLICY=PASSIVE" in capsys.readouterr().err
    timer = timing.Timer(CPU, process_time=True)
    assert timer(time.sleep, lambda i: (0.02,)).median < 10  # asleep, not busy


def test_cases_of_a_cpu_cover_the_known_tokens():
    found = kernel_cases.cases("switch_select", CPU, False)
    assert {case.kind for case in found} == set(kernel_cases.KNOWN_TOKENS)
    assert all(case.compiled for case in found)
    assert {(case.rows, case.vocab) for case in found} == {(64, 50257), (32, 151936), (1, 151936)}


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--op", "softmax"])
    assert "got 'softmax'" in capsys.readouterr().err


def test_shapes_of_a_gpu(monkeypatch):
    """Of the cases for a GPU, which need none to be listed."""
    monkeypatch.undo()
    gpu = torch.device("cuda")
    found = kernel_cases.cases("switch_select", gpu, False)
    assert len(found) == 6 * 4 and all(case.dtype == torch.bfloat16 for case in found)
    assert [case.rows for case in found if case.compiled] == [1, 32, 1024]
    linear = kernel_cases.cases("linear_divergence_loss", gpu, False)
    assert {case.widths for case in linear} == {(896, 3584), (4096, 4096)} and len(linear) == 16
    for op in kernel_cases.OPS:
        quick = kernel_cases.cases(op, gpu, True)
        assert 1 <= len(quick) <= 2 and {case.vocab for case in quick} == {151936}


def test_the_sweep_needs_a_gpu_and_finds_the_constants(capsys):
    if not torch.cuda.is_available():
        assert sweep_kernels.main([]) == 2
        assert capsys.readouterr().out.count("\n") == 1
    for op in sweep_kernels.OPS:
        module = importlib.import_module(f"switchkd_kernels.{op}")
        found = sweep_kernels.launch_constants(module)
        assert {"BLOCK", "WARPS"} <= set(found) and "NOISE" not in found


def test_the_sweep_varies_a_block_with_its_warps():
    calls = []

    def measure(point):
        calls.append(point)
        tile = abs(point["BLOCK"] - 4) + 3 * abs(point["WARPS"] * 2 - point["BLOCK"])
        return tile + abs(point["REGISTERS"] - 5)

    grid = {"BLOCK": (2, 4, 8), "REGISTERS": (5, 6), "WARPS": (1, 2, 4)}
    best = sweep_kernels.descend(grid, {"BLOCK": 8, "REGISTERS": 6, "WARPS": 4}, measure)
    assert best == {"BLOCK": 4, "REGISTERS": 5, "WARPS": 2}
    assert len(calls) == 9 + 1 + 8  # all tiles, the other registers, all other tiles again


def test_a_draw_of_few_rows_is_swept_as_a_graph_and_a_loss_with_its_gradient(monkeypatch):
    captures = []
    monkeypatch.setattr(sweep_kernels, "ours", lambda case, impl: kernel_cases.eager(case))
    monkeypatch.setattr(sweep_kernels, "differs", lambda *_: None)
    monkeypatch.setattr(
        sweep_kernels, "launch_constants", lambda module: {"WARPS": (module.WARPS,)}
    )
    monkeypatch.setattr(
        sweep_kernels, "captured", lambda run, args: captures.append(args) or (lambda: run(*args))
    )
    timer = timing.Timer(CPU)
    timer.seconds = 0
    few = kernels.FEW_ROWS
    for op, rows, count in (("sample", few, 3), ("sample", few + 1, 0), ("divergence_loss", 2, 0)):
        captures.clear()
        case = Case(op, rows, 30, torch.float32, "tvd" if op == "divergence_loss" else "")
        (row,), best = sweep_kernels.sweep(case, timer, "a device")
        assert row["error"] is None and row["median_ms"] > 0 and list(best) == ["WARPS"]
        assert len(captures) == count


def test_the_memory_checker_is_given_tests():
    """Each word of its -k names one."""
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    file, words = re.search(r'-x (tests/\w+\.py) \\\n +-k "([^"]+)"', script).groups()
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    for word in words.split(" or "):
        assert any(word in name for name in names), word
