"""The CUDA kernels of switch_select: their source runs here, a fibre for each thread of a cluster.

csrc/cuda/emulated.h stands in for the GPU, with 64 threads in a block. Where there is a GPU, the
tests with the marker `gpu` run the kernels themselves.
"""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import DEVICE, MIXED, check_close, logits, poisoned
from switchkd_kernels import _cuda, _native, reference, switch_select

kernel = sys.modules["switchkd_kernels.switch_select"]  # the package's attribute is the function
CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
INF, NAN = math.inf, math.nan
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EMULATED = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSWITCHKD_EMULATED"]
EMULATED += ["-DSWITCHKD_THREADS=64"]
TILE = 512  # tokens, of 64 threads
needs_compiler = pytest.mark.skipif(
    _native.unavailable() is not None, reason="no compiler, or no native library"
)


# ------------------------------------------------------------------------------- emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Registers the op for tensors on the CPU."""
    if DEVICE != "cpu":
        pytest.skip("there is a GPU")
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
