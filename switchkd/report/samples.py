"""Some completions to look at: which ones, and the text of each of their tokens."""

from __future__ import annotations

import contextlib
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchkd.checkpoint import checkpoints
from switchkd.report.rollouts import Metric, Rollouts
from switchkd.report.run import Run

MOST_TOKENS = 512  # of one completion, and ...
MOST_PROMPT = 1500  # ... characters of its prompt that are shown
HALF = "◌"  # stands for a token that is part of a character


@dataclass(frozen=True)
class Token:
    text: str
    teacher: bool
    shade: int | None  # how far into Metric.shades; None: not compared
    about: str


@dataclass(frozen=True)
class Sample:
    step: int
    row: int
    prompt: str
    tokens: list[Token]
    length: int
    share: float


def choose(rollouts: Rollouts, most: int = 10) -> tuple[list[int], list[int]]:
    """Numbers of at most `most` completions of the first third of training and of the last.

    Rows that were written in both come first, so that the same prompt can be compared. The second
    list is empty if all completions are of one step.
    """
    steps, rows = np.asarray(rollouts.steps), np.asarray(rollouts.rows)
    if not len(steps):
        return [], []
    first, last = int(steps.min()), int(steps.max())
    if first == last:
        return _spread(np.arange(len(steps)), most), []
    third = (last - first) / 3
    early, late = np.nonzero(steps <= first + third)[0], np.nonzero(steps >= last - third)[0]
    both = _spread(np.intersect1d(rows[early], rows[late]), most)
    pairs = [(int(early[rows[early] == row][0]), int(late[rows[late] == row][-1])) for row in both]
    chosen = []
    for side, pool in enumerate((early, late)):
        taken = [pair[side] for pair in pairs]
        others = pool[~np.isin(rows[pool], both)]
        taken += _spread(others, most - len(taken))
        chosen.append(sorted(taken, key=lambda i: (steps[i], i)))
    return chosen[0], chosen[1]


def _spread(values: np.ndarray, most: int) -> list[int]:
    """At most so many of the values, evenly over them, the first and the last among them."""
    if len(values) > most:
        values = values[np.linspace(0, len(values) - 1, most).round().astype(int)]
    return [int(v) for v in values]


def find_tokenizer(run: Run):
    """The tokenizer that the run saved, or that of its student if it is on this machine, or None.

    Never runs code of the run's folder and never asks the network.
    """
    from switchkd.models import load_tokenizer  # imports transformers

    name, gguf = run.config.get("model_name_or_path"), run.config.get("gguf_file")
    saved = [
        p for p in (run.folder, *checkpoints(run.folder)) if (p / "tokenizer_config.json").exists()
    ]
    options = {"trust_remote_code": False, "local_files_only": True}
    for source in saved:
        with contextlib.suppress(ValueError):
            return load_tokenizer(str(source), **options)
    with contextlib.suppress(ValueError):
        return None if name is None else load_tokenizer(name, gguf_file=gguf, **options)
    return None


def pieces(tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds, in its context; HALF for one that completes no character.

    Decoding a token alone loses the space before it (SentencePiece) and halves of characters
    (byte-level), so each is decoded after the piece before it and the difference is taken. A
    character has at most four tokens: what is still broken then stays U+FFFD.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in tokens]

    def decode(start: int, stop: int) -> str:
        part = list(tokens[start:stop])
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    texts, context, done = [], 0, 0
    for i in range(len(tokens)):
        text = decode(context, i + 1)[len(decode(context, done)) :]
        waiting = i + 1 - done < 4 and i + 1 < len(tokens)
        if text.endswith("\ufffd") and waiting:
            texts.append(HALF)
            continue
        texts.append(text)
        context, done = done, i + 1
    return texts


def visible(text: str) -> str:
    """Text whose control characters can be seen and do nothing; a line break stays one."""
    return "".join(c if c.isprintable() or c == "\n" else _picture(c) for c in text)


def _picture(c: str) -> str:
    code, kind = ord(c), unicodedata.category(c)
    if kind == "Zs":
        return c
    if code < 32:
        return chr(0x2400 + code)  # the control pictures
    return f"⟨U+{code:04X}⟩"


def _percent(logprob: float | None) -> str:
    return "-" if logprob is None else f"{100 * math.exp(logprob):.3g} %"


def _token(record: dict, i: int, text: str, metric: Metric) -> Token:
    teacher, value = bool(record["from_teacher"][i]), record["divergence"][i]
    tau, at = record["threshold"][i], f"token {i}, id {record['tokens'][i]}"
    p, q = (_percent(record[f"{side}_logprob"][i]) for side in ("teacher", "student"))
    lines = [
        f"{visible(text)!s}".replace("\n", "↵"),
        f"{at}: written by the {'teacher' if teacher else 'student'}",
        f"p {p} (teacher), q {q} (student)",
    ]
    if value is None:
        lines.append("models not compared here")
        return Token(text, teacher, None, "\n".join(lines))
    value += metric.offset
    lines.append(f"{metric.name} {metric.text(value)}")
    if tau is not None:
        lines[-1] += f", {metric.threshold} {metric.text(tau + metric.offset)}"
    shade = int(np.searchsorted(metric.shades, value, "right"))
    return Token(text, teacher, shade, "\n".join(lines))


def read_samples(path: Path, rollouts: Rollouts, numbers: Sequence[int], tokenizer) -> list[Sample]:
    """The completions of these numbers, with at most MOST_TOKENS tokens of each."""
    samples = []
    with path.open("rb") as file:
        for number in numbers:
            file.seek(rollouts.offsets[number])
            record = json.loads(file.readline())
            tokens = record["tokens"]
            texts = pieces(tokenizer, tokens[:MOST_TOKENS])
            samples.append(
                Sample(
                    record["step"],
                    record["row"],
                    str(record.get("prompt", ""))[-MOST_PROMPT:],
                    [_token(record, i, text, rollouts.metric) for i, text in enumerate(texts)],
                    len(tokens),
                    sum(record["from_teacher"]) / max(1, len(tokens)),
                )
            )
    return samples
