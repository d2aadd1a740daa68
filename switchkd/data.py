"""Instruction data: reading, detecting the form, templating, tokenising.

Three forms are understood, by their keys:
    instruction / input / output        (Alpaca, and Dolly's instruction / context / response)
    prompt / completion                 (strings or lists of messages; completion may be absent)
    messages                            (the last assistant message is the response; no tools)
No row is dropped silently: every row that is left out is counted with its reason and line number.
Malformed rows stop the run, unless it is told to leave them out, too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch.utils.data import Dataset

from switchkd.records import EVALUATED, Unreadable, read_records
from switchkd.templates import Template

FORMS = {
    "instruction/input/output": ("instruction", "output"),
    "instruction/context/response": ("instruction", "response"),
    "messages": ("messages",),
    "prompt/completion": ("prompt",),
}
TOGETHER = 1000  # texts that are tokenised at once
READ = {"input", "context", "completion", "source", "tools"}  # with those of the form


@dataclass(frozen=True)
class Example:
    """One row as text: prompt messages (with an instruction's `input`) and references; begun: the
    last message is the response's beginning."""

    messages: tuple[Mapping[str, str], ...]
    references: tuple[str, ...]
    line: int
    source: str = ""
    begun: bool = False

    @property
    def plain(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""

        def text(message) -> str:
            return "\n\n".join(filter(None, (message["content"], message.get("input"))))

        return [{"role": message["role"], "content": text(message)} for message in self.messages]

    @property
    def question(self) -> str:
        """What the user wrote: the text that the copied-prompt floor answers with."""
        user = [m for m in self.messages if m["role"] == "user"]
        return "\n".join(part for m in user for part in (m["content"], m.get("input")) if part)


@dataclass(frozen=True)
class Row:
    """One row as token ids; `id` is its line number and keys its noise."""

    prompt_ids: list[int]
    completion_ids: list[int]
    example: Example

    @property
    def id(self) -> int:
        return self.example.line


@dataclass
class Report:
    """What was read, what was left out and why."""

    source: str
    form: str = ""
    template: str = ""
    day: str = ""  # which a template that writes the date has written
    kept: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)
    apart: list[int] = field(default_factory=list)  # of responses that no text with a prompt holds
    columns: set[str] = field(default_factory=set)
    prompts: int = 0  # without a response

    @property
    def unread(self) -> str:
        """The columns that mean nothing here, as a remark; a response may be among them."""
        names = sorted(map(str, self.columns - READ.union(FORMS.get(self.form, ()))))
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"not read: {shown}" if names else ""

    @property
    def notable(self) -> bool:
        """Whether who did not ask for it should see this."""
        return bool(self.left_out or self.apart or (self.prompts and self.unread))

    def drop(self, reason: str, line: int) -> None:
        self.left_out.setdefault(reason, []).append(line)

    def __str__(self) -> str:
        how = "; ".join(filter(None, (self.form, self.template, self.unread)))
        text = f"{self.source}: {self.kept:,} rows" + (f" ({how})" if how else "")
        if self.prompts:
            text += f"\n  {self.prompts:,} prompts without a response"
        said = [(f"left out {len(x):,} {reason}", x) for reason, x in self.left_out.items()]
        if self.apart:
            other = f"{len(self.apart):,} responses that the template writes otherwise, as they are"
            said.append((other, self.apart))
        for what, lines in said:
            shown = ", ".join(map(str, lines[:8])) + (", ..." if len(lines) > 8 else "")
            text += f"\n  {what}: line {shown}"
        return text


class Rows(Dataset):
    """Tokenised rows. The data loader hands out row numbers only; the trainer looks rows up."""

    def __init__(self, rows: Sequence[Row], report: Report):
        self.rows, self.report = list(rows), report
        most = Counter(row.id for row in self.rows).most_common(1)
        if most and most[0][1] > 1:  # a replayed text finds its prompt by the id
            raise ValueError(f"rows: got the id {most[0][0]} twice, expected another for each row")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        return index

    @cached_property
    def digest(self) -> str:
        """Changes with any token of any row, and with their order."""
        sha = hashlib.sha256()
        for row in self.rows:
            sizes = row.id, len(row.prompt_ids), len(row.completion_ids)
            sha.update(array("q", [*sizes, *row.prompt_ids, *row.completion_ids]).tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a data set, to be left out of another: each as text and as messages."""

    source: str
    known: frozenset

    def __contains__(self, keys: tuple) -> bool:
        return not self.known.isdisjoint(keys)


def read_examples(
    source: str,
    *,
    split: str | Sequence[str] = "train",
    limit: int | None = None,
    skip_malformed: bool = False,
) -> tuple[list[Example], Report]:
    """Read what `read_records` finds; of several splits the first that there is.

    Lines that are not JSON and rows of a wrong shape raise ValueError with their line numbers, or
    are counted and left out with skip_malformed; empty rows are always counted and left out.
    Raises ValueError for an empty data set.
    """
    name, records = read_records(source, (split,) if isinstance(split, str) else split)
    return examples_from(records, Report(name), limit, skip_malformed)


def examples_from(
    records: Iterable[Mapping],
    report: Report,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> tuple[list[Example], Report]:
    """Examples of records (dicts of one of the forms above); line numbers start at 1."""
    examples: list[Example] = []
    malformed: list[str] = []
    for line, record in enumerate(records, start=1):
        if record is None:
            report.drop("blank lines", line)
            continue
        try:
            form, messages, references = _parse(record)
            if report.form and form != report.form:
                raise ValueError(
                    f"got the form {form}, expected {report.form} as in the lines before"
                )
            texts = *(text for m in messages for text in m.values()), *references
            "".join(texts).encode()  # refuses half a character, with a ValueError
        except ValueError as error:
            report.drop("malformed rows", line)
            malformed.append(f"line {line}: {error}")
            continue
        report.form = form
        report.columns.update(record)
        if not messages[-1]["content"].strip():
            report.drop("rows with an empty prompt", line)
        elif references and not (references := tuple(r for r in references if r.strip())):
            report.drop("rows with an empty response", line)
        else:
            begun = form == "prompt/completion" and messages[-1]["role"] == "assistant"
            source = str(record.get("source", ""))
            examples.append(Example(messages, references, line, source, begun))
        if limit is not None and len(examples) >= limit:
            break
    if malformed and not skip_malformed:
        more = f"\n... and {len(malformed) - 5} more" if len(malformed) > 5 else ""
        raise ValueError(
            f"{report.source}: got {len(malformed)} malformed rows, expected none "
            "(skip_malformed: true leaves them out of a file)\n" + "\n".join(malformed[:5]) + more
        )
    report.kept = len(examples)
    if not examples:
        raise ValueError(f"{report.source}: got no usable rows, expected at least one\n{report}")
    return examples, report


def _parse(record: Mapping) -> tuple[str, tuple, tuple[str, ...]]:
    """(form, prompt messages, references) of one record."""
    if isinstance(record, Unreadable):
        raise ValueError(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"got {type(record).__name__}, expected a JSON object")
    if record.get("chat_template_kwargs"):
        told = record["chat_template_kwargs"]
        raise ValueError(f"chat_template_kwargs: got {told!r:.60}, expected none: an option tells")
    form = next((f for f, keys in FORMS.items() if all(k in record for k in keys)), None)
    if form is None:
        raise ValueError(f"got the keys {sorted(record)}, expected one of {list(FORMS)}")
    if form == "messages":
        *prompt, last = _messages(record, "messages")
        if last["role"] != "assistant" or not prompt:
            raise ValueError("messages: expected a prompt and a last message of the assistant")
        return form, tuple(prompt), (last["content"],)
    if form == "prompt/completion":
        prompt = record["prompt"]
        messages = _messages(record, "prompt") if isinstance(prompt, list) else _user(prompt)
        completion = record.get("completion")
        if completion is None:
            return form, messages, ()
        if isinstance(completion, list) and completion and isinstance(completion[0], Mapping):
            *before, last = _messages(record, "completion")
            if last["role"] != "assistant":
                raise ValueError("completion: expected a last message of the assistant")
            messages, completion = (*messages, *before), last["content"]
        return form, messages, _texts(completion, "completion")
    context, answer = form.split("/")[1:]
    extra = next((record[key] for key in (context, "input", "context") if record.get(key)), "")
    instruction = record["instruction"]
    for key, value in (("instruction", instruction), (context, extra)):
        if not isinstance(value, str):
            raise ValueError(f"{key}: got {type(value).__name__}, expected a string")
    if not instruction.strip():  # the whole prompt is in the other column
        instruction, extra = extra, ""
    message = {"role": "user", "content": instruction, "input": extra}
    return form, (message,), _texts(record[answer], answer)


def _user(prompt) -> tuple[Mapping[str, str], ...]:
    if not isinstance(prompt, str):
        raise ValueError(f"prompt: got {type(prompt).__name__}, expected a string or messages")
    return ({"role": "user", "content": prompt},)


def _messages(record: Mapping, key: str) -> tuple[Mapping[str, str], ...]:
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key}: expected a non-empty list of messages")
    if record.get("tools"):  # as text alone, such a row would teach something else
        raise ValueError(f"tools: got {record['tools']!r:.60}, expected messages without tools")
    for message in messages:
        for more in ("tool_calls", "reasoning_content"):
            if isinstance(message, Mapping) and message.get(more):
                raise ValueError(f"{key}: got a message with {more}, expected a text content alone")
        fields = isinstance(message, Mapping) and (message.get("role"), message.get("content"))
        if not fields or not all(isinstance(f, str) for f in fields):
            raise ValueError(f"{key}: expected messages with a role and a text content")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _texts(value, key: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key}: got {value!r:.60}, expected a string or a list of strings")
    return tuple(texts)


def tokenize(
    examples: Sequence[Example],
    report: Report,
    tokenizer,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    template: str = "auto",
    exclude: Prompts | None = None,
    day: str = "",
) -> Rows:
    """Token ids of every example that fits; the others are counted in the report.

    template: "chat" (the tokenizer's own), "alpaca", "none" (the prompt as it stands), or "auto":
    chat if the tokenizer has one, else alpaca for instructions and none for prompts. A completion
    is what follows the prompt where both are tokenised as one text, the first reference with its
    end. exclude: prompts whose rows are left out. day: the date (ISO) that a chat template writes;
    today's by default.
    """
    write = Template.of(template, report.form, tokenizer, day)
    report.template, report.day = f"{write.name} template", write.day
    rows, known = [], {}
    for example, text, prompt, (completion, joined) in _tokenized(examples, report, write):
        if exclude is not None and _keys(example, text) in exclude:
            report.drop(f"rows that are in {exclude.source}", example.line)
        elif len(prompt) > max_prompt_length:
            report.drop(f"rows with a prompt over {max_prompt_length} tokens", example.line)
        elif len(completion) > max_completion_length:
            report.drop(f"rows with a response over {max_completion_length} tokens", example.line)
        elif not prompt:
            report.drop("rows with a prompt of no token", example.line)
        else:  # one object for each id: 8 bytes a token, not 36
            prompt, completion = (
                [known.setdefault(i, i) for i in ids] for ids in (prompt, completion)
            )
            rows.append(Row(prompt, completion, example))
            report.apart += [] if joined else [example.line]
    report.kept = len(rows)
    report.prompts = sum(not row.completion_ids for row in rows)
    if not rows:
        raise ValueError(
            f"no row is left, expected at least one (max_prompt_length {max_prompt_length}, "
            f"max_new_tokens or max_response_length {max_completion_length})\n{report}"
        )
    return Rows(rows, report)


def _tokenized(examples: Sequence[Example], report: Report, write: Template) -> Iterator:
    """(example, its prompt as text and as ids, its completion as `completion_ids` makes it)."""
    for at in range(0, len(examples), TOGETHER):
        part = examples[at : at + TOGETHER]
        texts = [write.prompt_text(example, report.source) for example in part]
        rows = list(zip(part, texts, write.prompt_ids(texts), strict=True))
        answered = [row for row in rows if row[0].references]
        completions = iter(())
        if answered:
            completions = iter(write.completion_ids(*zip(*answered, strict=True)))
        for row in rows:
            yield *row, next(completions) if row[0].references else ([], True)


def read_prompts(
    source: str, tokenizer, template: str, skip_malformed: bool = False, day: str = ""
) -> Prompts:
    """The prompts of a data set, of the split to evaluate on where it has several."""
    splits = (*EVALUATED, "train")  # many a test set on the Hub has that one alone
    examples, report = read_examples(source, split=splits, skip_malformed=skip_malformed)
    write = Template.of(template, report.form, tokenizer, day)
    texts = (write.prompt_text(e, report.source) for e in examples)
    known = (key for e, text in zip(examples, texts, strict=True) for key in _keys(e, text))
    return Prompts(report.source, frozenset(known))


def rows_from(
    records: Iterable[Mapping],
    tokenizer,
    max_prompt_length: int,
    max_completion_length: int,
    day: str = "",
) -> Rows:
    """Tokenised rows of a `datasets.Dataset` or a list of dicts, or of any other data set of dicts:
    it is read to its end, so it must have one."""
    rows = hasattr(records, "__iter__") or hasattr(records, "__len__")
    if isinstance(records, (str, Mapping)) or hasattr(records, "columns") or not rows:
        raise ValueError(  # the rows of a DataFrame would be the names of its columns
            f"dataset: got {type(records).__name__}, expected a datasets.Dataset (one split; "
            "Dataset.from_pandas makes one of a DataFrame) or a list of dicts"
        )
    if hasattr(records, "__len__") and not hasattr(records, "__iter__"):
        # Python would iterate until an IndexError, which a map-style data set need not raise.
        records = map(records.__getitem__, range(len(records)))
    examples, report = examples_from(records, Report(source="dataset"))
    limits = dict(max_prompt_length=max_prompt_length, max_completion_length=max_completion_length)
    return tokenize(examples, report, tokenizer, **limits, day=day)


def _keys(example: Example, text: str) -> tuple:
    """Two prompts are the same if their texts are, after the template, or their messages."""
    return text.strip(), tuple((m["role"], m["content"].strip()) for m in example.plain)
