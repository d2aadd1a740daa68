"""`python -m switchkd.evaluate`: Rouge-L and BLEU of sampled responses, with their floors.

Responses are sampled once per seed (the papers: five seeds, temperature 1) and scored against the
best of a row's references. Beside each score stand two answers that know nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from switchkd import adapters, metrics
from switchkd.config import option
from switchkd.data import Row, read_examples, tokenize
from switchkd.models import (
    EMBEDDED,
    Vocabulary,
    check_weights,
    cut_layers,
    load_model,
    load_tokenizer,
    share_vocabulary,
)
from switchkd.rollout import Sampling, check_lengths

# The five sets of SWITCH (arXiv 2410.19503, Table 1), by the file that holds them in data_dir.
PAPER_SETS = {
    "Dolly": "dolly/test.jsonl",
    "SelfInst": "self_inst.jsonl",
    "Vicuna": "vicuna.jsonl",
    "S-NI": "super_ni.jsonl",
    "UnNI": "unnatural.jsonl",
}


@dataclass
class EvalArguments:
    """What to evaluate, on what, and how."""

    model_name_or_path: str = option(
        "Hub id, folder (a run's output_dir), or 'embedded'.", EMBEDDED
    )
    adapter: str | None = option("LoRA adapter for it; found by itself in a run's output_dir.")
    gguf_file: str | None = option("Read the model from this GGUF file in its folder.")
    student_layers: str | None = option("Keep only these layers: the student before distillation.")
    dtype: str = option("Type of the weights.", "auto")
    trust_remote_code: bool = option("Allow code from the Hub.", False)
    data_dir: str | None = option("Folder with the paper's sets: " + ", ".join(PAPER_SETS.values()))
    data: list[str] = option("More sets, each NAME=FILE.jsonl or a Hub id.", [])
    seeds: list[int] = option("Sampling seeds.", [10, 20, 30, 40, 50])
    temperature: float = option("Sampling temperature.", 1.0)
    limit: int | None = option("At most so many rows of each set.")
    batch_size: int = option("Rows decoded together.", 32)
    max_new_tokens: int = option("Response tokens at most.", 256)
    max_prompt_length: int = option("Prompt tokens at most; longer rows are left out.", 256)
    template: str = option("auto, chat, alpaca or none.", "auto")
    output: str | None = option("Write the results to this JSON file.")

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("seeds: got none, expected at least one")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected an integer >= 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, expected an integer >= 1")


def find_sets(args: EvalArguments) -> dict[str, str]:
    """Name -> source of every set asked for; raises ValueError if there is none."""
    sets = {}
    if args.data_dir is not None:
        folder = Path(args.data_dir)
        if not folder.is_dir():
            raise ValueError(f"data_dir: got {folder}, expected an existing folder")
        sets = {n: str(folder / f) for n, f in PAPER_SETS.items() if (folder / f).is_file()}
        if not sets and not args.data:
            raise ValueError(f"data_dir: {folder} has none of {list(PAPER_SETS.values())}")
    for item in args.data:
        name, _, source = item.rpartition("=")
        sets[name or Path(source).stem] = source
    return sets or {"embedded": EMBEDDED}


def evaluate_set(
    model,
    rows: Sequence[Row],
    tokenizer,
    vocabulary: Vocabulary,
    args: EvalArguments,
    name: str = "",
) -> dict:
    """Scores of one set: for each metric its mean and deviation over the seeds, and each seed's."""
    references = [row.example.references for row in rows]
    runs = []
    steps = args.max_new_tokens * -(-len(rows) // args.batch_size)  # an upper bound per seed
    for number, seed in enumerate(args.seeds, start=1):
        with tqdm(total=steps, desc=f"{name}, seed {number}/{len(args.seeds)}", unit="tok") as bar:
            texts = metrics.generate(
                model,
                rows,
                tokenizer,
                vocabulary,
                Sampling(seed=seed, student_temperature=args.temperature),
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                on_step=lambda _t, _running, bar=bar: bar.update(),
            )
        runs.append(metrics.score(texts, references))
    result: dict = {"rows": len(rows)}
    for metric in runs[0]:
        values = [run[metric] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        result[metric] = {"mean": statistics.mean(values), "std": deviation, "seeds": values}
    result["floors"] = metrics.floors(rows)
    return result


FLOORS = {"prompt_copied": "  copied", "another_reference": "  other"}


def print_results(results: dict, console: Console) -> None:
    table = Table(
        title=f"{results['model']}: Rouge-L and BLEU, {len(results['seeds'])} seeds",
        caption="floors: the prompt copied, and another row's reference",
    )
    table.add_column("set")  # narrow terminals wrap the names, not the numbers
    table.add_column("rows", justify="right", no_wrap=True)
    for column in ("Rouge-L", "1-10 words", "11+ words", "BLEU"):
        table.add_column(column, justify="right", no_wrap=True, min_width=12)
    columns = ("rouge_l", "rouge_l_1_to_10_words", "rouge_l_11_words_up", "bleu")

    def cell(values: dict, metric: str) -> str:
        value = values.get(metric)
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.2f}"
        spread = "" if value["std"] is None else f" ± {value['std']:.2f}"
        return f"{value['mean']:.2f}{spread}"

    for name, scores in results["sets"].items():
        table.add_row(name, str(scores["rows"]), *(cell(scores, m) for m in columns))
        for floor, values in scores["floors"].items():
            table.add_row(FLOORS[floor], "", *(cell(values, m) for m in columns), style="dim")
    console.print(table)


def run(args: EvalArguments, console: Console) -> dict:
    sets = find_sets(args)
    options = {"trust_remote_code": args.trust_remote_code, "gguf_file": args.gguf_file}
    base, adapter = adapters.find(args.model_name_or_path, args.adapter)
    tokenizer = load_tokenizer(base, **options)
    read = {}
    for name, source in sets.items():  # all data first: a bad file should not cost an hour
        examples, report = read_examples(source, split="valid", limit=args.limit)
        examples = [e for e in examples if e.references]
        if not examples:
            raise ValueError(f"{report.source}: got no row with a reference")
        rows = tokenize(
            examples,
            report,
            tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=sys.maxsize,  # references are only compared with, never fed
            template=args.template,
        )
        console.print(str(report), markup=False, highlight=False)
        read[name] = rows.rows
    model = load_model(base, dtype=args.dtype, **options)
    if args.student_layers is not None:
        cut_layers(model, args.student_layers)
    if adapter is not None:
        model = adapters.load(model, adapter)
    check_weights(model, "model")
    check_lengths(model, [[0] * args.max_prompt_length], args.max_new_tokens)
    vocabulary = share_vocabulary(None, model, None, tokenizer)
    results = {
        "model": args.adapter or args.model_name_or_path,
        "temperature": args.temperature,
        "seeds": args.seeds,
        "sets": {},
    }
    for name, rows in read.items():
        results["sets"][name] = evaluate_set(model, rows, tokenizer, vocabulary, args, name)
        if args.output is not None:  # after each set, so that Ctrl-C keeps what is done
            path = Path(args.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_results(results, console)
    return results


def main(argv: list[str] | None = None) -> int:
    console = Console()
    parser = HfArgumentParser(EvalArguments, prog="python -m switchkd.evaluate", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
        run(args, console)
    except (ValueError, OSError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped" + (f"; finished sets are in {args.output}" if args.output else ""))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
