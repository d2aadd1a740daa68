"""`python -m switchkd.report RUN_DIR`: writes RUN_DIR/report.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from tqdm.auto import tqdm

from switchkd.report.page import render
from switchkd.report.rollouts import metric_of, read_rollouts
from switchkd.report.run import read_run
from switchkd.report.samples import choose, find_tokenizer, read_samples


def make(folder: str, output: str | None = None) -> Path:
    """Write the report of a run; returns its path. Raises ValueError for what is no run."""
    run = read_run(folder)
    path = Path(output) if output else run.folder / "report.html"
    if not path.parent.is_dir():
        raise ValueError(f"output: got {path}, expected a file in an existing folder")
    notes, rollouts, samples = [], None, ([], [])
    if run.completions is not None:
        size = run.completions.stat().st_size
        with tqdm(
            total=size, desc="rollouts", unit="B", unit_scale=True, disable=size < 2**24
        ) as bar:
            rollouts = read_rollouts(run.completions, metric_of(run), bar.update)
        if rollouts.broken:
            notes.append(f"{rollouts.broken} unreadable line(s) of completions.jsonl left out.")
    if rollouts is not None:
        tokenizer = find_tokenizer(run)
        if tokenizer is None:
            notes.append("No tokenizer was found: tokens are shown by their numbers.")
        early, late = choose(rollouts)
        samples = tuple(
            read_samples(run.completions, rollouts, part, tokenizer) for part in (early, late)
        )
    if not run.config:
        notes.append("The run left no config.yaml: its policy and options are unknown.")
    path.write_text(render(run, rollouts, samples, notes), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    console = Console()
    parser = argparse.ArgumentParser(
        prog="python -m switchkd.report",
        description="One HTML file that shows a training run, finished or not. Opens offline.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of switchkd.train")
    parser.add_argument("--output", help="file to write; default RUN_DIR/report.html")
    args = parser.parse_args(argv)
    try:
        path = make(args.run_dir, args.output)
    except (ValueError, OSError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
