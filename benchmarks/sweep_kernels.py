"""`python benchmarks/sweep_kernels.py`: the launch parameters of the Triton kernels, on a GPU.

They are constants of the kernels' modules (BLOCK, WARPS, ...). Per shape each is varied in turn, a
block and its warps together, the others at the best found so far, twice round, starting from the
values in the source. A point counts only if its results pass the gate of benchmarks/kernels.py.
Draws of few rows are timed as the replay of a CUDA graph, so that no launch is part of it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_cases import DRAWS, Case, differs, expected, inputs, leaves, ours
from benchmarks.kernels import FEW_ROWS
from benchmarks.timing import (
    Timer,
    Times,
    captured,
    describe,
    dtype_name,
    open_device,
    write_csv,
)

OPS = ("switch_select", "sample", "divergence_loss")
CANDIDATES = {  # by the end of a constant's name
    "BLOCK": (1024, 2048, 4096, 8192),
    "WARPS": (4, 8, 16),
    "REGISTERS": (64, 96, 128, 168, 255),
    "PROGRAMS_PER_PROCESSOR": (1, 2, 4, 8, 16),
}
COLUMNS = (
    "op", "rows", "vocab", "dtype", "parameters", "median_ms", "p20_ms", "p80_ms", "error", "device"
)  # fmt: skip
SETS = 3


def launch_constants(module: ModuleType) -> dict[str, tuple[int, ...]]:
    """The module's launch parameters and what to try for each."""
    return {
        name: values
        for name, value in vars(module).items()
        for suffix, values in CANDIDATES.items()
        if name.isupper() and type(value) is int
        and (name == suffix or name.endswith("_" + suffix))
    }  # fmt: skip


def descend(grid: dict, start: dict, measure: Callable[[dict], float]) -> dict:
    """The best point found by varying one name after another, twice round; a block and its warps
    are one, because what matters is how many entries a thread holds."""
    best, seen, groups = start, {}, {}
    for name in grid:
        groups.setdefault(re.sub("(BLOCK|WARPS)$", "TILE", name), []).append(name)

    def cost(point: dict) -> float:
        key = tuple(point.items())
        if key not in seen:
            seen[key] = measure(point)
        return seen[key]

    for _ in range(2):
        for names in groups.values():
            values = itertools.product(*(grid[name] for name in names))
            tried = [best, *({**best, **dict(zip(names, one, strict=True))} for one in values)]
            best = min(tried, key=cost)
    return best


def spell(point: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items())


def sweep(case: Case, timer: Timer, device_name: str) -> tuple[list[dict], dict]:
    """(a row for every point measured, the best point) of a case."""
    module = importlib.import_module(f"switchkd_kernels.{case.op}")
    data = [inputs(case, timer.device, seed) for seed in range(SETS)]
    want, run = expected(case, data[0]), ours(case, "triton")
    rows = []

    def backward(*args):
        return torch.autograd.grad(run(*args), leaves(args))

    def timed() -> Times:
        if case.op not in DRAWS:
            return timer(backward, lambda i: data[i % SETS])
        if case.rows > FEW_ROWS:
            return timer(run, lambda i: data[i % SETS])
        graphs = [captured(run, one) for one in data]
        return timer(lambda replay: replay(), lambda i: (graphs[i % SETS],))

    def measure(point: dict) -> float:
        for name, value in point.items():
            setattr(module, name, value)
        times, problem = Times(*[float("inf")] * 3), None
        try:
            problem = differs(case, "triton", run, data[0], want)
            if problem is None:
                times = timed()
        except Exception as error:  # a point may not fit the device
            problem = str(error).strip().partition("\n")[0]
        values = case.op, case.rows, case.vocab, dtype_name(case.dtype), spell(point)
        shown = [None if problem else time for time in (times.median, times.p20, times.p80)]
        rows.append(dict(zip(COLUMNS, (*values, *shown, problem, device_name), strict=True)))
        return times.median

    grid = launch_constants(module)
    start = {name: getattr(module, name) for name in grid}
    try:
        best = descend(grid, start, measure)
    finally:
        for name, value in start.items():
            setattr(module, name, value)
    return rows, best


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 32 1024, of losses 4096")
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 151936])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--csv", help="write every point to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sweep_kernels needs a GPU: launch parameters mean nothing elsewhere")
        return 2
    console = Console(width=max(Console().width, 110))
    device = open_device(None)
    timer, name = Timer(device), describe(device)
    timer.seconds = 0.05
    console.print(name, highlight=False)
    table = Table("op", "rows x V", "best", "ms", "as it is, ms", title=args.dtype)
    points: list[dict] = []
    for op in args.op:
        for rows in args.rows or ([1, 32, 1024] if op in DRAWS else [4096]):
            for vocab in args.vocab:
                kind = "skew_reverse_kl" if op == "divergence_loss" else ""
                case = Case(op, rows, vocab, getattr(torch, args.dtype), kind)
                found, best = sweep(case, timer, name)
                points += found
                times = {row["parameters"]: row["median_ms"] for row in found}
                shown = times[spell(best)], found[0]["median_ms"]
                cells = ("-" if time is None else f"{time:.4g}" for time in shown)
                table.add_row(op, f"{rows} x {vocab}", spell(best), *cells)
                console.print(f"{op} {rows} x {vocab}: {spell(best)}", highlight=False)
                if args.csv:
                    write_csv(args.csv, COLUMNS, points)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
