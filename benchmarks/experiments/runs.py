"""Training runs of the experiments: one folder for each set of options, trained once.

A run is `python -m switchkd.train` with its options as flags. Its folder is named by a hash of
them, so that experiments share runs, and what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console

from switchkd.config import SwitchConfig

ROOT = Path(__file__).parents[2]
MEASURES = {  # of summary.json: label, and whether larger is better (None: neither)
    "teacher_share": ("teacher's share", None),
    "cross_entropy": ("cross-entropy", False),
    "kl": ("KL(p‖q)", False),
    "jsd": ("JSD, bits", False),
    "rouge_l": ("Rouge-L", True),
}


@dataclass(frozen=True)
class Scale:
    """A teacher, students cut from it, and how long they are trained."""

    teacher: str
    layers: Mapping[str, str]  # by the size of the student relative to the teacher
    student: str  # the size of most experiments
    sizes: Sequence[str]  # of students in the experiment about sizes, the largest first
    sft_steps: int  # every student is tuned on the data first, as the paper does
    steps: int
    options: Mapping[str, object]


SCALES = {
    "embedded": Scale(
        teacher="embedded",
        layers={"1/2": "0,3,5", "1/3": "0,5", "1/6": "0"},
        student="1/6",
        sizes=("1/2", "1/3", "1/6"),
        sft_steps=60,
        steps=80,
        options=dict(
            dtype="float32",
            teacher_dtype="float32",
            max_train_rows=2000,
            max_prompt_length=160,
            max_new_tokens=64,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            rollout_batch_size=32,
            learning_rate=1e-3,
            warmup_steps=5,
        ),
    ),
    "smollm2": Scale(  # tuned by examples/smollm2_sft.yaml first
        teacher="runs/smollm2-teacher",
        layers={
            "4/5": "0-11,18-29",
            "1/2": "0-7,22-28",
            "1/4": "0-3,26-29",
            "1/8": "0-1,28-29",
        },
        student="4/5",
        sizes=("1/2", "1/4", "1/8"),
        sft_steps=20,
        steps=60,
        options=dict(
            dtype="float32",
            teacher_dtype="bfloat16",
            max_prompt_length=128,
            max_new_tokens=96,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            rollout_batch_size=16,
            learning_rate=1e-4,
            warmup_steps=5,
            bf16=True,
        ),
    ),
}


class Runs:
    """Trains what is asked for and is not there yet, `jobs` runs side by side."""

    def __init__(self, args, console: Console):
        self.scale, self.jobs, self.console = SCALES[args.scale], args.jobs, console
        self.folder = Path(args.runs) / args.scale
        self.seeds = list(range(1, args.seeds + 1))
        self.steps = args.max_steps or self.scale.steps
        self.sft_steps = args.sft_steps or self.scale.sft_steps
        self.teacher = args.teacher or self.scale.teacher
        self.common = dict(
            self.scale.options,
            dataset_name=args.dataset_name,
            eval_dataset_name=args.eval_dataset_name,
            eval_size=args.eval_size,
            dataset_test_split="valid" if args.eval_dataset_name == "embedded" else "validation",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=10,
            log_completions=False,
            disable_tqdm=True,
            report_to="none",
        )
        if args.float32:
            self.common |= dict(dtype="float32", teacher_dtype="float32", bf16=False)

    def student(self, size: str, seed: int) -> dict:
        """Options of the supervised run that a student of this size starts from."""
        return dict(
            self.common,
            model_name_or_path=self.teacher,
            student_layers=self.scale.layers[size],
            max_steps=self.sft_steps,
            loss_type="cross_entropy",
            lmbda=0.0,
            seed=seed,
        )

    def distilled(self, arm: Mapping, seed: int) -> dict:
        """Options of a run of `arm`: options of training, and `size`, `teacher_size`."""
        arm = dict(arm)
        size, teacher_size = arm.pop("size", self.scale.student), arm.pop("teacher_size", None)
        teacher = self.teacher
        if teacher_size is not None:
            teacher = str(self.path(self.student(teacher_size, seed)))
        return dict(
            self.common,
            model_name_or_path=str(self.path(self.student(size, seed))),
            teacher_model_name_or_path=teacher,
            max_steps=self.steps,
            seed=seed,
            **arm,
        )

    def path(self, options: Mapping) -> Path:
        """Where a run is: options that only say what is the default do not make it another."""
        defaults = {f.name: f.default for f in fields(SwitchConfig)}
        text = json.dumps(
            {k: v for k, v in options.items() if k not in defaults or v != defaults[k]},
            sort_keys=True,
        )
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def train(self, arms: Iterable[Mapping]) -> None:
        """All seeds of all arms: first the students they start from, then the runs themselves."""
        arms = list(arms)
        default = self.scale.student
        sizes = {arm.get("size", default) for arm in arms}
        sizes |= {arm["teacher_size"] for arm in arms if "teacher_size" in arm}
        starts = [self.student(size, seed) for size in sorted(sizes) for seed in self.seeds]
        self._train_all(starts, "students to start from")
        self._train_all([self.distilled(a, seed) for a in arms for seed in self.seeds], "runs")

    def _train_all(self, wanted: Sequence[Mapping], what: str) -> None:
        left = {self.path(o): o for o in wanted if not (self.path(o) / "summary.json").exists()}
        self.console.print(f"{len(wanted)} {what}, {len(left)} to be trained")
        threads = max(1, torch.get_num_threads() // self.jobs)

        def one(item: tuple[Path, Mapping]) -> None:
            path, options = item
            flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
            flags += [f"--output_dir={path}", "--overwrite_output_dir=true"]
            path.mkdir(parents=True, exist_ok=True)
            with (path / "log.txt").open("w", encoding="utf-8") as log:
                done = subprocess.run(
                    [sys.executable, "-m", "switchkd.train", *flags],
                    cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{path} failed: exit {done.returncode}, see log.txt there")
            self.console.print(f"  {path.name} done")

        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(one, left.items()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def summaries(self, arm: Mapping) -> list[dict]:
        """One dict of MEASURES for each seed of a trained arm."""
        found = []
        for seed in self.seeds:
            text = (self.path(self.distilled(arm, seed)) / "summary.json").read_text()
            summary = json.loads(text)
            found.append({k: summary["after"].get(k, summary.get(k)) for k in MEASURES})
        return found

    def completions(self, arm: Mapping, seed: int) -> Iterable[dict]:
        """The records of every rollout of one run of an arm."""
        path = self.path(self.distilled(arm, seed)) / "completions.jsonl"
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and sample deviation (NaN of a single value); None where nothing was measured."""
    if any(value is None for value in values):
        return None
    if any(value != value for value in values):  # statistics refuses NaN
        return float("nan"), float("nan")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")
