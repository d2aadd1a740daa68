"""The results of `switchkd.evaluate` as a table: checkpoints by sets, Rouge-L over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

FLOORS = {"prompt_copied": "prompt copied", "another_reference": "another reference"}


def spread(values: Sequence[float]) -> dict:
    """Mean, sample deviation (None of one value), and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "seeds": list(values)}


def cell(value: dict | None) -> str:
    if value is None:
        return "-"
    deviation = "" if value["std"] is None else f" ±{value['std']:.2f}"
    return f"{value['mean']:.2f}{deviation}"


def average(values: dict[str, dict | None], sets: dict[str, dict]) -> dict | None:
    """Over the sets without a note, seed by seed; None where one is missing or they are fewer than
    two."""
    counted = [values.get(name) for name, about in sets.items() if not about["note"]]
    if len(counted) < 2 or None in counted:
        return None
    seeds = zip(*(value["seeds"] for value in counted), strict=True)
    return spread([statistics.mean(of_seed) for of_seed in seeds])


def rows_of(results: dict) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header, a row for each checkpoint, and a row for each floor, as text."""
    sets = results["sets"]
    header = ["", *(f"{n}{'*' if s['note'] else ''} ({s['rows']})" for n, s in sets.items())]

    def row(label: str, values: dict[str, dict | None]) -> list[str]:
        cells = [cell(values.get(name)) for name in sets]
        return [label, *cells, cell(average(values, sets))]

    models = [
        row(label, {name: scores["rouge_l"] for name, scores in model["sets"].items()})
        for label, model in results["models"].items()
    ]
    floors = []
    for key, label in FLOORS.items():
        found = {n: s["floors"][key] for n, s in sets.items() if key in s["floors"]}
        floors.append(row(label, {n: spread([f["rouge_l"]]) for n, f in found.items()}))
    return [*header, "average"], models, floors


def caption(results: dict) -> str:
    settings = results["settings"]
    seeds, size = len(settings["seeds"]), settings["no_repeat_ngram_size"]
    rule = f", no {size}-gram twice" if size else ""
    lines = [
        f"Rouge-L, mean and deviation over {seeds} sampling seed{'s' * (seeds > 1)}, "
        f"temperature {settings['temperature']:g}, "
        f"at most {settings['max_new_tokens']} tokens{rule}; rows in brackets"
    ]
    lines += [f"*{name}: {s['note']}" for name, s in results["sets"].items() if s["note"]]
    return "\n".join(lines)


def print_results(results: dict, console: Console) -> None:
    """Labels and names of sets as they are: in brackets, rich would take them for its markup."""
    header, models, floors = rows_of(results)
    table = Table(caption=Text(caption(results), "table.caption"))
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", min_width=None if i else 8)
    for row in models:
        table.add_row(*map(Text, row))
    table.add_section()
    for row in floors:
        table.add_row(*map(Text, row), style="dim")
    console.print(table)


def markdown(results: dict) -> str:
    """The table for a README, floors last."""
    header, models, floors = rows_of(results)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *models, *floors]
    table = "".join("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |\n" for row in lines)
    return f"{table}\n" + caption(results).replace("*", "\\*").replace("\n", "  \n") + "\n"
