"""`python benchmarks/kernels.py`: every op against its baselines, on a GPU or (small) on a CPU.

Before an implementation is timed its results are compared with the float64 reference. If ours
differ, the run stops; a peer that differs is named and left out. Then, per case and implementation:

fwd, bwd, full   forward (of a loss: with its gradient to come), backward, both
... graph        the same as the replay of a CUDA graph, for the few rows of a decoding round
ceiling          the large copy, the large product, the bare products of a head and, on a CPU, the
                 copy of both logits of a case that were measured in the same run;
                 `ceiling_share` is relative to them, the time of a ceiling of the same case by
                 that of the row (1 / 3: three times as long as the copy), else GB/s by GB/s

GB/s counts what an op cannot avoid moving (see `bytes_moved`), so it compares implementations as
times do. torch.compile is measured where the vocabulary is largest, on a CPU everywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_cases import (
    DRAWS,
    IMPLS,
    OPS,
    OURS,
    Case,
    bytes_moved,
    cases,
    differs,
    expected,
    implementations,
    inputs,
    leaves,
)
from benchmarks.timing import (
    Row,
    Timer,
    Times,
    captured,
    copier,
    copy_ceiling,
    describe,
    dtype_name,
    gemm_ceiling,
    gemms,
    open_device,
    write_csv,
    write_json,
)

SETS = 3  # of inputs, used in turn
FEW_ROWS = 256  # up to so many a CUDA graph is measured, too; those of eager code keep gigabytes
CAPTURABLE = ("triton", "eager", "compile")  # wait for nothing on the device


class GateFailed(Exception):
    """One of our own implementations is wrong: there is nothing to time."""


class Bench:
    """Measures cases on one device and keeps the rows."""

    def __init__(
        self, device: torch.device, console: Console, quick: bool, minutes: float,
        process_time: bool = False,
    ):  # fmt: skip
        self.device, self.console, self.quick = device, console, quick
        self.start, self.end = time.perf_counter(), time.perf_counter() + 60 * minutes
        self.timer, self.name = Timer(device, process_time), describe(device)
        if process_time:
            self.name += ", process time over threads"
        self.seconds = 0.2 if quick else 3.0  # a CPU's, for each mode of a case
        self.typical = "p20_ms" if device.type == "cpu" else "median_ms"
        self.rows: list[Row] = []
        self.notes: dict[str, None] = {}  # in order, each once

    def ceilings(self) -> None:
        copy = copy_ceiling(self.timer, self.name)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        gemm = gemm_ceiling(self.timer, dtype, self.name)
        self.rows += [copy, gemm]
        self.copy_gbps = copy.gbps
        self.console.print(
            f"copy {copy.gbps:,.0f} GB/s read and written, {gemm.dtype} products "
            f"{2 * gemm.rows**3 / gemm.median_ms / 1e9:,.1f} TFLOP/s"
        )

    def op(self, op: str) -> None:
        first, left_out = len(self.rows), 0
        for case in cases(op, self.device, self.quick):
            if time.perf_counter() > self.end:
                left_out += 1
                continue
            rows = self.case(case)
            self.rows += rows
            seconds = time.perf_counter() - self.start
            shown = ", ".join(
                f"{row.impl} {milliseconds(self.typical_ms(row))}"
                for row in rows
                if row.op == op and row.mode == case.mode(base_modes(case)[-1])
            )
            self.console.print(
                f"{seconds:4.0f} s  {case.name()}: {shown}", highlight=False, soft_wrap=True
            )
        if left_out:
            self.notes[f"{op}: {left_out} shapes left out, the time is up (--minutes)"] = None
        show(self.rows[first:], op, self.console, self.typical)

    def case(self, case: Case) -> list[Row]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the last shape would not fit
        data = [inputs(case, self.device, seed) for seed in range(SETS)]
        found, absent = implementations(case, self.device, self.quick)
        for name, reason in absent.items():
            self.notes[f"not measured: {name} ({reason})"] = None
        passed, rows = self.gate(case, found, data[0])
        tasks = []
        if case.op == "linear_divergence_loss":
            bare = [tuple(x.detach() for x in one) for one in data]
            tasks.append(("ceiling", "gemms", "full", gemms, lambda i: bare[i % SETS]))
        elif case.op == "switch_select" and self.device.type == "cpu":
            copy = copier(*data[0][:2])
            tasks.append(("ceiling", "copy", "fwd", copy, lambda i: data[i % SETS][:2]))
        for impl, run in passed.items():
            tasks += [(case.op, impl, *one) for one in self.modes(case, impl, run, data)]
        rows += self.measured(case, tasks)
        of = {(row.impl, row.mode): self.typical_ms(row) for row in rows}
        for row in rows:
            if row.op == case.op and (own := self.typical_ms(row)):
                eager, compiled = (of.get((impl, row.mode)) for impl in ("eager", "compile"))
                row.speedup_vs_eager = eager and eager / own
                row.speedup_vs_compile = compiled and compiled / own
        return rows

    def typical_ms(self, row: Row) -> float | None:
        """What ratios compare: see timing.py."""
        return getattr(row, self.typical)

    def measured(self, case: Case, tasks: list[tuple]) -> list[Row]:
        """A row for each (op, impl, mode, run, prepare). A ceiling comes first; on a CPU those of a
        mode take turns."""
        times: dict[int, Times] = {}
        if self.device.type == "cpu":
            for mode in dict.fromkeys(task[2] for task in tasks):
                same = [i for i, task in enumerate(tasks) if task[2] == mode]
                timed = self.timer.in_turns([tasks[i][3:] for i in same], self.seconds)
                times |= zip(same, timed, strict=True)
        rows: list[Row] = []
        for i, task in enumerate(tasks):
            floor = rows[0] if rows and rows[0].op == "ceiling" else None
            rows.append(self.row(case, *task, floor, times.get(i)))
        return rows

    def gate(self, case: Case, found: dict[str, Callable], data) -> tuple[dict, list[Row]]:
        """The implementations that are right, and rows without a time for those out of memory."""
        want = expected(case, data)
        passed, rows = {}, []
        for impl, run in found.items():
            try:
                problem = differs(case, impl, run, data, want)
            except torch.OutOfMemoryError:
                rows += [self.blank(case, case.op, impl, mode) for mode in base_modes(case)]
                continue
            except Exception as error:  # a peer may raise anything
                problem = f"{type(error).__name__}: {first_line(error)}"
            if problem is None:
                passed[impl] = run
            elif impl in OURS:
                raise GateFailed(f"{impl} failed the gate of {case.name()}: {problem}")
            else:
                self.notes[f"failed its gate: {impl}, {case.name()}: {problem}"] = None
        return passed, rows

    def modes(self, case: Case, impl: str, run: Callable, data: list[tuple]):
        """(mode, what is timed, what prepares it) for an implementation."""

        def backward(loss, *to):
            return torch.autograd.grad(loss, to)

        def full(*args):
            return torch.autograd.grad(run(*args), leaves(args))

        def fresh(i: int) -> tuple:
            return data[i % SETS]

        if case.op == "linear_divergence_loss":  # its gradient may come with its value
            return [("full", full, fresh)]
        if case.op not in DRAWS:
            done = lambda i: (run(*fresh(i)), *leaves(fresh(i)))  # noqa: E731
            return [("fwd", run, fresh), ("bwd", backward, done), ("full", full, fresh)]
        found = [("fwd", run, fresh)]
        if self.device.type == "cuda" and case.rows <= FEW_ROWS and impl in CAPTURABLE:
            try:
                graphs = [captured(run, one) for one in data]
            except Exception as error:
                self.notes[f"no CUDA graph of {impl}, {case.op}: {first_line(error)}"] = None
            else:
                found.append(("fwd graph", lambda replay: replay(), lambda i: (graphs[i % SETS],)))
        return found

    def blank(self, case: Case, op: str, impl: str, mode: str) -> Row:
        base, *suffix = mode.split()
        mode = " ".join([case.mode(base), *suffix])
        dtype = dtype_name(case.dtype)
        return Row(op, impl, mode, case.rows, case.vocab, dtype, device=self.name)

    def row(
        self, case: Case, op: str, impl: str, mode: str, run: Callable, prepare: Callable,
        floor: Row | None = None, times: Times | None = None,
    ) -> Row:  # fmt: skip
        """Time, unless it is given, and memory; the share reached of `floor`, else of the copy."""
        row = self.blank(case, op, impl, mode)
        try:
            times = times or self.timer(run, prepare)
            if "graph" not in mode:  # which keeps its memory to itself
                row.peak_mb = self.timer.peak_mb(run, prepare)
        except torch.OutOfMemoryError:
            return row
        row.p20_ms, row.median_ms, row.p80_ms = times
        if moved := bytes_moved(case, mode) * (2 if impl == "copy" else 1):
            row.gbps = moved / self.typical_ms(row) / 1e6
            row.ceiling_share = row.gbps / self.copy_gbps
        if op == "ceiling":
            row.ceiling_share = 1.0
        elif floor is not None and floor.median_ms:
            row.ceiling_share = self.typical_ms(floor) / self.typical_ms(row)
        return row


def base_modes(case: Case) -> list[str]:
    if case.op in DRAWS:
        return ["fwd"]
    return ["full"] if case.op == "linear_divergence_loss" else ["fwd", "bwd", "full"]


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def milliseconds(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:.3g} ms"


def show(rows: list[Row], op: str, console: Console, time: str) -> None:
    """The table of an op. Its second sweep counted, switch_select moves twice as much."""
    table = Table(title=op)
    columns = ["rows x V", "mode", "impl", time.replace("_", " "), "GB/s", "of ceiling", "peak MB"]
    columns += ["vs eager", "vs compile"]
    if op == "switch_select":
        columns.insert(5, "2 sweeps")
    for column in columns:
        left = column in ("mode", "impl")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def place(row: Row) -> tuple:
        base, *kind = row.mode.split()
        impl = ("gemms", "copy", *IMPLS).index(row.impl)
        return row.dtype, row.vocab, row.rows, kind, ("fwd", "bwd", "full").index(base), impl

    for row in sorted(rows, key=place):
        cells = [
            f"{row.rows} x {row.vocab}", row.mode, row.impl,
            cell(getattr(row, time), ".4g"), cell(row.gbps, ",.1f"),
            cell(row.ceiling_share, ".1%"), cell(row.peak_mb, ",.0f"),
            cell(row.speedup_vs_eager, ".2f"), cell(row.speedup_vs_compile, ".2f"),
        ]  # fmt: skip
        if op == "switch_select":
            cells.insert(5, cell(row.gbps and 2 * row.gbps, ",.1f"))
        table.add_row(*cells)
    console.print(table)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help=f"of {', '.join(OPS)}; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one shape an op, no torch.compile")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no shape after so many")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: process time over threads, where others use the CPU, too",
    )  # fmt: skip
    args = parser.parse_args(argv)
    ops = ",".join(args.op).split(",") if args.op else list(OPS)
    for op in ops:
        if op not in OPS:
            parser.error(f"--op must be of {', '.join(OPS)}, got {op!r}")

    try:
        device = open_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.clock == "cpu" and device.type != "cpu":
        parser.error(f"--clock cpu is for a CPU, got device {device}")
    if args.clock == "cpu" and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        parser.error("--clock cpu needs OMP_WAIT_POLICY=PASSIVE, or threads that wait would count")
    console = Console(width=max(Console().width, 120))
    bench = Bench(device, console, args.quick, args.minutes, args.clock == "cpu")
    console.print(bench.name, highlight=False)
    try:
        bench.ceilings()
        for op in ops:
            bench.op(op)
            save(args, bench.rows)  # what is done survives an interruption
    except GateFailed as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    for note in bench.notes:
        console.print(note, highlight=False, markup=False)
    return 0


def save(args: argparse.Namespace, rows: list[Row]) -> None:
    """With all digits of a number."""
    found = [asdict(row) for row in rows]
    if args.json:
        write_json(args.json, found)
    if args.csv:
        write_csv(args.csv, found[0], found)


if __name__ == "__main__":
    sys.exit(main())
