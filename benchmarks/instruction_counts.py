"""`python benchmarks/instruction_counts.py`: instructions a pair of logits, compiled without a GPU.

Every sweep of a kernel over its rows is a loop of the machine code. Counted is its shortest turn: a
whole block of logits, no end of a row, no noise evaluated. A kernel without a loop is counted
whole. Where tokens are drawn, a further sweep for each follows the first, which one row of a
hundred needs. The result is results/instruction_counts.csv, per pair of logits of the two rows (in
`sample` per logit), by the unit that executes:

fma     float32 multiply, add, fused; integer multiply-add
alu     integer, logic, compare, minimum, select, move, conversion
mufu    e^x, log, reciprocal square root: the special function unit
memory  loads, stores, shuffles

`cycles` is the least that a scheduler (four on a multiprocessor) needs for a warp's pairs, from the
throughputs of compute capability 9.0 in NVIDIA's CUDA C++ Programming Guide, "Arithmetic
Instructions": one instruction a cycle, two cycles each for alu and integer multiplies, eight for
mufu.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import triton
from rich.console import Console
from rich.table import Table
from switchkd_kernels import _backend as backend

from benchmarks import kernel_resources as kr
from benchmarks.machine_code import (
    Instruction,
    disassemble,
    flow_of,
    innermost_loops,
    parse_sass,
    shortest_turn,
)
from benchmarks.timing import write_csv

TABLE = Path(__file__).parent / "results" / "instruction_counts.csv"
NVIDIA = [name for name, target in kr.TARGETS.items() if target.backend == "cuda"]
UNITS = ("fma", "alu", "mufu", "memory", "other")
COUNTS = ("instructions", *UNITS, "cycles")
COLUMNS = ("op", "kernel", "variant", "target", "sweep", "pairs_a_turn", *COUNTS)
_UNIT_OF = {
    "fma": "FFMA FMUL FADD IMAD HFMA2 HMUL2 HADD2 FFMA32I FADD32I FMUL32I",
    "alu": "LOP3 SHF IADD3 IADD VIADD VIADDMNMX ISETP FSETP FMNMX FMNMX3 VIMNMX VIMNMX3 SEL "
    "FSEL PRMT LEA I2FP F2FP MOV PLOP3 P2R R2P IABS CS2R FCHK",
    "mufu": "MUFU POPC FLO BREV F2F I2F F2I",
    "memory": "LDG LDGSTS STG LDS STS LDL STL LDC SHFL ATOMG REDUX S2R LDSM STSM",
}
UNIT_OF = {name: unit for unit, names in _UNIT_OF.items() for name in names.split()}


def name_of(instruction: Instruction) -> str:
    return instruction.opcode.partition(".")[0]


def sweeps(code: list[Instruction]) -> list[list[Instruction]]:
    """What one turn of each sweep executes, in the order of the code; all of it without a loop."""
    flow = flow_of(code)
    loops = sorted(innermost_loops(code, flow), key=min)
    return [[code[n] for n in shortest_turn(flow, loop)] for loop in loops] or [code]


def counts(turn: list[Instruction], pairs: int) -> dict[str, float]:
    """Instructions and cycles per pair of logits."""
    units = Counter(UNIT_OF.get(name_of(instruction), "other") for instruction in turn)
    slow = sum(name_of(instruction) == "IMAD" for instruction in turn)
    cycles = max(len(turn), 2 * units["alu"], 2 * slow, 8 * units["mufu"])
    values = len(turn), *(units[unit] for unit in UNITS), cycles
    return {name: round(value / pairs, 2) for name, value in zip(COUNTS, values, strict=True)}


def measure(variant: kr.Variant) -> list[dict]:
    """The rows of the table for a kernel."""
    target = kr.TARGETS[variant.key[-1]]
    compiled = triton.compile(variant.source, target=target, options=variant.options)
    block = next(
        value
        for (place, *_), value in variant.source.constants.items()
        if variant.source.fn.params[place].name == "BLOCK"
    )
    pairs = block // (32 * compiled.metadata.num_warps)
    op, kernel, text, _dtype, name = variant.key
    rows = []
    for place, turn in enumerate(sweeps(parse_sass(disassemble(compiled.asm["cubin"]))), 1):
        values = op, kernel, text, name, place, pairs
        rows.append(dict(zip(COLUMNS, values, strict=False)) | counts(turn, pairs))
    return rows


def measured(ops, targets, words=(), jobs=2) -> list[dict]:
    """Rows of the variants in bfloat16 that have all of `words` in their text."""
    found = [
        variant
        for variant in kr.variants(ops, targets)
        if variant.key[3] == "bf16"
        if all(word in variant.key[2].split() for word in words)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(measure, found) for row in rows]


def show(rows: list[dict]) -> None:
    table = Table(title="Per pair of logits", box=None)
    for column in ("kernel", "variant", "sweep", *COUNTS):
        table.add_column(column, justify="left" if column in ("kernel", "variant") else "right")
    for row in rows:
        cells = (str(row[name]) for name in ("variant", "sweep", *COUNTS))
        table.add_row(row["kernel"].removesuffix("_kernel"), *cells)
    Console(width=max(Console().width, 140)).print(table)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=kr.CALLS, nargs="+", default=list(kr.CALLS))
    parser.add_argument("--target", choices=NVIDIA, nargs="+", default=["sm_90"])
    parser.add_argument("--only", nargs="+", default=(), help="words of a variant, as metric=jsd")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    if backend.interpreting():
        parser.error("with TRITON_INTERPRET set nothing is compiled")
    rows = measured(args.op, args.target, args.only, args.jobs)
    show(rows)
    if args.table or (args.op == list(kr.CALLS) and args.target == ["sm_90"] and not args.only):
        write_csv(args.table or TABLE, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
