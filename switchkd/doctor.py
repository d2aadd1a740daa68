"""`python -m switchkd.doctor`: what this machine can run, whether it computes right, how fast.

Every op runs here with every backend and is compared with the float64 reference, on rows with -inf,
near-equal rows and a padded vocabulary whose padding is NaN. Exit code 1 if any check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
import switchkd_kernels as kernels
import torch
from rich.console import Console
from rich.table import Table
from switchkd_kernels import _backend as backend
from switchkd_kernels import reference
from torch import Tensor

from switchkd.devices import find_device, processor_name

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "switchkd")
VOCAB, PADDED = 5003, (5056, 5024)  # real tokens; logits of a teacher's and a student's row
SEED = 11


# ------------------------------------------------------------------------------- the machine


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__  # with the name of its build: cpu, cu130
    return found


def devices() -> list[dict]:
    """The CPU and every GPU: name and memory in GiB."""
    memory = psutil.virtual_memory().total / 2**30
    name = f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = [{"device": "cpu", "name": name, "gib": memory}]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gib = properties.total_memory / 2**30
        found.append({"device": f"cuda:{i}", "name": properties.name, "gib": gib})
    return found


def backends(device: torch.device) -> dict[str, str]:
    """How each backend can be used on `device`, or why it cannot, as "no: ..."."""
    probe = torch.empty(0, device=device)
    found = {}
    for impl in backend.IMPLS:
        try:
            backend.choose(impl, probe, cuda=True)
        except RuntimeError as error:
            found[impl] = f"no: {str(error).partition(': ')[2]}"
        else:
            slow = impl == "triton" and backend.interpreting()
            found[impl] = "interpreter: right and slow" if slow else "yes"
    return found


# ------------------------------------------------------------------------------- checks


@dataclass
class Check:
    """One op on one backend against the float64 reference."""

    op: str
    backend: str
    dtype: str
    max_error: float | None = None  # relative; NaN where a result is
    tokens_equal: bool | None = None
    ok: bool = False
    error: str | None = None  # an exception


def make_logits(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """6 rows: 2 random, 2 with -inf in both models, 2 near-equal (JSD about 1e-7 bits)."""
    generator = torch.Generator().manual_seed(SEED)
    teacher, student = (2 * torch.randn(6, VOCAB, generator=generator) for _ in range(2))
    teacher[2:4, ::7], student[2:4, ::7] = -torch.inf, -torch.inf
    step = 1e-3 * (0.5 + torch.rand(2, VOCAB, generator=generator))
    student[4:] = teacher[4:] + torch.where(student[4:] > 0, step, -step)
    rows = []
    for logits, width in zip((teacher, student), PADDED, strict=True):
        padding = torch.full((len(logits), width - VOCAB), torch.nan)
        rows.append(torch.cat([logits, padding], 1).to(device, dtype))
    return rows[0], rows[1]


def relative(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Largest |got - want| / |scale|, scale by default what was wanted; NaN if any is."""
    scale = want if scale is None else scale
    return float(((got.double() - want).abs() / scale.abs().clamp(min=1e-30)).max())


def worst(errors: list[float]) -> float:
    return float(torch.tensor(errors).max())  # NaN if any is, which max() would not say


def gradient_error(got: Tensor, want: Tensor) -> float:
    """Relative to the largest entry of the row."""
    return relative(got, want, want.abs().amax(-1, keepdim=True))


def check_switch_select(impl: str, teacher: Tensor, student: Tensor) -> tuple[float, bool]:
    rows = len(teacher)
    threshold = torch.tensor([0.1, 0.9] * (rows // 2), device=teacher.device)
    threshold[4] = 1e-9  # of the near-equal rows the teacher writes the first
    ids = torch.arange(rows, device=teacher.device)
    options = {"seed": SEED, "sequence_ids": ids, "positions": 3 * ids, "vocab_size": VOCAB}
    errors, equal = [], True
    for metric in ("jsd", "kl", "rank"):
        warm = {"metric": metric, "teacher_temperature": 0.7}
        got = kernels.switch_select(teacher, student, threshold, impl=impl, **options, **warm)
        want = reference.switch_select(
            teacher.double(), student.double(), threshold.double(), **options, **warm
        )
        equal &= torch.equal(got.token, want.token)
        equal &= torch.equal(got.from_teacher, want.from_teacher)
        errors += [relative(*pair) for pair in zip(got[2:], want[2:], strict=True)]
    return worst(errors), equal


def check_sample(impl: str, logits: Tensor, _: Tensor) -> tuple[None, bool]:
    ids = torch.arange(len(logits), device=logits.device)
    options = {"seed": SEED, "sequence_ids": ids, "positions": ids, "vocab_size": VOCAB}
    equal = True
    for change in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}):
        got = kernels.sample(logits, impl=impl, **options, **change)
        equal &= torch.equal(got, reference.sample(logits.double(), **options, **change))
    return None, equal


def _loss_error(run: Callable, want: Callable, teacher: Tensor, student: Tensor) -> float:
    """Of the values of rows and of the gradient of their sum."""
    double = student.double().requires_grad_()
    student = student.clone().requires_grad_()
    exact = want(teacher.double(), double, vocab_size=VOCAB)
    got = run(teacher, student, vocab_size=VOCAB)
    exact.sum().backward()
    got.sum().backward()
    grads = (x.grad[:, :VOCAB] for x in (student, double))
    return worst([relative(got.detach(), exact.detach()), gradient_error(*grads)])


def check_jsd(impl: str, teacher: Tensor, student: Tensor) -> tuple[float, None]:
    run = partial(kernels.jsd, impl=impl)
    return _loss_error(run, reference.jsd, teacher, student), None


def check_divergence_loss(impl: str, teacher: Tensor, student: Tensor) -> tuple[float, None]:
    errors = []
    for kind in reference.KINDS:
        options = {"kind": kind, "beta": 0.3, "reduction": "none"}
        run = partial(kernels.divergence_loss, impl=impl, **options)
        want = partial(reference.divergence_loss, **options)
        errors.append(_loss_error(run, want, teacher, student))
    return worst(errors), None


def check_linear_divergence_loss(impl: str, like: Tensor, _: Tensor) -> tuple[float, None]:
    """Against the loss of explicit logits; the biases hold -inf, the padding weighs nothing."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = (12, 24), (PADDED[0], 24), (PADDED[0],), (12, 16), (PADDED[1], 16), (PADDED[1],)
    heads = [torch.randn(s, generator=generator) / s[-1] ** 0.25 for s in shapes]  # logits near 1
    heads = [x.to(like.device, like.dtype) for x in heads]
    heads[2][::7], heads[5][::7] = -torch.inf, -torch.inf
    hidden_t, weight_t, bias_t, hidden_s, weight_s, bias_s = heads
    student = [x.clone().requires_grad_() for x in (hidden_s, weight_s)]
    got = kernels.linear_divergence_loss(
        hidden_t, weight_t, *student, teacher_bias=bias_t, student_bias=bias_s,
        vocab_size=VOCAB, chunk_size=5, impl=impl,
    )  # fmt: skip
    got.backward()
    double = [x.double().requires_grad_() for x in (hidden_s, weight_s)]
    want = reference.divergence_loss(
        hidden_t.double() @ weight_t.double().t() + bias_t.double(),
        double[0] @ double[1].t() + bias_s.double(),
        vocab_size=VOCAB,
    )
    want.backward()
    errors = [relative(got.detach(), want.detach())]
    for one, exact in zip(student, double, strict=True):
        errors.append(relative(one.grad, exact.grad, exact.grad.abs().max()))
    return worst(errors), None


CHECKS = {
    "switch_select": check_switch_select,
    "sample": check_sample,
    "jsd": check_jsd,
    "divergence_loss": check_divergence_loss,
    "linear_divergence_loss": check_linear_divergence_loss,
}


def allowed_error(op: str, dtype: torch.dtype) -> float:
    """Arithmetic is float32 on the logits as given; a bfloat16 gradient rounds to 2^-9, and
    products of bfloat16 to as much before anything is computed."""
    if dtype == torch.float32:
        return 1e-3
    return {"linear_divergence_loss": 5e-2, "switch_select": 1e-3}.get(op, 1e-2)


def run_checks(device: torch.device, usable: list[str]) -> Iterator[Check]:
    dtypes = [torch.float32] + [torch.bfloat16] * (device.type != "cpu")
    for op, check in CHECKS.items():
        for impl in usable:
            if impl == "cuda" and op != "switch_select":  # which alone has it
                continue
            for dtype in dtypes:
                found = Check(op, impl, str(dtype).removeprefix("torch."))
                try:
                    error, found.tokens_equal = check(impl, *make_logits(device, dtype))
                except Exception as problem:  # whatever it is, the others are still checked
                    found.error = f"{type(problem).__name__}: {problem}"
                else:
                    found.max_error = error
                    small = error is None or error <= allowed_error(op, dtype)
                    found.ok = small and found.tokens_equal is not False
                yield found


# ------------------------------------------------------------------------------- speed


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median time of a run, by the device's own clock where it has one."""
    times = []
    for _ in range(repeats + 2):  # two to warm up
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def speed(device: torch.device) -> dict:
    """Copy bandwidth, and the share of it that switch_select and divergence_loss reach with the
    backend chosen by default, counting one read of both models' logits."""
    gpu, copy = device.type == "cuda", copy_bandwidth(device)
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = (512, 151936) if gpu else (4, 50257)
    pair = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    threshold = torch.full(shape[:1], 0.5, device=device)
    ids = torch.arange(shape[0], device=device)
    runs = {
        "switch_select": lambda: kernels.switch_select(
            *pair, threshold, seed=SEED, sequence_ids=ids, positions=ids
        ),
        "divergence_loss": lambda: kernels.divergence_loss(*pair),
    }
    found = {
        "copy_gbps": copy / 1e9,
        "backend": backend.choose(None, *pair),
        "shape": f"{shape[0]} x {shape[1]} {str(dtype).removeprefix('torch.')}",
        "share": {},
    }
    for op, run in runs.items():
        moved = 2 * pair[0].nbytes / median_seconds(run, device)
        found["share"][op] = moved / copy
    return found


# ------------------------------------------------------------------------------- report


def diagnose(device: torch.device) -> dict:
    can = backends(device)
    usable = [impl for impl, answer in can.items() if not answer.startswith("no")]
    checks = list(run_checks(device, usable))
    return {
        "device": str(device),
        "versions": versions(),
        "devices": devices(),
        "backends": can,
        "checks": [asdict(check) for check in checks],
        "speed": speed(device),
        "ok": all(check.ok for check in checks),
    }


def show(report: dict, console: Console) -> None:
    table = Table(title="versions and devices", show_header=False)
    for name, version in report["versions"].items():
        table.add_row(name, version)
    for one in report["devices"]:
        table.add_row(one["device"], f"{one['name']}, {one['gib']:.0f} GiB")
    console.print(table)

    table = Table("backend", "usable", title=f"backends on {report['device']}")
    for impl, answer in report["backends"].items():
        table.add_row(impl, answer)
    console.print(table)

    table = Table(title="against the float64 reference")
    for column in ("op", "backend", "dtype", "max error", "tokens", "result"):
        table.add_column(column, justify="right" if column == "max error" else "left")
    for check in report["checks"]:
        error, tokens = check["max_error"], check["tokens_equal"]
        table.add_row(
            check["op"], check["backend"], check["dtype"],
            "-" if error is None else f"{error:.1e}",
            "-" if tokens is None else "equal" if tokens else "differ",
            "[green]ok[/]" if check["ok"] else "[bold red]FAIL[/]",
        )  # fmt: skip
    console.print(table)
    for check in report["checks"]:
        if check["error"]:
            where = f"{check['op']}, {check['backend']}, {check['dtype']}"
            console.print(f"{where}: {check['error']}", markup=False, highlight=False)

    fast = report["speed"]
    console.print(f"copy bandwidth of {report['device']}: {fast['copy_gbps']:,.1f} GB/s")
    for op, share in fast["share"].items():
        console.print(f"{op}, {fast['backend']}, {fast['shape']}: {share:.1%} of it")
    failed = sum(not check["ok"] for check in report["checks"])
    console.print(f"{failed} of {len(report['checks'])} checks failed" if failed else "all well")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m switchkd.doctor", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", help="write the report to this file")
    args = parser.parse_args(argv)
    try:
        device = find_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    report = diagnose(device)
    show(report, Console())
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
