"""The CUDA kernels of switch_select: their source runs here, a fibre for each thread of a cluster.

csrc/cuda/emulated.h stands in for the GPU, with 64 threads in a block. Where there is a GPU, the
tests with the marker `gpu` run the kernels themselves.
"""

import ctypes
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import DEVICE, MIXED, check_close, logits, poisoned
from switchkd_kernels import _cuda, _native, reference, sample, switch_select

from benchmarks import cuda_resources

kernel = sys.modules["switchkd_kernels.switch_select"]  # the package's attribute is the function
CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
INF, NAN = math.inf, math.nan
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
H100 = 90, 132, 232448, 233472  # capability, processors, bytes for a block and for a processor
A100 = 80, 108, 166912, 167936
EMULATED = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSWITCHKD_EMULATED"]
EMULATED += ["-DSWITCHKD_THREADS=64"]
THREADS, TILE = 64, 512
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
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CUDA}"]
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


# ------------------------------------------------------------------------------- emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Registers the op for tensors on the CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    cxx = _native.compiler()
    each = [
        [*cxx, *EMULATED, "-O1", "-fPIC", "-x", "c++", "-c", str(CUDA / "select.cu")],
        _native.with_torch(cxx, CUDA / "ops.cpp", *EMULATED[3:], "-O0"),
    ]
    link = [*cxx, "-shared", *_native.torch_libraries()]
    _native.build(folder / "emulated.so", each, link)
    torch.ops.load_library(folder / "emulated.so")


@pytest.fixture
def emulated(library, monkeypatch):
    """impl="cuda" for tensors on the CPU; the result sets how the kernels split their work."""
    monkeypatch.setattr(_cuda, "refuses", lambda *_: None)

    def split(**how):
        monkeypatch.setitem(kernel._LAUNCH, "cuda", partial(_cuda.switch_select, **how))

    return split


def where(rows):
    """Key and counters that use all of their bits."""
    n = torch.arange(rows, device=DEVICE)
    return {"seed": 2**64 - 3, "sequence_ids": n * (2**33 + 1) + 5, "positions": 2**32 - 1 - 7 * n}


def check(teacher, student, threshold=None, **options):
    """The kernel against the reference in float64: writer and token exactly. The default threshold:
    half and twice the divergence, in turn."""
    rows = len(teacher)
    options = where(rows) | options
    wide = teacher.double(), student.double()
    if threshold is None:
        threshold = reference.switch_select(*wide, 0.0, **options).divergence
        threshold = threshold * (0.5 + 1.5 * (torch.arange(rows, device=teacher.device) % 2))
    want = reference.switch_select(*wide, threshold, **options)
    plain = reference.switch_select(teacher.float(), student.float(), threshold, **options)
    with poisoned():  # what is left unwritten shows
        got = switch_select(teacher, student, threshold, impl="cuda", **options)
    assert [x.dtype for x in got] == [torch.int64, torch.bool, F32, F32, F32]
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.from_teacher, want.from_teacher)
    for i, scale in ((2, 0), (3, 1), (4, 1)):  # log p near 0 is a difference of larger numbers
        check_close(got[i], plain[i], want[i], what=got._fields[i], scale=scale)
    return got


SPLITS = {
    "one block": {"cluster": 1},
    "two blocks": {"cluster": 2},
    "eight blocks": {"cluster": 8},
    "streamed": {"splits": 1},
    "streamed in three": {"splits": 3},
}
DTYPES = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "float16": (F16, F16)}
DTYPES |= {"mixed": (BF16, F32), "mixed halves": (F16, BF16)}
slow = [pytest.mark.slow, needs_compiler]


@pytest.mark.parametrize("how", SPLITS)
class TestEmulated:
    pytestmark = slow

    @pytest.mark.parametrize("dtypes", DTYPES)
    def test_shapes_types_and_metrics(self, emulated, how, dtypes):
        emulated(**SPLITS[how])
        metrics = ("jsd", "kl", "rank")
        for i, V in enumerate((1, 3, 130, TILE + 1, 3 * TILE - 3)):  # odd, so rows are misaligned
            pair = zip(logits(4, V, seed=i, **MIXED), DTYPES[dtypes], strict=True)
            check(
                *(x.to(dtype) for x, dtype in pair), metric=metrics[i % 3], base="e" if i % 2 else 2
            )

    @pytest.mark.parametrize("metric", ["jsd", "kl", "rank"])
    def test_draws(self, emulated, how, metric):
        emulated(**SPLITS[how])
        teacher, student = logits(4, 1000, BF16, **MIXED)
        known = torch.tensor([0, 999, 5, 77])
        for options in (
            {"teacher_temperature": 0.7, "student_temperature": 1.3},
            {"teacher_temperature": 0, "student_temperature": 0},
            {"teacher_temperature": 0},
            {"student_token": known},
            {"student_token": known, "teacher_token": known.flip(0)},
        ):
            check(teacher, student, metric=metric, **options)

    def test_hard_rows(self, emulated, how):
        emulated(**SPLITS[how])
        for i, hard in enumerate(({"spread": 0.0}, {"offset": 1e4, "spread": 0.3}, {"holes": 0.9})):
            check(*logits(2, 777 + i, **hard))
        apart = torch.full((2, 601), -INF)
        apart[0, :300], apart[1] = 0.0, torch.randn(601)
        student = apart.clone()
        student[0] = -INF
        student[0, 300:] = 0.0
        got = check(apart, student, torch.tensor([1.0, 0.0]))
        assert got.divergence.tolist() == [1.0, 0.0] and not got.from_teacher.any()
        same = torch.zeros(2, 1029)  # of equal logits the first is the largest
        got = check(same, same, torch.tensor([0.0, -1.0]), teacher_temperature=0,
                    student_temperature=0)  # fmt: skip
        assert got.token.tolist() == [0, 0] and got.from_teacher.tolist() == [False, True]

    def test_undefined_rows_are_flagged_alone(self, emulated, how):
        emulated(**SPLITS[how])
        teacher, student = logits(6, 1100)
        teacher[0, 1099], student[1, 700], teacher[3, 0] = NAN, INF, NAN
        student[4] = -INF
        known = torch.full((6,), 3)
        got = switch_select(teacher, student, 0.3, impl="cuda", **where(6))
        assert got.token.lt(0).tolist() == [True, True, False, True, True, False]
        for value in got[2:]:
            assert torch.equal(value.isnan(), got.token < 0)
        assert not got.from_teacher[got.token < 0].any()
        good = torch.tensor([2, 5])
        options = {name: x[good] if name != "seed" else x for name, x in where(6).items()}
        want = reference.switch_select(teacher[good], student[good], 0.3, **options)
        assert torch.equal(got.token[good], want.token)
        known[2] = 1100  # as on a GPU, where nobody looks at it before
        args = [teacher, student, torch.full((6,), 0.3), *(torch.arange(6),) * 2]
        token, *_ = kernel._LAUNCH["cuda"](*args, None, known, 1, 1.0, 1.0, "jsd", True, 1100)
        assert token.lt(0).tolist() == [True, True, True, True, True, False]

    def test_padding_strides_and_arguments_by_row(self, emulated, how):
        emulated(**SPLITS[how])
        teacher, student = logits(9, 701, BF16, seed=3)
        teacher = torch.cat([teacher, torch.full((9, 67), NAN, dtype=BF16)], 1)[::2, :]
        student = torch.cat([student[:, :1], student, student[:, :2] / 0], 1)[::2, 1:]
        options = where(9)
        options = options | {name: options[name][::2] for name in ("sequence_ids", "positions")}
        check(teacher[:, :701], student[:, :701], torch.rand(10)[::2], **options)
        with poisoned():
            got = switch_select(teacher, student, 0.3, impl="cuda", vocab_size=701, **options)
        want = reference.switch_select(
            teacher[:, :701].double(), student[:, :701].double(), 0.3, **options
        )
        assert torch.equal(got.token, want.token)
        one = {"seed": 5, "sequence_ids": 3, "positions": torch.tensor(7)}
        check(teacher[:1, :701].expand(3, 701), student[:1, :701].expand(3, 701), 0.3, **one)


@pytest.mark.slow
@needs_compiler
def test_a_wide_vocabulary(emulated):
    """The plan of an H100, at one eighth of its threads: clusters of 8, and streams beyond."""
    emulated()
    check(*logits(1, 50257, BF16, seed=2))
    check(*logits(1, 151936, BF16, seed=2), student_token=torch.tensor([7]))
    emulated(cluster=8)
    with pytest.raises(RuntimeError, match="cluster of 8 need .* bytes of shared memory and"):
        check(*logits(1, 300_000), 0.1)


@pytest.mark.slow
@needs_compiler
def test_the_op_refuses_what_it_cannot_take(emulated):
    z, ids = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    half = torch.full((2,), 0.5)

    def run(t, s, V=8, threshold=half, ids=ids, metric="jsd", cluster=0, splits=0):
        rest = 0, 1.0, 1.0, 0, 0, metric, True, V, 0, cluster, splits
        torch.ops.switchkd_native.cuda_switch_select(t, s, threshold, ids, ids, None, None, *rest)

    run(z, z)
    for args, options, message in (
        ((z.double(), z), {}, "teacher logits must be float32, bfloat16 or float16, got Double"),
        ((z, z.t().contiguous().t()), {}, "student logits must have rows with stride 1, got 2"),
        ((z, z[:1]), {}, "as many rows on one device, got 2 on cpu and 1"),
        ((z, z, 9), {}, r"vocab_size must be in \[1, 8\] and at most 268435456, got 9"),
        ((z, z), {"ids": ids.int()}, "sequence_ids must be Long on cpu, got Int"),
        ((z, z), {"threshold": half[:1]}, r"threshold must be \(2\), got \[1\]"),
        ((z, z), {"metric": "tvd"}, "metric must be one of jsd, kl, rank, got 'tvd'"),
        ((z, z), {"cluster": 3}, "cluster must be 0, 1, 2, 4 or 8, got 3"),
        ((z, z), {"cluster": 2, "splits": 2}, r"splits must be in \[0, 64\] and 0 for a cluster"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*args, **options)
    empty = torch.empty(0, 8)
    got = switch_select(empty, empty, 0.5, seed=0, sequence_ids=0, positions=0, impl="cuda")
    assert got.token.shape == (0,)


# Of the undefined-behaviour checks those that pointers fail are left out, as they multiply the time
# to compile; the address sanitizer watches every load. The thread sanitizer sees what no barrier
# orders, whether or not it went wrong; it is slow, so it sees every 19th case.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
                "-fno-sanitize=null,object-size,vptr", "-Wno-maybe-uninitialized"],
    "thread": ["-fsanitize=thread"],
}  # fmt: skip


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("sanitizer", "every"), [("address", 3), ("thread", 19)])
def test_sanitizers_find_nothing_in_the_edge_cases(tmp_path, sanitizer, every):
    files = [str(CUDA / name) for name in ("select.cu", "check.cpp")]
    command = [*_native.compiler(), *EMULATED, "-O1", *SANITIZERS[sanitizer], "-x", "c++", *files]
    built = subprocess.run([*command, "-o", "check"], cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and ("asan" in built.stderr or "tsan" in built.stderr):
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    run = [tmp_path / "check", str(every)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer cannot run under this kernel")
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout + done.stderr


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
    missing = {"sm_100a"} if not any(row["target"] == "sm_100a" for row in rows) else set()
    assert made == {row for row in kept if row[-1] not in missing}


def test_the_table_of_resources():
    rows = cuda_resources.read_table()
    assert [line for row in rows for line in cuda_resources.problems(row)] == []
    assert {row["target"] for row in rows} == {"sm_80", "sm_90a", "sm_100a"}
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


# ------------------------------------------------------------------------------- with a GPU


def gpu_pairs():
    for rows, V in ((1, 50257), (3, 151936), (64, 32001), (700, 4097)):
        for dtype in (F32, F16, BF16):
            yield logits(rows, V, dtype, seed=V, **MIXED)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
class TestGpu:
    @pytest.mark.parametrize("metric", ["jsd", "kl", "rank"])
    def test_against_the_reference_and_triton(self, metric):
        for teacher, student in gpu_pairs():
            got = check(teacher, student, metric=metric)
            threshold = torch.where(got.from_teacher, -1.0, INF)  # the same writers
            options = where(len(teacher)) | {"metric": metric}
            other = switch_select(teacher, student, threshold, impl="triton", **options)
            assert torch.equal(got.token, other.token)
            for one, two in zip(got[2:], other[2:], strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("how", [{"cluster": n} for n in (1, 2, 4, 8)]
                             + [{"splits": n} for n in (1, 2, 7)])  # fmt: skip
    def test_every_split(self, how, monkeypatch):
        capability = torch.cuda.get_device_capability()
        if "cluster" in how and capability < (9, 0):
            pytest.skip("no clusters")
        monkeypatch.setitem(kernel._LAUNCH, "cuda", partial(_cuda.switch_select, **how))
        for V in (7, 4096, 16001):
            for dtype in (F32, BF16):
                check(*logits(5, V, dtype, **MIXED), teacher_temperature=0.7)

    def test_in_a_graph(self):
        teacher, student = logits(8, 50257, BF16)
        options = where(8) | {"impl": "cuda"}
        want = switch_select(teacher, student, 0.1, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = switch_select(teacher, student, 0.1, **options)
        for value in got:
            value.zero_()
        graph.replay()
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


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
