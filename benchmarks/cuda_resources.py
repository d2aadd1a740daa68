"""`python benchmarks/cuda_resources.py`: what the kernels of csrc/cuda cost; needs no GPU.

nvcc compiles them for every target, warnings being errors, and their machine code is read. The
result is results/cuda_resources.csv. `--check` compiles again and fails if one does not compile,
keeps anything in local memory, copies logits in less than 16 bytes, or has left the table.

spill_bytes   of a thread: spilled registers and what else of its stack is in local memory
bulk_copies   instructions that make the copy engine fill shared memory (UBLKCP)
copy_bits     the narrowest of the other copies from global to shared memory (LDGSTS); 0: none
load_bits     the widest load of logits from shared memory (LDS) in the sweeps
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from switchkd_kernels import _native

TABLE = Path(__file__).parent / "results" / "cuda_resources.csv"
KEY = ("kernel", "teacher", "student", "target")
RESOURCES = ("threads", "registers", "spill_bytes", "instructions", "bulk_copies", "copy_bits")
RESOURCES += ("load_bits",)
WARNINGS = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]
DTYPES = {-1: "any", 0: "fp32", 1: "bf16", 2: "fp16"}  # Dtype of plan.h, and ANY
THREADS = 512


def disassembler() -> str:
    """cuobjdump on the path, or Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def compile_for(target: str, folder: Path) -> tuple[str, str]:
    """What ptxas says of the kernels, and their machine code as text."""
    cubin = folder / f"{target}.cubin"
    command = [*_native.nvcc(), *_native.CUDA_FLAGS, *WARNINGS, "-cubin"]
    command += [_native.gencode(target), str(_native.csrc() / "cuda" / "select.cu")]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sm_{target}: {done.stderr.strip()}")
    return done.stderr, _native.run([disassembler(), "--dump-sass", str(cubin)])


def name_of(symbol: str) -> tuple[str, str, str]:
    """(kernel, teacher's dtype, student's dtype) of a mangled name."""
    found = re.search(r"(resident|streaming)ILi(n?\d)ELi(n?\d)E", symbol)
    if found is None:
        raise ValueError(f"not a kernel of select.cu: {symbol}")
    kernel, *dtypes = found.groups()
    return kernel, *(DTYPES[int(one.replace("n", "-"))] for one in dtypes)


def parse_usage(text: str) -> dict[tuple[str, str, str], dict[str, int]]:
    """Registers and spilled bytes from `-Xptxas=-v`."""
    found = {}
    for part in text.split("Compiling entry function ")[1:]:
        name = name_of(part.split("'")[1])
        numbers = (int(x) for x in re.findall(r"(\d+) bytes (?:stack|spill)", part)[:3])
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[name] = {"registers": registers, "spill_bytes": max(numbers)}
    return found


def parse_code(text: str) -> dict[tuple[str, str, str], dict[str, int]]:
    """Instructions of each kernel and how it moves logits, from the disassembly."""
    found = {}
    for part in re.split(r"\n\s+Function : ", text)[1:]:
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", part, re.M)
        code = [opcode.split(".") for opcode in code if not opcode.startswith("NOP")]

        def bits(name, code=code):
            widths = [[int(x) for x in words[1:] if x.isdigit()] for words in code
                      if words[0] == name]  # fmt: skip
            return [max(each, default=32) for each in widths]

        found[name_of(part.split()[0])] = {
            "instructions": len(code),
            "bulk_copies": sum(words[0] == "UBLKCP" for words in code),
            "copy_bits": min(bits("LDGSTS"), default=0),
            "load_bits": max(bits("LDS"), default=0),
        }
    return found


def measure() -> list[dict]:
    """A row of the table for each kernel and target. No cluster on sm_80, so no kernel for one."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for target in _native.cuda_targets():
            said, code = compile_for(target, Path(folder))
            usage, code = parse_usage(said), parse_code(code)
            for name in sorted(usage):
                if name[0] == "resident" and target == "80":
                    continue
                row = dict(zip(KEY, (*name, f"sm_{target}"), strict=True))
                rows.append(row | {"threads": THREADS} | usage[name] | code[name])
    return rows


def problems(row: dict) -> list[str]:
    """What must not be: local memory, narrow copies, rows that are not copied in bulk."""
    found, name = [], " ".join(row[column] for column in KEY)
    if row["spill_bytes"]:
        found.append(f"{name}: {row['spill_bytes']} bytes in local memory")
    if row["kernel"] == "streaming" and row["copy_bits"] != 128:
        found.append(f"{name}: copies of {row['copy_bits']} bits")
    if row["kernel"] == "resident" and not row["bulk_copies"]:
        found.append(f"{name}: no bulk copies")
    if row["registers"] * row["threads"] * 2 > 65536:
        found.append(f"{name}: {row['registers']} registers, so one block to a processor")
    return found


def read_table() -> list[dict]:
    with TABLE.open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: v if k in KEY else int(v) for k, v in row.items() if k != "nvcc"}
                for row in rows]  # fmt: skip


def version() -> str:
    return re.search(r"V([\d.]+)", _native.run([*_native.nvcc(), "--version"]))[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    args = parser.parse_args(argv)
    rows = measure()
    table = Table(*KEY, *RESOURCES)
    for row in rows:
        table.add_row(*(str(row[column]) for column in (*KEY, *RESOURCES)))
    Console().print(table)
    wrong = [line for row in rows for line in problems(row)]
    if args.check:
        kept = {tuple(row[column] for column in KEY) for row in read_table()}
        made = {tuple(row[column] for column in KEY) for row in rows}
        wrong += [f"{' '.join(key)}: not in both the table and the code" for key in kept ^ made]
    else:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*KEY, *RESOURCES, "nvcc"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"nvcc": version()} for row in rows)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
