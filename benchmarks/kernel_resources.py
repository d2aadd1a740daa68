"""`python benchmarks/kernel_resources.py`: what every Triton kernel costs, compiled without a GPU.

The public functions are called with Triton's launch replaced by a recorder; Triton's own rules then
specialise each launch for each target, so what is compiled is what a GPU would get. The result is
results/kernel_resources.csv. `--check` compiles again and fails if one does not compile, spills or
loads logits in less than 16 bytes, or if the ops no longer launch the kernels of the table.

spill_bytes  of a thread: stack or local memory (NVIDIA), spilled vector registers or scratch memory
             (AMD, whose scalar registers spill into lanes of vector registers, not into memory)
load_bits    the narrowest load that no turn of an innermost loop avoids: these loops read logits,
             and the end of a row by loads of its own; without a loop the widest load
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import triton
from rich.console import Console
from rich.table import Table
from switchkd_kernels import _backend as backend
from switchkd_kernels import divergence_loss, linear_divergence_loss, sample, switch_select
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.errors import TritonError
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.machine_code import (
    disassemble,
    load_bits,
    parse_amdgcn,
    parse_sass,
    parse_usage,
)
from benchmarks.timing import write_csv

TABLE = Path(__file__).parent / "results" / "kernel_resources.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KEY = ("op", "kernel", "variant", "dtype", "target")
RESOURCES = ("warps", "registers", "shared_bytes", "spill_bytes", "load_bits", "instructions")

# ------------------------------------------------------------------------------- calls

ALIGNED, UNALIGNED = 151_936, 50_257  # rows that all begin at a multiple of 16 bytes, or do not
ROWS, WIDTH = 8, 16
EACH = torch.arange(ROWS)
PROCESSORS = 1, 132  # one leaves every row whole, with more of them few rows are split
_NOISE = dict(seed=1_234_567, sequence_ids=EACH, positions=EACH)


def _logits(dtype, vocab):
    return torch.zeros(ROWS, vocab, dtype=dtype)


def _switch_select(dtype, vocab, known=(), **settings):
    pair = _logits(dtype, vocab), _logits(dtype, vocab)
    settings |= _NOISE | {name: EACH for name in known}
    switch_select(*pair, 0.5, impl="triton", **settings)


def _sample(dtype, vocab, **settings):
    sample(_logits(dtype, vocab), impl="triton", **settings, **_NOISE)


def _divergence_loss(dtype, vocab, masked=False, **settings):
    pair = _logits(dtype, vocab), _logits(dtype, vocab).requires_grad_()
    mask = torch.ones(ROWS, dtype=torch.bool) if masked else None
    divergence_loss(*pair, mask=mask, impl="triton", **settings).backward()


def _linear_divergence_loss(dtype, vocab, bias=False, learns=True, alone=False, **settings):
    hidden = torch.zeros(ROWS, WIDTH, dtype=dtype, requires_grad=learns)
    weight = torch.zeros(vocab, WIDTH, dtype=dtype)
    teacher = (None, None) if alone else (hidden, weight)
    if "ce_weight" in settings:
        settings["labels"] = EACH
    if bias:
        settings |= {name: weight[:, 0].clone() for name in ("teacher_bias", "student_bias")}
    linear_divergence_loss(*teacher, hidden, weight, impl="triton", **settings)


# How an op is called, and with what. The first two settings make its main variants, which reach
# most of its code; the first is run in every dtype.
_GREEDY = dict(teacher_temperature=0.0, student_temperature=0.0)
_DRAWS = dict(), dict(known=("student_token",)), _GREEDY
_KINDS = (
    dict(kind="skew_reverse_kl"),
    dict(kind="skew_reverse_kl", detach_mixture=True),
    *(dict(kind=kind) for kind in ("skew_kl", "kl_teacher_student", "kl_student_teacher", "tvd")),
    dict(kind="generalized_jsd"),  # at its beta of 1/2 also the kernel of `jsd`
    dict(kind="generalized_jsd", beta=0.3),
)
_TOP_K, _TOP_P, _MIN_P = dict(top_k=50), dict(top_p=0.9), dict(min_p=0.05)
_CAP = dict(logit_scale=0.5, softcap=30.0)
CALLS = {
    "switch_select": (
        _switch_select,
        *(dict(metric=metric) | draw for draw in _DRAWS for metric in ("jsd", "rank", "kl")),
        dict(base="e"),
        dict(known=("teacher_token", "student_token")),
    ),
    "sample": (
        _sample,
        *(_TOP_K | _TOP_P | _MIN_P, _TOP_K, _TOP_P, _MIN_P, dict(), dict(temperature=0.0)),
    ),
    "divergence_loss": (_divergence_loss, _KINDS[0], dict(masked=True), *_KINDS[1:]),
    "linear_divergence_loss": (
        _linear_divergence_loss,
        *(_KINDS[0], _CAP | dict(ce_weight=0.5, bias=True), *_KINDS[1:]),
        *(dict(learns=False), dict(bias=True), _CAP, dict(ce_weight=0.5)),
        dict(kind="cross_entropy", ce_weight=1.0, alone=True),
    ),
}
_MAIN = torch.bfloat16, ALIGNED
_OTHERS = [(torch.float16, ALIGNED), (torch.float32, ALIGNED)]
_OTHERS += [(torch.bfloat16, UNALIGNED), (torch.float32, UNALIGNED)]

# ------------------------------------------------------------------------------- launches


@contextlib.contextmanager
def recording(target: GPUTarget, processors: int):
    """Yields a list where launches (kernel, args, kwargs) go instead of to a device, as they are on
    such a target: launchers look at torch.version.hip."""
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.version, "hip", "7" if target.backend == "hip" else None),
        mock.patch.object(backend, "triton_refuses", lambda *_: None),
        mock.patch.object(backend, "multiprocessors", lambda _: processors),
    ):
        yield launches


def specialise(kernel, args, kwargs, target: GPUTarget) -> tuple[ASTSource, dict]:
    """What Triton compiles for a launch: types, constants and alignments by its own rules."""
    compiler = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    options, *source = kernel._pack_args(compiler, kwargs, *bind(*args, **kwargs))
    return ASTSource(kernel, *source), options.__dict__


def describe(source: ASTSource) -> str:
    """The constexprs of a kernel, but for those that are off and the stream of the noise."""
    shown = []
    for (place, *_), value in source.constants.items():
        param = source.fn.params[place]
        off = value is None or value is False  # not 0, which is a choice like any other
        if param.is_constexpr and not off and "STREAM" not in param.name:
            shown.append(param.name.lower() + ("" if value is True else f"={value}"))
    return " ".join(shown)


class Variant(NamedTuple):
    key: tuple[str, ...]
    source: ASTSource
    options: dict
    aligned: bool
    main: bool


def variants(names, targets) -> list[Variant]:
    """What the ops launch, in the order of the calls. Launches that differ only in what the text of
    a variant leaves out, such as a stride, count once."""
    found: dict[tuple, Variant] = {}
    for op in names:
        call, *settings = CALLS[op]
        cases = [(*_MAIN, some) for some in settings] + [(*case, settings[0]) for case in _OTHERS]
        for dtype, vocab, some in cases:
            main = (dtype, vocab) == _MAIN and some in settings[:2]
            for target, processors in itertools.product(targets, PROCESSORS):
                with recording(TARGETS[target], processors) as launches:
                    call(dtype, vocab, **some)
                for launch in launches:
                    source, options = specialise(*launch, TARGETS[target])
                    kernel = source.fn.__name__.strip("_")
                    types = (kind for kind in source.signature.values() if kind[0] == "*")
                    logits = next(types)[1:]  # the first pointer
                    key = op, kernel, f"{describe(source)} V={vocab}", logits, target
                    found.setdefault(key, Variant(key, source, options, vocab == ALIGNED, main))
    return list(found.values())


def resources(variant: Variant) -> dict:
    """A row of the table: compiles a kernel and reads its machine code. Or {"error": why not}."""
    target = TARGETS[variant.key[-1]]
    try:
        compiled = triton.compile(variant.source, target=target, options=variant.options)
    except TritonError as error:
        return {"error": str(error).strip().splitlines()[-1]}
    if target.backend == "cuda":
        text = disassemble(compiled.asm["cubin"])
        code = parse_sass(text)
    else:
        text = compiled.asm["amdgcn"]
        code = parse_amdgcn(text)
    registers, spilled = parse_usage(text)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    measured = warps, registers, shared, spilled, load_bits(code), len(code)
    row = *variant.key, *measured, triton.__version__
    return dict(zip((*KEY, *RESOURCES, "triton"), row, strict=True))


# ------------------------------------------------------------------------------- table


def problems(variant: Variant, row: dict) -> list[str]:
    """What `--check` does not accept."""
    name, found = " ".join(variant.key), []
    if "error" in row:
        return [f"{name}: does not compile: {row['error']}"]
    if row["spill_bytes"] > 0:
        found.append(f"{name}: {row['spill_bytes']} bytes spilled")
    if variant.aligned and row["load_bits"] < 128:
        found.append(f"{name}: loads of {row['load_bits']} bits")
    return found


def read_table(path: Path) -> dict[tuple, dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {tuple(row[name] for name in KEY): row for row in csv.DictReader(lines)}


def show(rows) -> None:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"]), []).append(row)
    table = Table(title=f"Least and most of all variants, Triton {triton.__version__}", box=None)
    for column in ("kernel", "target", "rows", "regs", "shared", "spill", "load", "instr."):
        table.add_column(column, justify="left" if column in ("kernel", "target") else "right")
    for (kernel, target), group in groups.items():
        spans = []
        for name in RESOURCES[1:]:
            low, high = min(row[name] for row in group), max(row[name] for row in group)
            spans.append(str(low) if low == high else f"{low}-{high}")
        table.add_row(kernel.removesuffix("_kernel"), target, str(len(group)), *spans)
    Console().print(table)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    parser.add_argument("--quick", action="store_true", help="--check, compiling main ones alone")
    parser.add_argument("--op", choices=CALLS, nargs="+", default=list(CALLS))
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args(argv)
    if backend.interpreting():
        parser.error("with TRITON_INTERPRET set nothing is compiled")
    args.check |= args.quick

    start = time.perf_counter()
    launched = variants(args.op, args.target)
    compiled = [variant for variant in launched if variant.main or not args.quick]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(resources, compiled))
    found = [what for pair in zip(compiled, results, strict=True) for what in problems(*pair)]
    rows = {v.key: r for v, r in zip(compiled, results, strict=True) if "error" not in r}
    show(rows.values())
    print(f"{len(rows)} of {len(launched)} kernels in {time.perf_counter() - start:.0f} s")
    table = read_table(args.table)
    old = {key for key in table if key[0] in args.op and key[-1] in args.target}
    if args.check:
        new = {variant.key for variant in launched}
        found += [f"not in the table: {' '.join(key)}" for key in sorted(new - old)]
        found += [f"in the table, not launched: {' '.join(key)}" for key in sorted(old - new)]
        for key, row in rows.items():
            before = table.get(key, row)["registers"]
            if int(before) != row["registers"]:
                print(f"{' '.join(key)}: {before} -> {row['registers']} registers")
    else:
        rows |= {key: table[key] for key in table.keys() - old}
        columns = (*KEY, *RESOURCES, "triton")
        write_csv(args.table, columns, (row for _, row in sorted(rows.items())))
    print(*found, sep="\n")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
