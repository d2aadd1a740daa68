"""`python benchmarks/train_step.py`: what a training step costs, phase by phase, all in one run.

switch, switchkd  SwitchTrainer: block decoder, the teacher's hidden states kept from the rollout,
                  fused `linear_divergence_loss`
switch, naive     both models token by token with their caches, then both forward over the finished
                  sequences, and an eager skew reverse KL on full logits
gkd, switchkd     SwitchTrainer with the student writing alone and generalised JSD: what the teacher
                  in the rollout costs
distillation, trl TRL's DistillationTrainer: `generate` by the student, both forward, generalised
                  JSD in chunks of logits; left out where TRL has none or refuses the pair
gkd, trl          TRL's GKDTrainer: `generate` by the student, both forward, generalised JSD on full
                  logits; the same written out where TRL is not installed or refuses the pair

All train one student on the same prompts with one AdamW; no response ends before `max_new_tokens`,
so that all steps train on as many tokens. The phases of a step are disjoint and their sum is the
step: each moment counts once.

rollout          prompts to finished completions: for SWITCH both models, and the record of every
                 token, written to a file; for GKD the student alone. Also the batches' padding
teacher forward  over prompts and completions; none where the rollout kept the hidden states
student forward  the same, with a graph; ours without the output head
loss             the rest of the way to the loss. Ours: both output heads, and the gradients of the
                 student's head and hidden states. Theirs: softmax and divergence of finished logits
backward         the gradients of what is not done yet
optimizer        clipping to norm 1, AdamW, dropping the gradients

Steps are interleaved: one of each, in turning order, `repeats` times. The phases of the repeat with
the median total are reported, with the range over the repeats; ratio_to_gkd is over the whole step
of TRL's GKD in the same repeat, the median over the repeats. Memory is that of a first step each,
above what was held before it: both models and the optimizer's state. Before anything is timed, the
loss and the gradient of ours are compared with those of the naive step on one rollout.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import rollout_pairs as pairs
from benchmarks import train_step_methods as methods
from benchmarks.timing import describe, dtype_name, open_device, save

# Of loss and gradient, relative. Measured on the embedded and the toy pair: 3e-7 and 2e-6 in
# float32, 3e-4 and 1e-2 in bfloat16.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 1e-1)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One way to do a step, and what its repeats took."""

    method: str
    implementation: str
    run: Callable[[], float]
    phases: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int | None] | None = None
    teacher_share: float = 0.0

    def totals(self) -> list[float]:
        return [sum(phases.values()) for phases in self.phases]


class Bench:
    """The steps of one pair, ready to run."""

    def __init__(self, pair: pairs.Pair, args: argparse.Namespace, folder: str):
        self.pair, self.args, self.device = pair, args, pair.student.device
        self.described = describe(self.device)  # now: a long run may outlive the commit
        pair.student.requires_grad_(True)
        pair.teacher.requires_grad_(False)
        for model in (pair.teacher, pair.student):
            model.generation_config.eos_token_id = None
        self.phases = methods.Phases(self.device, CLOCKS[args.clock])
        sizes = pair, args.batch, args.max_new_tokens
        fused, eager = (
            functools.partial(methods.switch_trainer, kind, *sizes, folder)
            for kind in (methods.TimedSwitch, methods.TimedEager)
        )
        self.ours, student = fused(), {"rollout_policy": "student", "loss_type": "generalized_jsd"}
        self.naive = eager(decoder="naive", rollout_batch_size=args.batch)
        self.ours_gkd, self.gkd = fused(**student), methods.gkd_trainer(*sizes, folder)
        refused = methods.trl_refuses(pair)
        if refused:
            pair.notes.append(f"GKD is TRL's step written out: {refused}")
        self.distillation = None
        if not refused and methods.DistillationTrainer is not None:
            self.distillation = methods.distillation_trainer(*sizes, folder)
        for trainer in (self.ours, self.naive, self.ours_gkd, self.gkd, self.distillation):
            if trainer is not None:
                trainer.phases = self.phases
        self.phases.watch(pair.teacher, "teacher forward")
        self.phases.watch(pair.student, "student forward")
        self.optimizer = self.ours.create_optimizer()
        by = "written out" if refused else f"trl {methods.TRL_VERSION}"
        self.steps = [
            Measured("switch", "switchkd", methods.switch_step(self.ours)),
            Measured("switch", "naive", methods.switch_step(self.naive)),
            Measured("gkd", "switchkd", methods.switch_step(self.ours_gkd)),
            Measured("gkd", by, methods.gkd_step(self.gkd, *sizes)),
        ]
        if self.distillation is not None:
            step = methods.distillation_step(self.distillation, *sizes)
            self.steps.insert(-1, Measured("distillation", by, step))

    def gate(self) -> dict[str, float]:
        """Relative differences of loss and gradient, ours against the naive step, on one rollout.

        Raises AssertionError where one is beyond what rounding explains.
        """
        batches, items = methods.window(self.ours)
        batch, found, results = self.ours._prepare_inputs(batches[0]), {}, []
        for trainer in (self.ours, self.naive):
            self.phases.start("loss")
            loss = trainer.compute_loss(self.pair.student, dict(batch), num_items_in_batch=items)
            loss.backward()
            weights = self.pair.student.parameters()
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
            results.append((loss.detach(), gradient))
            self.pair.student.zero_grad()
        (loss, mine), (expected, theirs) = results
        found["loss"] = ((loss - expected).abs() / expected.abs()).item()
        norms = torch.stack([(a - b).float().norm() for a, b in zip(mine, theirs, strict=True)])
        whole = torch.stack([b.float().norm() for b in theirs])
        found["gradient"] = (norms.norm() / whole.norm()).item()
        limits = TOLERANCE[self.pair.student.dtype]
        for (what, difference), limit in zip(found.items(), limits, strict=True):
            if not difference <= limit:  # or not a number
                raise AssertionError(
                    f"{what} of switchkd: got {difference:.3g} of itself away from the naive "
                    f"step's on the same sequences, expected at most {limit:g}"
                )
        return found

    def step(self, way: Measured) -> tuple[dict[str, float], dict[str, int | None]]:
        parameters = list(self.pair.student.parameters())
        self.phases.start("rollout")
        way.teacher_share = way.run()
        self.phases.to("optimizer")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.phases.stop()

    def measure(self) -> Iterator[None]:
        """Memory, then one repeat after another: `rows` tells what is known after each."""
        for parameter in self.pair.student.parameters():  # the optimizer's state is made now
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ours._engine.release()  # the caches of a step are part of it
        for way in self.steps:
            gc.collect()
            methods.give_back_memory()
            methods.peak_bytes(self.device)
            held = methods.peak_bytes(self.device)  # since the last call
            _, peaks = self.step(way)
            way.peaks = {phase: x if x is None else x - held for phase, x in peaks.items()}
        for i in range(self.args.repeats):
            first = i % len(self.steps)
            for way in self.steps[first:] + self.steps[:first]:
                way.phases.append(self.step(way)[0])
            yield

    def rows(self) -> list[dict]:
        """One for each phase of each step, and one for the whole."""
        gkd, tokens = self.steps[-1].totals(), len(self.pair.prompts) * self.args.max_new_tokens
        shared = {
            "batch": self.args.batch,
            "micro_batches": self.args.micro_batches,
            "max_new_tokens": self.args.max_new_tokens,
            "dtype": dtype_name(self.pair.student.dtype),
            "repeats": len(self.steps[0].phases),
            "clock": self.args.clock,
            "models": self.pair.label,
            "device": self.described,
            "transformers": transformers.__version__,
        }
        rows = []
        for way in self.steps:
            totals = way.totals()
            middle = way.phases[totals.index(statistics.median_low(totals))]
            for phase in (*methods.PHASES, "step"):
                whole = phase == "step"
                each = totals if whole else [phases[phase] for phases in way.phases]
                ratios = [ms / base for ms, base in zip(each, gkd, strict=True)]
                peaks = [x for k, x in way.peaks.items() if x is not None and (whole or k == phase)]
                ms = sum(middle.values()) if whole else middle[phase]
                rows.append(
                    {
                        "pair": self.pair.name,
                        "method": way.method,
                        "implementation": way.implementation,
                        "phase": phase,
                        "ms": ms,
                        "ms_low": min(each),
                        "ms_high": max(each),
                        "ms_per_token": ms / tokens,
                        "peak_mb": max(peaks) / 2**20 if peaks else None,
                        "ratio_to_gkd": statistics.median(ratios),
                        "ratio_low": min(ratios),
                        "ratio_high": max(ratios),
                        "teacher_share": way.teacher_share,
                        **shared,
                    }
                )
        return rows


def show(rows: list[dict], notes: list[str], console: Console) -> None:
    first = rows[0]
    table = Table(
        title=f"{first['models']}: {first['micro_batches']} x {first['batch']} rows of "
        f"{first['max_new_tokens']} new tokens, {first['dtype']}, ms ({first['clock']} time)"
    )
    table.add_column("phase")
    ways = list(dict.fromkeys((row["method"], row["implementation"]) for row in rows))
    for way in ways:
        table.add_column(", ".join(way), justify="right", no_wrap=True)
    by_place = {(row["method"], row["implementation"], row["phase"]): row for row in rows}

    def line(name: str, phase: str, cell: Callable[[dict], str]) -> None:
        table.add_row(name, *(cell(by_place[(*way, phase)]) for way in ways))

    for phase in methods.PHASES:
        line(phase, phase, lambda row: f"{row['ms']:,.1f}")
    table.add_section()
    line("step", "step", lambda row: f"{row['ms']:,.1f}")
    line("range", "step", lambda row: f"{row['ms_low']:,.0f} - {row['ms_high']:,.0f}")
    line("ms a token", "step", lambda row: f"{row['ms_per_token']:.3f}")
    line("over GKD", "step", lambda row: f"{row['ratio_to_gkd']:.2f}x")
    line("range", "step", lambda row: f"{row['ratio_low']:.2f} - {row['ratio_high']:.2f}")
    line("peak MiB", "step", lambda row: f"{row['peak_mb'] or float('nan'):,.0f}")
    console.print(table)
    for note in [first["device"], f"teacher share {first['teacher_share']:.1%}", *notes]:
        console.print(note, highlight=False, markup=False)


def parse(argv=None) -> argparse.Namespace:
    """The options, all of them checked and filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pair", nargs="+", help=f"of {', '.join(pairs.NAMES)}")
    add("--models", help="folder with the models of the pair smollm2")
    add("--data", default="embedded", help="prompts: a .jsonl file, or the embedded data")
    add("--batch", type=int, default=8, help="rows of a micro-batch")
    add("--micro_batches", type=int, default=1, help="micro-batches of a step")
    add("--max_new_tokens", type=int, help="default 96")
    add("--repeats", type=int, help="default 5 on a CPU, 10 on a GPU")
    add("--dtype", choices=("float32", "bfloat16"), help="default float32, on a GPU bfloat16")
    add("--device", help="default: a GPU if there is one")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    add("--quick", action="store_true", help="16 tokens, one repeat")
    add("--json", help="write the rows to this file")
    add("--csv", help="write the rows to this file")
    args = parser.parse_args(argv)
    try:
        args.device = open_device(args.device)
        gpu = args.device.type == "cuda"
        if gpu and args.clock == "cpu":
            raise ValueError("clock: got cpu for a GPU, expected wall: its time is that of events")
        args.pair = args.pair or (["gpt2-xl", "qwen2.5-1.5b"] if gpu else ["embedded"])
        for name in args.pair:
            pairs.check_name(name, args.models)
        defaults = {"max_new_tokens": 16 if args.quick else 96,
                    "repeats": 1 if args.quick else 10 if gpu else 5}  # fmt: skip
        for name in ("batch", "micro_batches", *defaults):
            if getattr(args, name) is None:
                setattr(args, name, defaults[name])
            if getattr(args, name) < 1:
                raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    except ValueError as error:
        parser.error(str(error))
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    return args


def main(argv=None) -> int:
    args = parse(argv)
    console, results = Console(width=max(Console().width, 110)), []
    for name in args.pair:
        count = args.batch * args.micro_batches
        pair = pairs.load_pair(name, count, args.dtype, args.device, args.models, data=args.data)
        pair.prompts = pair.prompts[:count]
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(pair, args, folder)
            found = bench.gate()
            for _ in bench.measure():
                rows = bench.rows()
                save(args, results + rows)  # what is done survives an interruption
        results += rows
        gate = ", ".join(f"{what} {difference:.1e}" for what, difference in found.items())
        show(rows, [*pair.notes, f"ours against naive, relative: {gate}"], console)
        del bench, pair  # before the next one is loaded
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
