"""Prompts and responses as text and as tokens, by the tokenizer's chat template or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

TEMPLATES = ("auto", "chat", "alpaca", "none")
# The template of MiniLLM and SWITCH (arXiv 2410.19503, Fig. 4), for tokenizers without their own.
_HEADER = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"  # noqa: E501
MARK = "\ue000"  # stands for a response, to see what a template writes around it
_PAIRED = ", paired with an input that provides further context"


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca-style prompt, up to and including the line that the response follows."""
    header = _HEADER.format(_PAIRED if input else "")
    context = f"### Input:\n{input}\n\n" if input else ""
    return f"{header}### Instruction:\n{instruction}\n\n{context}### Response:\n"


def template_for(template: str, form: str, tokenizer) -> str:
    """The template of rows of this form."""
    if template not in TEMPLATES:
        raise ValueError(f"template: got {template!r}, expected one of {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("template: got 'chat', but the tokenizer has no chat template")
    if template != "auto":
        return template
    plain = "none" if form == "prompt/completion" else "alpaca"
    return "chat" if tokenizer.chat_template else plain


def prompt_text(example, source: str, tokenizer, template: str) -> str:
    messages, where = example.messages, f"{source}, line {example.line}"
    if template == "chat":
        how = {"continue_final_message" if example.begun else "add_generation_prompt": True}
        try:
            return _rendered(tokenizer, example.plain, **how)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: the tokenizer's chat template says: {error}") from None
    if len(messages) > 1:
        has = "the tokenizer has no chat template"
        if tokenizer.chat_template:
            has = f"the template {template} has no way"
        raise ValueError(
            f"{where}: got {len(messages)} prompt messages, but {has} "
            "to join them; expected a single user message"
        )
    message = messages[0]
    if template == "alpaca":
        return alpaca_prompt(message["content"], message.get("input", ""))
    return message["content"]


def prompt_ids(text: str, tokenizer, template: str) -> list[int]:
    """With the special tokens that begin a text, which a chat template writes itself; without an
    EOS that the tokenizer puts after each text: the response would begin behind its own end."""
    ids = tokenizer(text, add_special_tokens=template != "chat")["input_ids"]
    if template != "chat" and ids[-1:] == [tokenizer.eos_token_id]:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[-len(own) :] == own else ids[:-1]
    return ids


def completion_ids(
    example, text: str, prompt: Sequence[int], tokenizer, template: str
) -> tuple[list[int], bool]:
    """The first reference and its end, as it follows the prompt; whether it does.

    Prompt and response are tokenised as one text, as MiniLLM and TRL do: apart, SentencePiece
    would begin the response with a space, and a template may write more than the response: a turn
    has an end of its own (Gemma, Phi), and there may be an empty thought before (Qwen3). Where
    the prompt's tokens are not those that begin the whole, the response stands for itself.
    """
    response, end = example.references[0], tokenizer.eos_token_id
    if template == "chat":
        whole = _conversation(tokenizer, example, response)
        ids = [] if whole is None else _tokens(tokenizer, whole)
        end = turn_end(tokenizer)
    else:
        ids = prompt_ids(text + response, tokenizer, template)
    joined = ids[: len(prompt)] == list(prompt)
    ids = ids[len(prompt) :] if joined else _tokens(tokenizer, response)
    ended = ids[-1:] and ids[-1] in {tokenizer.eos_token_id, end, *_specials(tokenizer).values()}
    return ids if ended else [*ids, end], joined


def turn_end(tokenizer) -> int:
    """The token that ends a response: EOS, or what the chat template writes behind it."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        end = _behind(_rendered(tokenizer, messages), tokenizer)[1]
    except (TemplateError, TypeError, ValueError):  # a row will say so
        end = ""
    return _specials(tokenizer).get(end, tokenizer.eos_token_id)


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _specials(tokenizer) -> dict[str, int]:
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _behind(text: str, tokenizer) -> tuple[str, str]:
    """What a template writes behind MARK, up to the first special token, and that; else nothing."""
    tail = text.rpartition(MARK)[2]
    found = [(tail.index(token), token) for token in _specials(tokenizer) if token in tail]
    at, token = min(found, default=(0, ""))
    return tail[: at + len(token)], token


def _conversation(tokenizer, example, response: str) -> str | None:
    """Prompt and response with its end as text; None where the template refuses them, or writes
    something else than the response, as some do with thoughts."""
    messages, begun = example.plain, ""
    if example.begun:
        begun = messages.pop()["content"]

    def written(text: str) -> str:
        answer = {"role": "assistant", "content": begun + text}
        return _rendered(tokenizer, [*messages, answer])

    try:
        whole, marked = written(response), written(MARK)
    except (TemplateError, TypeError, ValueError):
        return None
    before, _, after = marked.rpartition(MARK)
    inside = whole.removeprefix(before).removesuffix(after)
    if before + inside + after != whole or inside.strip() != response.strip():
        return None
    ended = any(inside.endswith(token) for token in _specials(tokenizer))
    return before + inside + ("" if ended else _behind(marked, tokenizer)[0])


def _rendered(tokenizer, messages: list[Mapping], **how) -> str:
    """Templates of models that see may take content in parts alone, and leave a string out."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    said = messages[-1]["content"].strip()
    if said not in text:
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            other = tokenizer.apply_chat_template(parts, tokenize=False, **how)
        except (TemplateError, TypeError, ValueError):
            return text
        return other if said in other else text
    return text
