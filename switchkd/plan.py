"""`python -m switchkd.plan`: what a training run will take, before anything is loaded.

Takes the options of `switchkd.train` and tells the memory of each part and phase, the time of a
step, and the batch sizes that fit. Only configurations are read, no weights. All of it holds for
rows at max_prompt_length and max_new_tokens, all rolled out: the most that a run can take. The
memory also holds for data rows at a max_response_length beyond that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from switchkd.command_line import parse
from switchkd.models import count_parameters
from switchkd.plan_memory import Memory
from switchkd.plan_models import build
from switchkd.plan_speed import DATA_SHEETS, Device, find, step_seconds

USABLE = 0.9  # of a device's memory: the rest is for fragments, libraries and the driver
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def parse_bytes(text: str) -> int:
    """'80GB', '24 GiB', '512MiB' or bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        raise ValueError(
            f"device_memory: got {text!r}, expected a size such as 80GB or 24GiB"
        ) from None
    unit = UNITS[match[2].upper()]
    return int(number * (unit if not match[3] else 1024 ** list(UNITS).index(match[2].upper())))


def make_plan(script, config, device: Device, limit: int, processes: int = 1) -> dict:
    """Bytes, seconds and suggestions, as they go into the JSON file."""
    pair = build(script, config)
    gpu = not device.name.startswith("cpu")
    memory = Memory(pair, config, processes, gpu, script.max_response_length)
    phases = memory.phases(memory.asked)
    fitting = memory.suggest(int(USABLE * limit))
    times = step_seconds(memory, device)
    names = {"teacher": script.teacher_model_name_or_path, "student": script.model_name_or_path}
    models = {"teacher": pair.teacher, "student": pair.student}
    return {
        "models": {
            role: {
                "name": names[role],
                "parameters": count_parameters(model),
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            }
            for role, model in models.items()
            if model is not None
        },
        "device": {**asdict(device), "limit": limit},
        "processes": processes,
        "sizes": asdict(memory.asked),
        "parts": {name: size for name, size in memory.parts().items() if size},
        "phases": phases,
        "peak": max(phases.values()),
        "fits": max(phases.values()) <= USABLE * limit,
        "suggestion": None if fitting is None else asdict(fitting),
        "seconds": times,
        "step_seconds": sum(times.values()),
        "flops": {name: phase.flops for name, phase in memory.micro_steps[0].items()},
        "notes": memory.notes,
    }


def show(plan: dict, console: Console) -> None:
    for role, model in plan["models"].items():
        console.print(
            f"{role}: {model['name']}, {model['parameters'] / 1e6:,.2f} M parameters"
            + (f", {model['trained'] / 1e6:,.2f} M trained" if role == "student" else "")
            + f", {model['dtype']}",
            highlight=False,
        )
    sizes, device = plan["sizes"], plan["device"]
    console.print(
        f"{sizes['rows']} rows a micro-batch, {sizes['accumulation']} micro-batches a step, "
        f"{sizes['slots']} rows decoded at once, "
        f"{plan['processes']} process{'es' * (plan['processes'] > 1)}",
        highlight=False,
    )
    table = Table("memory on each device")
    table.add_column("MiB", justify="right")
    for name, size in plan["parts"].items():
        table.add_row(name, f"{size / 2**20:,.1f}")
    table.add_section()
    for name, size in plan["phases"].items():
        table.add_row(f"at most, {name}", f"{size / 2**20:,.1f}", style="bold")
    console.print(table)

    source = "measured now" if device["measured"] else "data sheet: a lower bound"
    table = Table("time of a step")
    table.add_column("s", justify="right")
    for name, seconds in plan["seconds"].items():
        table.add_row(name, f"{seconds:.3f}")
    table.add_section()
    table.add_row("together", f"{plan['step_seconds']:.3f}", style="bold")
    console.print(table)
    console.print(
        f"{device['name']} ({source}): copy {device['bandwidth'] / 1e9:,.1f} GB/s, products "
        f"{device['full'] / 1e9:,.0f} GFLOP/s in float32, {device['half'] / 1e9:,.0f} in bfloat16"
    )
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False)
    limit = f"{device['limit'] / 2**30:,.2f} GiB"
    verdict = "fits" if plan["fits"] else "[bold red]does not fit[/]"
    console.print(
        f"{plan['peak'] / 2**30:,.2f} GiB at most: {verdict} into {USABLE:.0%} of {limit}"
    )
    best = plan["suggestion"]
    if best is None:
        console.print(
            "not even one row fits: more memory, a smaller model, shorter responses, LoRA "
            "(--use_peft true) or --gradient_checkpointing true"
        )
    else:
        console.print(
            "largest that fit, for as many rows a step: "
            f"--per_device_train_batch_size {best['rows']} "
            f"--gradient_accumulation_steps {best['accumulation']}"
            + (f" --rollout_batch_size {best['slots']}" if best["slots"] else ""),
            soft_wrap=True,
        )


def main(argv: list[str] | None = None) -> int:
    console = Console()
    parser = argparse.ArgumentParser(
        prog="python -m switchkd.plan",
        description=__doc__.splitlines()[0],
        epilog="All options of switchkd.train, --config FILE.yaml among them, are understood, too.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", help=f"default: a GPU if there is one; or one of {', '.join(DATA_SHEETS)}"
    )
    parser.add_argument("--device_memory", help="such as 80GB; default: what the device has")
    parser.add_argument("--processes", type=int, default=1, help="one for each device")
    parser.add_argument("--json", help="write the plan to this file")
    own, rest = parser.parse_known_args(argv)
    try:
        if own.processes < 1:
            raise ValueError(f"processes: got {own.processes}, expected an integer >= 1")
        limit = None if own.device_memory is None else parse_bytes(own.device_memory)
        if limit == 0:
            raise ValueError(f"device_memory: got {own.device_memory}, expected a size > 0")
        script, config = parse(rest)
        device = find(own.device)
        limit = device.memory if limit is None else limit
        plan = make_plan(script, config, device, limit, own.processes)
        if own.json:
            Path(own.json).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    show(plan, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
