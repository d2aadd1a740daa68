"""Around the CUDA kernels: how work is split, what nvcc makes of them, why they cannot run."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch
from switchkd_kernels import _cuda, _native, sample, switch_select

from benchmarks import cuda_resources

H100 = 90, 132, 232448, 233472  # capability, processors, bytes for a block and for a processor
A100 = 80, 108, 166912, 167936
needs_compiler = pytest.mark.skipif(
    _native.unavailable() is not None, reason="no compiler, or no native library"
)


# ------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan_for and fits of plan.h, for a device, rows, V, and bytes of either model's logit."""
    try:
        cxx = _native.compiler()
    except _native.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(
        '#include "plan.h"\n'
        "using namespace switchkd::cuda;\n"
        'extern "C" void plan(const int64_t* in, int64_t* out) {\n'
        "  const Device device{static_cast<int>(in[0]), static_cast<int>(in[1]), in[2], in[3]};\n"
        "  const Dtype t = in[6] == 4 ? FLOAT32 : FLOAT16, s = in[7] == 4 ? FLOAT32 : BFLOAT16;\n"
        "  const Plan p = plan_for(device, in[4], in[5], t, s);\n"
        "  const int64_t found[] = {p.cluster, p.splits, p.slots, p.slice, p.shared_bytes,\n"
        "                           p.teacher_bytes, fits(p, device, 1), fits(p, device, 2)};\n"
        "  std::copy(found, found + 8, out);\n"
        "}\n"
    )
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{_native.csrc() / 'cuda'}",
    ]
    _native.run([*cxx, *flags, "plan.cpp", "-o", "plan.so"], folder)
    library = ctypes.CDLL(str(folder / "plan.so"))

    def plan(device, rows, vocab, teacher=2, student=2):
        out = (ctypes.c_int64 * 8)()
        library.plan((ctypes.c_int64 * 8)(*device, rows, vocab, teacher, student), out)
        names = ["cluster", "splits", "slots", "slice", "shared_bytes", "teacher_bytes"]
        names += ["fits", "fits_twice"]
        return dict(zip(names, out, strict=True))

    return plan


def test_clusters_leave_room_for_a_second_block_or_else_fit(plan):
    for vocab, size, cluster, twice in (
        (1000, 2, 1, 1), (32000, 2, 2, 1), (50257, 2, 2, 1), (128256, 2, 8, 1), (151936, 2, 8, 1),
        (32000, 4, 4, 1), (50257, 4, 4, 1), (151936, 4, 8, 0),
    ):  # fmt: skip
        found = plan(H100, 4096, vocab, size, size)
        assert (found["cluster"], found["fits"], found["fits_twice"]) == (cluster, 1, twice), vocab
        assert found["slice"] * cluster >= vocab > found["slice"] * (cluster - 1)
        assert found["slots"] * 4096 >= found["slice"]
        assert found["shared_bytes"] == 2048 + 2 * found["teacher_bytes"]
        assert found["teacher_bytes"] >= found["slice"] * size
    mixed = plan(H100, 4096, 50257, 2, 4)
    assert mixed["cluster"] == 4 and mixed["teacher_bytes"] % 16 == 0


def test_few_rows_take_wider_clusters(plan):
    assert [plan(H100, rows, 50257)["cluster"] for rows in (1, 16, 17, 33, 34)] == [8, 8, 4, 4, 2]
    assert plan(H100, 1, 4096)["cluster"] == 1  # a tile: nothing to share


def test_rows_that_no_cluster_holds_are_streamed(plan):
    for device, rows, vocab, size, splits in (
        (H100, 4096, 256_000, 4, 1), (H100, 2, 256_000, 4, 63), (A100, 1, 151936, 2, 38),
        (A100, 100, 151936, 2, 2), (A100, 4096, 50257, 2, 1), (A100, 1, 7, 2, 1),
    ):  # fmt: skip
        found = plan(device, rows, vocab, size, size)
        assert (found["cluster"], found["splits"]) == (0, splits)
        assert found["slice"] * splits >= vocab > found["slice"] * (splits - 1)
        assert found["shared_bytes"] <= device[2] and not found["fits"]


# ------------------------------------------------------------------------------- without a GPU


def test_the_choice_says_why_it_cannot_run(monkeypatch):
    z = torch.randn(2, 8)
    one = {"seed": 0, "sequence_ids": 0, "positions": 0, "impl": "cuda"}
    with pytest.raises(RuntimeError, match="'cuda' cannot run: it needs an NVIDIA GPU, .* on cpu"):
        switch_select(z, z, 0.5, **one)
    with pytest.raises(RuntimeError, match="cannot run: its kernel takes .*, got torch.float64"):
        switch_select(z.double(), z.double(), 0.5, **one)
    with pytest.raises(RuntimeError, match="'cuda' cannot run: only switch_select has it"):
        sample(z, **one)


def test_without_a_compiler_the_reason_and_a_remedy_are_said(monkeypatch):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.setattr(_native, "unavailable", lambda: None)
    _cuda._unavailable.cache_clear()
    try:
        reason = _cuda._unavailable(9, 0)
        assert reason.startswith("no CUDA compiler: no-such-nvcc is not on the path; install")
        monkeypatch.setattr(_native, "unavailable", lambda: "no C++ compiler")
        _cuda._unavailable.cache_clear()
        assert _cuda._unavailable(9, 0) == "no C++ compiler"
    finally:
        _cuda._unavailable.cache_clear()


# ------------------------------------------------------------------------------- nvcc


def nvcc():
    try:
        return _native.nvcc()
    except _native.BuildError:
        return None


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@pytest.mark.slow
@needs_nvcc
@needs_compiler
def test_the_library_builds_as_on_a_gpu(tmp_path):
    """Loads, too: nothing that it needs is only where a driver is."""
    target = tmp_path / "cuda.so"
    _native.compile_cuda_into(target, ("90a",))
    load = f"import torch; torch.ops.load_library({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_has_left_its_table_of_resources():
    """Compiled for every target, warnings being errors."""
    pytest.importorskip("triton")  # for its disassembler
    rows = cuda_resources.measure()
    assert [line for row in rows for line in cuda_resources.problems(row)] == []
    key = cuda_resources.KEY
    kept = {tuple(row[name] for name in key) for row in cuda_resources.read_table()}
    made = {tuple(row[name] for name in key) for row in rows}
    missing = {"sm_100"} if not any(row["target"] == "sm_100" for row in rows) else set()
    assert made == {row for row in kept if row[-1] not in missing}


def test_the_table_of_resources():
    rows = cuda_resources.read_table()
    assert [line for row in rows for line in cuda_resources.problems(row)] == []
    assert {row["target"] for row in rows} == {"sm_80", "sm_90a", "sm_100"}
    row = rows[-1] | {"kernel": "resident", "spill_bytes": 8, "bulk_copies": 0, "registers": 65}
    assert len(cuda_resources.problems(row)) == 3
    assert len(cuda_resources.problems(rows[-1] | {"kernel": "streaming", "copy_bits": 32})) == 1


NAME = "_ZN8switchkd4cuda41_GLOBAL__N__1_9_select_cu_28residentILi1ELin1EEEvNS0_9SelectionE"
USAGE = f"""
ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'
ptxas info    : Function properties for {NAME}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers
"""
SASS = f"""
\t\tFunction : {NAME}
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 UBLKCP.S.G [UR4], [UR6], UR8 ;
        /*0020*/                   LDGSTS.E.BYPASS.64 [R4], desc[UR16][R8.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR16][R8.64] ;
        /*0040*/                   LDS.U16 R8, [R2] ;
        /*0050*/                   LDS.64 R8, [R2] ;
        /*0060*/                   NOP;
"""


def test_the_output_of_the_compiler_is_read():
    name = ("resident", "bf16", "any")
    assert cuda_resources.parse_usage(USAGE) == {name: {"registers": 56, "spill_bytes": 16}}
    numbers = {"instructions": 6, "bulk_copies": 1, "copy_bits": 64, "load_bits": 64}
    assert cuda_resources.parse_code(SASS) == {name: numbers}


def test_nvcc_is_looked_for_where_it_is_named(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", f"{compiler} -v")
    assert _native.nvcc() == [str(compiler), "-v"]
    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert shutil.which("nvcc") is None and _native.nvcc() == [str(compiler)]
