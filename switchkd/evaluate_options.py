"""The options of `switchkd.evaluate`, and the sets that they name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from switchkd.arguments import DTYPES, expect, option, read_mapping
from switchkd.names import EMBEDDED
from switchkd.records import EVALUATED
from switchkd.templates import TEMPLATES


@dataclass(frozen=True)
class Source:
    """A set: the file names it goes by in data_dir, or where it is; how many of its rows count; and
    what sets it apart, which keeps it out of the average."""

    files: tuple[str, ...]
    first: int | None = None
    note: str = ""


# The sets of SWITCH (arXiv 2410.19503, Table 1). Of SelfInst's 252 rows MiniLLM and its followers
# evaluate the first 242; of S-NI and UnNI those with a response of 11 tokens or more, which the
# files are taken to hold.
PAPER_SETS = {
    "Dolly": Source(("dolly/test.jsonl", "dolly.jsonl")),
    "SelfInst": Source(("self_inst.jsonl",), first=242),
    "Vicuna": Source(("vicuna.jsonl",)),
    "S-NI": Source(("super_ni.jsonl",)),
    "UnNI": Source(("unnatural.jsonl",)),
    "UnNI short": Source(
        ("unnatural_short.jsonl",), note="answers of a word or two, not the rows of the papers"
    ),
}


@dataclass
class EvalArguments:
    """What to evaluate, on what, and how. Options of a model take one value for each, or one for
    all; `none` where a model has none."""

    model_name_or_path: list[str] = option(
        "Hub ids, folders (a run's output_dir), or 'embedded'.", [EMBEDDED]
    )
    model_revision: list[str] = option("Revisions on the Hub; an adapter knows its base's.", [])
    labels: list[str] = option("What the models are called in the table.", [])
    adapter: list[str] = option("LoRA adapters; one in a run's output_dir is found by itself.", [])
    gguf_file: list[str] = option("Read a model from this GGUF file in its folder.", [])
    student_layers: list[str] = option("Keep only these layers: a student before distillation.", [])
    dtype: str = option("Type of the weights.", "auto")
    device: str | None = option("Where to decode; default: a GPU if there is one.")
    trust_remote_code: bool = option("Allow code from the Hub.", False)
    data_dir: str | None = option(
        "Folder with the paper's sets: " + ", ".join(s.files[0] for s in PAPER_SETS.values())
    )
    data: list[str] = option("More sets, each FILE.jsonl or a Hub id, or NAME= and one.", [])
    seeds: list[int] = option("Sampling seeds.", [10, 20, 30, 40, 50])
    temperature: float = option("Sampling temperature.", 1.0)
    no_repeat_ngram_size: int = option(
        "No n-gram of so many tokens twice, prompt included (0: off; DistiLLM evaluates with 6).", 0
    )
    split: str | None = option(
        f"Split of Hub data; by default the first that there is of {', '.join(EVALUATED)}."
    )
    limit: int | None = option("At most so many rows of each set.")
    skip_malformed: bool = option("Leave malformed rows out instead of stopping.", False)
    batch_size: int = option("Rows decoded together.", 32)
    max_new_tokens: int = option("Response tokens at most.", 256)
    max_prompt_length: int = option("Prompt tokens at most; longer rows are left out.", 256)
    template: str = option(f"One of {', '.join(TEMPLATES)}; auto: as in a model's run.", "auto")
    chat_template_kwargs: str | None = option(
        'What chat templates are told: {"enable_thinking": false}. Default: as in a model\'s run.'
    )
    json: str = option("Results, kept from run to run.", "switchkd_evaluation.json")
    markdown: str | None = option("Write the table to this Markdown file, too.")
    save_responses: str | None = option("Write every response to this folder.")
    overwrite: bool = option("Forget the results that are in the JSON file.", False)

    def __post_init__(self):
        need = partial(expect, self)
        models = self.model_name_or_path
        need("model_name_or_path", bool(models), "at least one model")
        self.labels = self.labels or list(models)
        need("labels", len(self.labels) == len(models), f"one for each of {len(models)} models")
        distinct = len(set(self.labels)) == len(models)
        need("labels", distinct, "a name of its own for each model (--labels)")
        for name in ("model_revision", "adapter", "gguf_file", "student_layers"):
            given = getattr(self, name)
            need(name, len(given) in (0, 1, len(models)), f"one, or one for each of {models}")
            values = (given or ["none"]) * (1 if len(given) == len(models) else len(models))
            setattr(self, name, [None if v == "none" else v for v in values])
        self.dtype = DTYPES.get(self.dtype, self.dtype)
        dtypes = "auto", *DTYPES.values()
        need("dtype", self.dtype in dtypes, f"one of {', '.join(dtypes)}")
        need("seeds", len(set(self.seeds)) == len(self.seeds) > 0, "at least one, none twice")
        for name in ("batch_size", "max_new_tokens", "max_prompt_length", "limit"):
            value = getattr(self, name)
            need(name, value is None or value >= 1, "an integer >= 1")
        need("temperature", self.temperature >= 0, "a number >= 0")
        need("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "an integer >= 0")
        need("template", self.template in TEMPLATES, f"one of {', '.join(TEMPLATES)}")
        read_mapping(self, "chat_template_kwargs")


SETTINGS = (
    "seeds",
    "temperature",
    "no_repeat_ngram_size",
    "limit",
    "max_new_tokens",
    "max_prompt_length",
    "template",
    "chat_template_kwargs",
)


def find_sets(args: EvalArguments) -> dict[str, Source]:
    """Every set asked for, by name; raises ValueError if there is none."""
    sets = {}
    if args.data_dir is not None:
        folder = Path(args.data_dir)
        if not folder.is_dir():
            raise ValueError(f"data_dir: got {folder}, expected an existing folder")
        for name, known in PAPER_SETS.items():
            here = [str(folder / f) for f in known.files if (folder / f).is_file()]
            if here:
                sets[name] = Source((here[0],), known.first, known.note)
        if not sets and not args.data:
            files = [file for known in PAPER_SETS.values() for file in known.files]
            raise ValueError(f"data_dir: {folder} has none of {files}")
    for item in args.data:
        name, source = _split(item)
        name = name or Path(source).stem
        if name in sets:
            raise ValueError(f"data: got two sets {name}, expected a name for each (NAME={source})")
        sets[name] = Source((source,))
    return sets or {"embedded": Source((EMBEDDED,))}


def _split(item: str) -> tuple[str, str]:
    """(name or nothing, source): at the first = behind which is a file or folder, which may be
    called year=2024; else at the last."""
    parts = item.split("=")
    for at in range(len(parts)):
        name, source = "=".join(parts[:at]), "=".join(parts[at:])
        if Path(source).exists():
            break
    return name, source
