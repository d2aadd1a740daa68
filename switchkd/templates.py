"""Prompts and responses as text and as tokens, by the tokenizer's chat template or another."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial

from jinja2 import TemplateError

TEMPLATES = ("auto", "chat", "alpaca", "none")
# The template of MiniLLM and SWITCH (arXiv 2410.19503, Fig. 4), for tokenizers without their own.
_HEADER = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"  # noqa: E501
MARK = "\ue000"  # stands for a response, to see what a template writes around it
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
TOLD = re.compile(r"^(?:\{% set (\w+) = \1 if \1 is defined else .* %\}\n)+")  # by with_kwargs
_PAIRED = ", paired with an input that provides further context"


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca-style prompt, up to and including the line that the response follows."""
    header = _HEADER.format(_PAIRED if input else "")
    context = f"### Input:\n{input}\n\n" if input else ""
    return f"{header}### Instruction:\n{instruction}\n\n{context}### Response:\n"


def with_kwargs(tokenizer, kwargs: Mapping | None):
    """The tokenizer with a chat template that knows these values, unless it is handed others: what
    is saved with a student writes prompts as its training did.

    Returns a copy. Raises ValueError for names that the template does not use.
    """
    if not kwargs:
        return tokenizer
    template = tokenizer.chat_template
    if not isinstance(template, str):
        has = "several" if template else "no"
        raise ValueError(
            f"chat_template_kwargs: got {kwargs}, but the tokenizer has {has} chat templates"
        )
    values = ""
    for name, value in kwargs.items():
        if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"chat_template_kwargs: got {name}, expected a name that the chat template takes"
            )
        # On a line of its own, of which transformers' Jinja leaves nothing.
        values += f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
    if template.startswith(values):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = values + template
    return tokenizer


def same_template(one, other) -> bool:
    """Whether two tokenizers have one chat template, apart from values that `with_kwargs` told."""
    bare = (TOLD.sub("", str(tokenizer.chat_template)) for tokenizer in (one, other))
    return len({*bare}) == 1


def _literal(value) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        pairs = (f"{_literal(str(key))}: {_literal(inner)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Template:
    """How a tokenizer's prompts and responses are written: as `name` of TEMPLATES says, and on
    `day` (ISO), for chat templates that write the date: rows must not change overnight."""

    tokenizer: object
    name: str = "chat"
    day: str = ""

    @classmethod
    def of(cls, name: str, form: str, tokenizer, day: str = "") -> Template:
        """The template of rows of this form; of today, if no day is given."""
        if name not in TEMPLATES:
            raise ValueError(f"template: got {name!r}, expected one of {', '.join(TEMPLATES)}")
        if name == "chat" and not tokenizer.chat_template:
            raise ValueError("template: got 'chat', but the tokenizer has no chat template")
        # Without a template it would get Alpaca's, and has a format of its own.
        if name == "auto" and type(tokenizer).__name__ == "MistralCommonBackend":
            raise ValueError(
                "template: got 'auto' with a tokenizer of mistral-common, whose chats are no "
                "template; expected alpaca or none, or no package mistral-common, without which "
                "the tokenizer of transformers is loaded (in Python: mistral_format=False)"
            )
        if name == "auto":
            plain = "none" if form == "prompt/completion" else "alpaca"
            name = "chat" if tokenizer.chat_template else plain
        return cls(tokenizer, name, day or date.today().isoformat())

    def prompt_text(self, example, source: str) -> str:
        messages, where = example.messages, f"{source}, line {example.line}"
        if self.name == "chat":
            how = {"continue_final_message" if example.begun else "add_generation_prompt": True}
            try:
                return self._rendered(example.plain, **how)
            except (TemplateError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: the tokenizer's chat template says: {error}") from None
        if len(messages) > 1:
            has = "the tokenizer has no chat template"
            if self.tokenizer.chat_template:
                has = f"the template {self.name} has no way"
            raise ValueError(
                f"{where}: got {len(messages)} prompt messages, but {has} "
                "to join them; expected a single user message"
            )
        message = messages[0]
        if self.name == "alpaca":
            return alpaca_prompt(message["content"], message.get("input", ""))
        return message["content"]

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """With the special tokens that begin a text, which a chat template writes itself; without
        an EOS that the tokenizer puts after each text: the response would begin behind its own
        end.

        All at once: a tokenizer shares many texts out to all cores.
        """
        chat, eos = self.name == "chat", self.tokenizer.eos_token_id
        how = dict(add_special_tokens=not chat, verbose=False)  # of lengths, which are looked at
        every = self.tokenizer(list(texts), **how)["input_ids"]
        for row, ids in enumerate(every):
            if not chat and ids[-1:] == [eos]:
                own = self._tokens(texts[row])
                every[row] = ids if ids[-len(own) :] == own else ids[:-1]
        return every

    def completion_ids(
        self, examples, texts: Sequence[str], prompts: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], bool]]:
        """Of each example the first reference and its end, as it follows the prompt; whether it
        does.

        Prompt and response are tokenised as one text, as MiniLLM and TRL do: apart, SentencePiece
        would begin the response with a space, and a template may write more than the response: a
        turn has an end of its own (Gemma, Phi), and there may be an empty thought before (Qwen3).
        Where the prompt's tokens are not those that begin the whole, the response stands for
        itself.
        """
        responses, end = [e.references[0] for e in examples], self.tokenizer.eos_token_id
        if self.name == "chat":
            wholes = [self._conversation(*pair) for pair in zip(examples, responses, strict=True)]
            end = self.turn_end
        else:
            wholes = [text + response for text, response in zip(texts, responses, strict=True)]
        every = self.prompt_ids([whole or "" for whole in wholes])
        ends, found = {self.tokenizer.eos_token_id, end, *self._specials.values()}, []
        for ids, prompt, response in zip(every, prompts, responses, strict=True):
            joined = ids[: len(prompt)] == list(prompt)
            ids = ids[len(prompt) :] if joined else self._tokens(response)
            found.append((ids if ids[-1:] and ids[-1] in ends else [*ids, end], joined))
        return found

    @cached_property
    def turn_end(self) -> int:
        """The token that ends a response: EOS, or what the chat template writes behind it."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            end = self._behind(self._rendered(messages))[1]
        except (TemplateError, TypeError, ValueError):  # a row will say so
            end = ""
        return self._specials.get(end, self.tokenizer.eos_token_id)

    @cached_property
    def _dated(self) -> str | None:
        """The chat template with the date it is to write; None for the tokenizer's as it is."""
        template = self.tokenizer.chat_template
        if not (self.day and isinstance(template, str)):
            return None
        day = date.fromisoformat(self.day)
        return NOW.sub(lambda call: json.dumps(day.strftime(call[2])), template)

    @cached_property
    def _specials(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        return {token.content: i for i, token in added.items() if token.special}

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _behind(self, text: str) -> tuple[str, str]:
        """What is written behind MARK, up to the first special token, and that; else nothing."""
        tail = text.rpartition(MARK)[2]
        found = [(tail.index(token), token) for token in self._specials if token in tail]
        at, token = min(found, default=(0, ""))
        return tail[: at + len(token)], token

    def _conversation(self, example, response: str) -> str | None:
        """Prompt and response with its end as text; None where the template refuses them, or writes
        something else than the response, as some do with thoughts."""
        messages, begun = example.plain, ""
        if example.begun:
            begun = messages.pop()["content"]

        def written(text: str) -> str:
            return self._rendered([*messages, {"role": "assistant", "content": begun + text}])

        try:
            whole, marked = written(response), written(MARK)
        except (TemplateError, TypeError, ValueError):
            return None
        before, _, after = marked.rpartition(MARK)
        inside = whole.removeprefix(before).removesuffix(after)
        if before + inside + after != whole or inside.strip() != response.strip():
            return None
        ended = any(inside.endswith(token) for token in self._specials)
        return before + inside + ("" if ended else self._behind(marked)[0])

    def _rendered(self, messages: list[Mapping], **how) -> str:
        """Templates of models that see may take content in parts alone, and leave a string out."""
        how |= {"tokenize": False, "chat_template": self._dated}
        write = partial(self.tokenizer.apply_chat_template, **how)
        text, said = write(messages), messages[-1]["content"].strip()
        if said not in text:
            parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
            try:
                other = write(parts)
            except (TemplateError, TypeError, ValueError):
                return text
            return other if said in other else text
        return text
