"""`python -m switchkd.evaluate`: Rouge-L of sampled responses, checkpoints side by side.

Each row is answered once per seed (the papers: five seeds, temperature 1) and scored against the
best of its references. The table is that of SWITCH (arXiv 2410.19503, Table 1): checkpoints by
sets, with two answers that know nothing under them. BLEU and the split by reference length are in
the JSON file, which is written after every set: a run that was cut off goes on where it stopped.

DistiLLM's published numbers are of samples in which no six tokens come twice (no_repeat_ngram_size
6). Here nothing is forbidden: that rule lowered a teacher's Rouge-L by about 0.9.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from urllib.parse import quote

import torch
from rich.console import Console
from tqdm.auto import tqdm

from switchkd import adapters, metrics
from switchkd.checkpoint import settings_of
from switchkd.command_line import Parser
from switchkd.data import Row, read_examples, tokenize
from switchkd.devices import find_device
from switchkd.evaluate_options import SETTINGS, EvalArguments, Source, find_sets
from switchkd.evaluate_table import markdown, print_results, spread
from switchkd.models import (
    check_weights,
    cut_layers,
    hub_commit,
    load_model,
    load_tokenizer,
)
from switchkd.records import EVALUATED, UNREADABLE
from switchkd.rollout import Sampling, check_lengths
from switchkd.templates import TEMPLATES, with_kwargs
from switchkd.vocabulary import Vocabulary, share_vocabulary

CONFIGS = (  # beside the weights, and not all *.json: results may be written into the folder
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One model to evaluate, and its tokenizer."""

    label: str
    name: str
    revision: str | None
    adapter: str | None
    gguf_file: str | None
    layers: str | None
    tokenizer: object
    template: str = "auto"

    def load(self, args: EvalArguments, device: torch.device):
        """The model, ready to decode; ValueError for weights or lengths that cannot work."""
        model = load_model(
            self.name,
            dtype=args.dtype,
            gguf_file=self.gguf_file,
            revision=self.revision or "main",
            trust_remote_code=args.trust_remote_code,
        )
        if self.layers is not None:
            cut_layers(model, self.layers)
        if self.adapter is not None:
            model = adapters.load(model, self.adapter)
        check_weights(model, self.label)
        check_lengths(model, [[0] * args.max_prompt_length], args.max_new_tokens)
        return model.to(device).eval()

    def _how(self, dtype: str) -> tuple:
        """How the model is loaded, and the size and time of its weights."""
        stats = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for folder in filter(None, (self.name, self.adapter))
            for pattern in ("*.safetensors", "*.gguf")
            for file in sorted(Path(folder).glob(pattern))
        ]
        return (self.name, self.adapter, self.gguf_file, self.layers, dtype, stats)

    def fingerprint(self, dtype: str) -> str:
        """Changes with the model: all sets of a label must be scored by one. A model's settings
        count, too, by what they say; of the Hub's models there is the commit."""
        folders = [Path(folder) for folder in filter(None, (self.name, self.adapter))]
        files = [folder / name for folder in folders for name in CONFIGS]
        said = [(file.name, file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        files = self.gguf_file, *CONFIGS
        commit = None if folders[0].is_dir() else hub_commit(self.name, files, self.revision)
        return _digest([self._how(dtype), said, commit])

    def set_fingerprint(self, rows: Sequence[Row], dtype: str) -> str:
        """Changes with anything that the responses depend on beside SETTINGS: the rows as this
        model reads them, and the model."""
        read = [(row.id, row.prompt_ids, row.example.references) for row in rows]
        return _digest([self._how(dtype), read])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def load_checkpoints(args: EvalArguments) -> list[Checkpoint]:
    names = map(adapters.find, args.model_name_or_path, args.adapter)
    options = args.model_revision, args.gguf_file, args.student_layers
    found = []
    for label, (name, adapter), revision, gguf, layers in zip(
        args.labels, names, *options, strict=True
    ):
        run = settings_of(adapter or name)
        if adapter is not None and run.get("model_name_or_path") == name:
            gguf = gguf or run.get("gguf_file")  # the base is what the run has begun with
            revision = revision or run.get("model_revision")
        tokenizer = load_tokenizer(
            name, gguf_file=gguf, revision=revision or "main",
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        told = args.chat_template_kwargs or run.get("chat_template_kwargs")
        template = run.get("template") if args.template == "auto" else args.template
        template = template if template in TEMPLATES else "auto"
        place = label, name, revision, adapter, gguf, layers
        found.append(Checkpoint(*place, with_kwargs(tokenizer, told), template))
    return found


# ------------------------------------------------------------------------------- rows


def read_set(
    source: Source,
    checkpoints: Sequence[Checkpoint],
    args: EvalArguments,
    console: Console,
    day: str = "",
) -> list[list[Row]]:
    """The rows with a reference as each checkpoint reads them: those that are short enough for all,
    or scores could not be compared. day: see `data.tokenize`."""
    limit = min((n for n in (source.first, args.limit) if n is not None), default=None)
    examples, report = read_examples(
        source.files[0],
        split=args.split or EVALUATED,
        limit=limit,
        skip_malformed=args.skip_malformed,
    )
    examples = [e for e in examples if e.references]
    if not examples:
        raise ValueError(f"{report.source}: got no row with a reference, expected some\n{report}")
    read, said = [], set()
    for checkpoint in checkpoints:
        mine = copy.deepcopy(report)
        rows = tokenize(
            examples,
            mine,
            checkpoint.tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=sys.maxsize,  # references are only compared with, never fed
            template=checkpoint.template,
            day=day,
        ).rows
        said.add(mine.template)
        if not read or len(rows) != len(read[0]) or len(said) > 1:
            console.print(f"{checkpoint.label}, {mine}", markup=False, highlight=False)
        read.append(rows)
    fit = set.intersection(*({row.id for row in rows} for rows in read))
    if not fit:
        raise ValueError(f"{report.source}: got no row that is short enough for every model")
    return [[row for row in rows if row.id in fit] for rows in read]


# ------------------------------------------------------------------------------- scores


def evaluate_set(
    model,
    rows: Sequence[Row],
    tokenizer,
    vocabulary: Vocabulary,
    args: EvalArguments,
    name: str = "",
    engine=None,
) -> tuple[dict, list[list[str]]]:
    """Scores of one set, for each metric its mean and deviation over the seeds, and each seed's;
    and the responses of each seed."""
    references = [row.example.references for row in rows]
    drawn = {"student_temperature": args.temperature, "no_repeat_ngram": args.no_repeat_ngram_size}
    responses = []
    with tqdm(total=len(rows) * len(args.seeds), desc=name, unit="row") as bar:
        for seed in args.seeds:
            done = bar.n
            texts = metrics.generate(
                model,
                rows,
                tokenizer,
                vocabulary,
                Sampling(seed=seed, **drawn),
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                engine=engine,
                on_step=lambda _, left, done=done: bar.update(done + len(rows) - left - bar.n),
            )
            responses.append(texts)
    runs = [metrics.score(texts, references) for texts in responses]
    return {metric: spread([run[metric] for run in runs]) for metric in runs[0]}, responses


def write_responses(folder: str, label: str, name: str, rows, seeds, responses) -> None:
    lines = []
    for seed, texts in zip(seeds, responses, strict=True):
        for row, text in zip(rows, texts, strict=True):
            references = row.example.references
            record = {"row": row.id, "seed": seed, "prompt": row.example.question,
                      "response": text, "references": references,
                      "rouge_l": metrics.rouge_l(text, references)}  # fmt: skip
            lines.append(json.dumps(record) + "\n")
    write(responses_file(folder, label, name), "".join(lines))  # what is there counts as complete


def responses_file(folder: str, label: str, name: str) -> Path:
    label, name = (quote(x, safe=" ").replace("..", "%2E%2E") for x in (label, name))
    return Path(folder) / label / f"{name}.jsonl"


# ------------------------------------------------------------------------------- results


def begin(args: EvalArguments) -> dict:
    """The results so far, with the day that their prompts may tell; ValueError if those in the file
    were made with other settings."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    path, day = Path(args.json), date.today().isoformat()
    if args.overwrite or not path.exists():
        return {"settings": settings, "day": day, "sets": {}, "models": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        day = results.get("day", day)
        results = {key: results[key] for key in ("settings", "sets", "models")}
        added = {"no_repeat_ngram_size": 0, "chat_template_kwargs": None}  # since there are files
        before = added | results["settings"]
        before = {name: before[name] for name in SETTINGS}
    except (*UNREADABLE, KeyError, TypeError):
        raise ValueError(f"json: {path} holds something else; expected a new file") from None
    for name, value in settings.items():
        if before[name] != value:
            raise ValueError(
                f"json: {path} holds results with {name} {before[name]}, got {value}; expected "
                "equal settings, another file, or --overwrite true"
            )
    return results | {"settings": settings, "day": day}


def write(path: str | Path, text: str) -> None:
    """Whole or not at all."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def note_set(results: dict, name: str, source: Source, rows: Sequence[Row]) -> None:
    """Describe a set in the results; scores on other rows than these are dropped."""
    content = _digest([(row.id, row.example.question, row.example.references) for row in rows])
    if results["sets"].get(name, {}).get("content") == content:
        return
    for model in results["models"].values():
        model["sets"].pop(name, None)
    results["sets"][name] = {
        "source": Path(source.files[0]).name,
        "rows": len(rows),
        "note": source.note,
        "content": content,
        "floors": metrics.floors(rows),
    }


def take_up(
    checkpoint: Checkpoint,
    keys: dict[str, str],
    results: dict,
    args: EvalArguments,
    console: Console,
) -> dict:
    """What the results hold of a label. If another model has made it, nothing: an average would be
    over both. `keys`: the fingerprint of each set that is asked for."""
    label, name = checkpoint.label, checkpoint.adapter or checkpoint.name
    mine = {"sets": {}, "model": name} | results["models"].get(label, {})
    fingerprint, sets = checkpoint.fingerprint(args.dtype), mine["sets"]
    if "fingerprint" in mine:
        same = mine["fingerprint"] == fingerprint
    else:  # a file of before there was one: by name, and by the sets asked for that it has
        known = keys.keys() & sets.keys()
        same = mine["model"] == name and all(sets[n]["fingerprint"] == keys[n] for n in known)
    if sets and not same:
        was = f" ({mine['model']})" if mine["model"] != name else ""
        console.print(
            f"{label}: {args.json} holds scores of another model{was} for {', '.join(sets)}; "
            "they are dropped",
            markup=False,
            highlight=False,
        )
        sets = {}
    results["models"][label] = {"sets": sets, "model": name, "fingerprint": fingerprint}
    return results["models"][label]


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    sets: dict[str, list[Row]],
    results: dict,
    args: EvalArguments,
    device: torch.device,
    console: Console,
) -> None:
    """Fill in what `results` lacks of one model, set by set, and write it down."""
    label, folder, model = checkpoint.label, args.save_responses, None
    keys = {name: checkpoint.set_fingerprint(rows, args.dtype) for name, rows in sets.items()}
    mine = take_up(checkpoint, keys, results, args, console)
    for name, rows in sets.items():
        complete = folder is None or responses_file(folder, label, name).exists()
        if complete and mine["sets"].get(name, {}).get("fingerprint") == keys[name]:
            taken = f"{label}, {name}: taken from {args.json}"
            console.print(taken, markup=False, highlight=False)
            continue
        if model is None:
            model = checkpoint.load(args, device)
            vocabulary = share_vocabulary(None, model, None, checkpoint.tokenizer)
            engine = metrics.engine_for(model)
        scores, responses = evaluate_set(
            model, rows, checkpoint.tokenizer, vocabulary, args, f"{label}, {name}", engine
        )
        if folder is not None:
            write_responses(folder, label, name, rows, args.seeds, responses)
        mine["sets"][name] = {"fingerprint": keys[name], **scores}
        write(args.json, json.dumps(results, indent=1) + "\n")


def run(args: EvalArguments, console: Console) -> dict:
    """All models on all sets; returns the results, which the JSON file holds, too."""
    device, results, sets = find_device(args.device), begin(args), find_sets(args)
    checkpoints = load_checkpoints(args)
    read = {}
    for name, source in sets.items():  # all data first: a bad file should not cost an hour
        read[name] = read_set(source, checkpoints, args, console, results["day"])
        note_set(results, name, source, read[name][0])
    for i, checkpoint in enumerate(checkpoints):
        mine = {name: rows[i] for name, rows in read.items()}
        evaluate_checkpoint(checkpoint, mine, results, args, device, console)
    print_results(results, console)
    if args.markdown is not None:
        write(args.markdown, markdown(results))
    return results


def main(argv: list[str] | None = None) -> int:
    console, argv = Console(emoji=False), sys.argv[1:] if argv is None else argv
    parser = Parser(EvalArguments, prog="python -m switchkd.evaluate", allow_abbrev=False)
    path = None
    try:
        parser.flags(argv)
        (args,) = parser.parse_args_into_dataclasses(argv)
        path = args.json
        run(args, console)
    except (ValueError, OSError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        said = f"stopped; finished sets are in {path}: the same command goes on"
        console.print(said, markup=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
