"""How far `switchkd.plan` is off: short trainings, each in a process of its own, on this machine.

    python benchmarks/plan_check.py --csv benchmarks/results/plan_check_cpu.csv

Every row is at its limits: random ids, and a temperature at which hardly any response ends early.
Memory is the peak of the process (VmHWM, reset before the first step) less what it had before the
models were loaded, after a small training that loads and compiles what a training needs. malloc is
told to hand every block over 128 KiB back to the system (MALLOC_MMAP_THRESHOLD_), because glibc's
own rule keeps freed blocks, as many as chance will have it; `--allocator default` leaves it alone:
the plan then adds what is kept in the median. SWITCHKD_SMOLLM2 names the folder with
SmolLM2-135M-Instruct.Q4_1.gguf; without it, its cases are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import transformers
from rich.console import Console

from benchmarks.timing import commit, forget_resident_peak, resident, write_csv
from switchkd.command_line import parse
from switchkd.data import Example, Report, Row, Rows
from switchkd.devices import processor_name
from switchkd.loading import load_models, load_tokenizers, peft_config
from switchkd.models import load_model, load_tokenizer
from switchkd.plan import make_plan
from switchkd.plan_speed import probe
from switchkd.trainer import SwitchTrainer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMON = {
    "dataset_name": "embedded", "teacher_dtype": "float32", "lmbda": 1.0, "temperature": 5.0,
    "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "log_completions": False, "save_completions": False, "max_steps": 3, "warmup_steps": 0,
}  # fmt: skip
EMBEDDED = {
    "model_name_or_path": "embedded", "teacher_model_name_or_path": "embedded",
    "student_layers": "0-2", "max_prompt_length": 96, "max_new_tokens": 96,
    "per_device_train_batch_size": 32,
}  # fmt: skip
SMOLLM2 = {
    "model_name_or_path": GGUF, "teacher_model_name_or_path": GGUF,
    "student_layers": "0-11,18-29", "max_prompt_length": 64, "max_new_tokens": 48,
    "per_device_train_batch_size": 4, "max_steps": 2,
}  # fmt: skip
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
CHECKPOINTING = {"gradient_checkpointing": True}
LORA = {"use_peft": True, "lora_target_modules": "q_proj v_proj"}
CASES = {
    "embedded": EMBEDDED,
    "embedded, checkpointing": EMBEDDED | CHECKPOINTING,
    "embedded, LoRA": EMBEDDED | LORA,
    "embedded, bf16": EMBEDDED | {"bf16": True},
    "embedded, 2 micro-batches, data": EMBEDDED | {"gradient_accumulation_steps": 2, "lmbda": 0.0},
    "SmolLM2": SMOLLM2,
    "SmolLM2, checkpointing": SMOLLM2 | CHECKPOINTING,
    "SmolLM2, LoRA": SMOLLM2 | LORA,
}


def flags(options: dict) -> list[str]:
    return [x for key, value in options.items() for x in (f"--{key}", *str(value).split(" "))]


def child(options: dict) -> dict:
    """Train, and tell what it took."""
    with tempfile.TemporaryDirectory() as folder:
        small = {"student_layers": "0", "max_prompt_length": 8, "max_new_tokens": 8,
                 "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}  # fmt: skip
        train(options | EMBEDDED | small | {"output_dir": folder}, None)
        before, seconds = resident("VmRSS"), []
        logs = train(options | {"output_dir": folder}, forget_resident_peak, seconds)
        peak = resident("VmHWM") - before
    rollouts = [log.get("time/rollout", 0.0) for log in logs]
    steady = slice(1, None)  # the first step allocates
    return {
        "peak": peak,
        "seconds": statistics.median(seconds[steady]),
        "rollout": statistics.median(rollouts[steady]),
    }


def train(options: dict, begin, seconds: list | None = None) -> list[dict]:
    """One run on rows of random ids, all at their limits."""

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.last = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            if seconds is not None:
                seconds.append(now - self.last)
            self.last = now

    script, config = parse(flags(options | {"logging_steps": 1}))
    tokenizer, _ = load_tokenizers(script, config)
    student, teacher = load_models(script, config)
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, 2000) for _ in range(count)]

    count = (
        config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    )
    rows = [
        Row(ids(config.max_prompt_length), ids(config.max_new_tokens), Example((), ("",), i + 1))
        for i in range(count)
    ]
    trainer = SwitchTrainer(
        model=student, teacher_model=teacher, args=config, processing_class=tokenizer,
        train_dataset=Rows(rows, Report("random ids")), peft_config=peft_config(script),
        callbacks=[Clock()],
    )  # fmt: skip
    if begin is not None:
        begin()
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def check(name: str, options: dict, allocator: str) -> dict:
    """One case, planned and run."""
    for variable in RETURNED:
        os.environ.pop(variable, None)
    if allocator == "mmap":  # of the training, and the plan is to know
        os.environ |= RETURNED
    device = probe("cpu")
    plan = make_plan(*parse(flags(options)), device, device.memory)
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    got = json.loads(done.stdout.splitlines()[-1])
    times = plan["seconds"]
    return {
        **machine(),
        "case": name,
        "allocator": allocator,
        "predicted_mib": round(plan["peak"] / 2**20, 1),
        "measured_mib": round(got["peak"] / 2**20, 1),
        "memory_error": round(plan["peak"] / got["peak"] - 1, 3),
        "phase": max(plan["phases"], key=plan["phases"].get),
        "predicted_s": round(plan["step_seconds"], 2),
        "measured_s": round(got["seconds"], 2),
        "predicted_rollout_s": round(times["rollout"], 2),
        "measured_rollout_s": round(got["rollout"], 2),
    }


def machine() -> dict:
    """Where and with what this was measured."""
    return {
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def dense_smollm2(folder: str) -> str:
    """The GGUF file as safetensors in float32, so that loading is not what takes most."""
    source = os.environ["SWITCHKD_SMOLLM2"]
    load_model(source, gguf_file=GGUF, dtype="float32").save_pretrained(folder)
    load_tokenizer(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--allocator", choices=("mmap", "default"), default="mmap")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    rows, console = [], Console()
    with tempfile.TemporaryDirectory() as folder:
        smollm2 = None
        for name in args.cases:
            options = COMMON | CASES[name]
            if options["model_name_or_path"] == GGUF:
                if "SWITCHKD_SMOLLM2" not in os.environ:
                    console.print(f"{name}: left out, SWITCHKD_SMOLLM2 is not set")
                    continue
                smollm2 = smollm2 or dense_smollm2(folder)
                options |= dict.fromkeys(
                    ("model_name_or_path", "teacher_model_name_or_path"), smollm2
                )
            rows.append(check(name, options, args.allocator))
            row = rows[-1]
            console.print(
                f"{name}: {row['predicted_mib']} MiB predicted, {row['measured_mib']} measured "
                f"({row['memory_error']:+.1%}); "
                f"a step {row['predicted_s']} s predicted, {row['measured_s']} measured"
            )
            if args.csv:
                write_csv(args.csv, row, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
