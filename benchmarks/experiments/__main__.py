"""`python benchmarks/experiments NAME`: experiments of the SWITCH paper, and its open questions.

methods       (a) SFT, KD, GKD, DistiLLM, SKD, SWITCH, AdaSwitch
decay         (b) lambda 1/5, 1/10, 1/15, 1/25 and the teacher's share of each
schedules     (c) exponential, linear, constant, growth, random, mix-in
intervention  (d) who writes, by position and by divergence
sizes         (e) students of several sizes, and a teacher no larger than the student
losses        (f) four losses on student-only and on SWITCH rollouts
misguidance   (g) does a better rollout have a lower loss, by length

Each trains what is missing, prints a table with mean and deviation over seeds, and writes it with
a plot to benchmarks/results/experiments/SCALE/. Students are tuned on the data first, as in the
paper.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a folder: import from the repository
    sys.path[0] = str(Path(__file__).parents[2])

from rich.console import Console

from benchmarks.experiments import arms, intervention, misguidance, tables
from benchmarks.experiments.runs import SCALES, Runs

TITLES = {
    "methods": "methods",
    "decay": "decay of the threshold",
    "schedules": "schedules",
    "sizes": "sizes of student and teacher",
    "losses": "losses with and without SWITCH",
}
NAMES = ("methods", "decay", "schedules", "intervention", "sizes", "losses", "misguidance")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME")
    parser.add_argument("--scale", choices=SCALES, default="embedded")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default 3)")
    parser.add_argument("--max_steps", type=int, help="steps of distillation")
    parser.add_argument("--sft_steps", type=int, help="steps of tuning before it")
    parser.add_argument("--teacher", help="another teacher than the scale's")
    why = "for processors that are slow in bfloat16"
    parser.add_argument("--float32", action="store_true", help=why)
    parser.add_argument("--dataset_name", default="embedded", help=".jsonl file or Hub id")
    parser.add_argument("--eval_dataset_name", default="embedded")
    parser.add_argument("--eval_size", type=int, default=400, help="rows that are evaluated on")
    parser.add_argument("--probe_size", type=int, default=400, help="prompts of misguidance")
    parser.add_argument("--runs", default="runs/experiments", help="folder of the trained runs")
    parser.add_argument("--out", help="folder of tables and plots")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    args = parser.parse_args(argv)
    for name in ("seeds", "max_steps", "sft_steps", "eval_size", "probe_size", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: got {value}, expected at least 1")
    if "all" in args.names:
        args.names = list(NAMES)
    return args


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console()
    runs = Runs(args, console)
    out = Path(args.out) if args.out else tables.RESULTS / args.scale
    compared = {
        "methods": arms.METHODS,
        "decay": arms.DECAY,
        "schedules": arms.SCHEDULES,
        "sizes": arms.sizes(runs.scale),
        "losses": arms.LOSSES,
    }
    try:
        for name in args.names:
            if name == "misguidance":
                misguidance.analyse(runs, args.probe_size, out, console)
            elif name == "intervention":
                runs.train([arms.SWITCH])
                records = [runs.completions(arms.SWITCH, seed) for seed in runs.seeds]
                intervention.analyse(records, out, console)
            else:
                some = compared[name]
                runs.train(some.values())
                found = {arm: runs.summaries(options) for arm, options in some.items()}
                tables.compare(name, TITLES[name], found, out, console)
    except RuntimeError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
