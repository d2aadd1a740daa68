"""How the benchmarks measure: repeated runs on a cold cache, memory, ceilings, rows and files.

A time is the median of single runs, with the 20th and 80th percentile beside it. On a GPU events on
the stream bracket each run, and before it a buffer larger than the second-level cache is *read*:
one that is written would leave dirty lines, which the run then pays to write back. Launches overlap
that read, so a time is that of the device unless an op takes longer to launch than the read lasts.
On a CPU, which others may use, too, implementations take turns, so that each meets the same load,
and ratios are those of the 20th percentiles, which the load moves least. Where that is not enough a
time can be that of the process on all its threads, over their number: what threads that are always
busy would take. Threads must then not spin while they wait (OMP_WAIT_POLICY=PASSIVE).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.devices import find_device, processor_name


@dataclass
class Row:
    """One measurement; None where a column has no meaning, and as time where memory ran out."""

    op: str
    impl: str
    mode: str
    rows: int
    vocab: int
    dtype: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gbps: float | None = None
    ceiling_share: float | None = None
    peak_mb: float | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_compile: float | None = None
    device: str = ""


def write_json(path: str, rows: list[dict]) -> None:
    Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write_csv(path: str | Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_device(name: str | None) -> torch.device:
    """The device of that name, made the current one; by default a GPU if there is one."""
    device = find_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> str:
    """Device, versions and commit: what a row must name to be compared with another."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} threads"
    try:
        from triton import __version__ as triton
    except Exception:  # also a broken installation
        triton = "none"
    return f"{name}, torch {torch.__version__}, triton {triton}, {commit()}"


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown commit"


class Times(NamedTuple):
    """Milliseconds."""

    p20: float
    median: float
    p80: float


class Timer:
    """Measures single runs on one device, each after `prepare`, whose time is not counted."""

    def __init__(self, device: torch.device, process_time: bool = False):
        self.device = device
        self.clock = time.perf_counter
        if process_time:
            self.clock = lambda: time.process_time() / torch.get_num_threads()
        self.seconds = 0.1 if device.type == "cuda" else 0.04  # of timed runs
        self.scrub = None
        if device.type == "cuda":
            # Three times the cache would be read in 42 us on an H200, and the host needs 90 to
            # launch switch_select: it would be timed. 1 GiB takes 250.
            gpu = torch.cuda.get_device_properties(device)
            cache = getattr(gpu, "L2_cache_size", 0) or 64 * 2**20
            size = max(3 * cache, min(2**30, gpu.total_memory // 16))
            self.scrub = torch.zeros(size // 4, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(
        self,
        run: Callable,
        prepare: Callable[[int], tuple] = lambda _: (),
    ) -> Times:
        """Times of run(*prepare(i)), i = 0, 1, ...: 3 to 200 runs, about `seconds` of them."""
        warm_up = [self._once(run, prepare(i)) for i in range(2)]
        last = self._milliseconds(warm_up)[-1]
        count = max(3, min(200, int(1e3 * self.seconds / max(last, 1e-3))))
        return self._times([self._once(run, prepare(i)) for i in range(count)])

    def in_turns(self, tasks: Sequence[tuple[Callable, Callable]], seconds: float) -> list[Times]:
        """Times of several (run, prepare), in rounds of some runs of each, at least 5 rounds."""
        for _ in range(2):
            warm_up = [self._once(run, prepare(i)) for i, (run, prepare) in enumerate(tasks)]
        last = self._milliseconds(warm_up)
        runs = [max(1, min(10, int(20 / max(one, 1e-3)))) for one in last]
        round_ms = sum(one * count for one, count in zip(last, runs, strict=True))
        marks: list[list[tuple]] = [[] for _ in tasks]
        for _ in range(max(5, min(50, int(1e3 * seconds / round_ms)))):
            for (run, prepare), count, mine in zip(tasks, runs, marks, strict=True):
                mine += [self._once(run, prepare(len(mine) + i)) for i in range(count)]
        return [self._times(one) for one in marks]

    def _times(self, marks: list[tuple]) -> Times:
        deciles = statistics.quantiles(self._milliseconds(marks), n=10, method="inclusive")
        return Times(deciles[1], deciles[4], deciles[7])

    def _once(self, run: Callable, args: tuple) -> tuple:
        """Beginning and end of a run; nothing that it returns stays alive."""
        if self.scrub is None:
            start = self.clock()
            run(*args)
            return start, self.clock()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scrub.amax()
        start.record()
        run(*args)
        end.record()
        return start, end

    def _milliseconds(self, marks: list[tuple]) -> list[float]:
        self.synchronize()
        if self.scrub is None:
            return [1e3 * (end - start) for start, end in marks]
        return [start.elapsed_time(end) for start, end in marks]

    def peak_mb(self, run: Callable, prepare: Callable[[int], tuple]) -> float | None:
        """Memory above what was there before `prepare`: of a GPU what its allocator gave away, of a
        CPU the process's resident pages, as Linux counts them; None where no one does."""
        if self.device.type != "cuda":
            return _resident_peak_mb(lambda: run(*prepare(0)))
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run(*prepare(0))
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def _resident_peak_mb(run: Callable[[], object]) -> float | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would be used unseen
        forget_resident_peak()
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before) / 2**20


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since the last call of
    `forget_resident_peak`. OSError where there is no /proc."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def captured(run: Callable, args: tuple) -> Callable[[], None]:
    """The replay of a CUDA graph of run(*args), captured after runs on a side stream."""
    device = args[0].device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # also restores the stream where a capture fails
        for _ in range(3):
            run(*args)
        with torch.cuda.graph(graph, stream=side):
            run(*args)
    torch.cuda.current_stream(device).wait_stream(side)
    return graph.replay


def copy_ceiling(timer: Timer, device_name: str) -> Row:
    """Bandwidth of a large copy: `vocab` bytes read and as many written."""
    size = (2**30 if timer.device.type == "cuda" else 2**26) // 4
    source = torch.zeros(size, device=timer.device)
    target = torch.empty_like(source)
    times = timer(target.copy_, lambda _: (source,))
    gbps = 2 * source.nbytes / times.median / 1e6
    return Row(
        "ceiling", "copy", "copy", 1, source.nbytes, "float32", times.median, times.p20, times.p80,
        gbps, ceiling_share=1.0, device=device_name,
    )  # fmt: skip


def copier(teacher: Tensor, student: Tensor) -> Callable:
    """A copy of both logits into tensors that are there: as much read, as much written."""
    targets = torch.empty_like(teacher), torch.empty_like(student)

    def run(*pair: Tensor) -> None:
        for target, logits in zip(targets, pair, strict=False):
            target.copy_(logits)

    return run


def gemm_ceiling(timer: Timer, dtype: torch.dtype, device_name: str) -> Row:
    """Time of one (n, n) by (n, n) product, 2 n^3 operations."""
    n = 8192 if timer.device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=timer.device).to(dtype) for _ in range(2))
    times = timer(torch.mm, lambda _: (a, b))
    return Row(
        "ceiling", "gemm", f"gemm k={n}", n, n, dtype_name(dtype), times.median, times.p20,
        times.p80, ceiling_share=1.0, device=device_name,
    )  # fmt: skip


def gemms(hidden_t: Tensor, weight_t: Tensor, hidden_s: Tensor, weight_s: Tensor) -> tuple:
    """The four products that no loss of two heads can do without, 2 N V (Ht + 3 Hs) operations:
    both logits, and the student's gradients (of logits as large as the gradient would be)."""
    teacher = hidden_t @ weight_t.t()
    student = hidden_s @ weight_s.t()
    return teacher, student @ weight_s, student.t() @ hidden_s


def flat(value):
    """A cell: four digits of a number, `name value` pairs of a dictionary."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(v)}" for name, v in value.items())
    return value


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """To the files of --json and --csv, where given."""
    if args.json:
        write_json(args.json, rows)
    if args.csv:
        cells = ({name: flat(value) for name, value in row.items()} for row in rows)
        write_csv(args.csv, rows[0], cells)
