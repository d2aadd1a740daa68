"""Runs written by hand, and a reader of the page that is made of them."""

import json
import math
import re
from html.parser import HTMLParser

import yaml


class Page(HTMLParser):
    """What a browser would make of the file: tags, their attributes, scripts and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self._inside.append(tag)
        if tag in ("td", "th", "dd", "br", "p", "h3"):
            self.text.append(" ")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        inside = self._inside[-1] if self._inside else None
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text.append(data)

    def all(self, tag, css=""):
        wanted = set(css.split())
        return [
            a for t, a in self.tags if t == tag and wanted <= set((a.get("class") or "").split())
        ]

    def body(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def record(step, row, teacher, divergence, threshold, *, text="ab", **changes):
    """A line of completions.jsonl; the tokens are bytes of the text."""
    n = len(teacher)
    logprobs = {f"{side}_logprob": [math.log(0.25)] * n for side in ("teacher", "student")}
    values = {"step": step, "row": row, "prompt": "Say: ", "completion": text}
    values |= {"tokens": [5] * n, "from_teacher": teacher, "divergence": divergence}
    return {**values, "threshold": threshold, **logprobs, **changes}


def write_run(folder, records, *, log=(), summary=None, **config):
    folder.mkdir(exist_ok=True)
    config = {"rollout_policy": "switch", "gradient_accumulation_steps": 2, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "completions.jsonl").write_text(lines)
    state = {"global_step": 4, "max_steps": 8, "log_history": list(log)}
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    tokens = [len(r["tokens"]) for r in records if "tokens" in r]
    totals = {"tokens": sum(tokens), "rollout_seconds": 4.0 if tokens else 0.0, "seconds": 20.0}
    before = {"cross_entropy": 5.0, "kl": 3.0, "jsd": 0.5, "rouge_l": 7.0}
    (checkpoint / "run_state.json").write_text(json.dumps({"totals": totals, "before": before}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


SWITCHED = [
    record(1, 0, [0, 1, 1], [0.5, 0.75, 1e-8], [1.0, 0.5, 0.25]),
    record(4, 0, [0, 0, 1, 0], [0.5, 0.25, 1.0, None], [1.0, 0.5, 0.25, 0.125]),
]
LOG = [
    {"step": 2, "loss": 1.5, "time/forward": 0.5, "rollout/divergence": 0.4, "time/rollout": 1.0},
    {"step": 2, "eval_kl": 2.0, "eval_rouge_l": 8.0, "eval_seconds": 3.0},
    {"step": 4, "loss": float("nan"), "time/forward": 1.0, "grad_norm": 1.0},
    {"step": 4, "eval_kl": 1.0, "eval_rouge_l": 9.0, "eval_seconds": 1.0},
]


def ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
