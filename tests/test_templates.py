"""Data rows are what the chat template, and the tokenizer, make of prompt and response together."""

import pytest
from conftest import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from switchkd.data import Report, examples_from, tokenize
from switchkd.templates import Template

LOOP = "{% for m in messages %}"
ASKS = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
TURNS = LOOP + "<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}" + ASKS
THOUGHT = (
    LOOP + "<turn>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<end>\n{% endfor %}" + ASKS
)
FORGETS = (  # thoughts, and its generation prompt begins one
    LOOP + "<turn>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}"
)
NO_END = LOOP + "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
BEFORE_EOS = LOOP + "[{{ m.role }}] {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}"
BEFORE_EOS += "{% endfor %}"
PARTS = (
    LOOP + "<turn>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<end>\n"
    "{% endfor %}" + ASKS
)


def bytewise(template):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def metaspace():
    """As Llama 2: a space is put before each text, and spaces are part of words."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,#", "▁ye", "un", "▁un"]
    table = {token: i for i, token in enumerate(["<unk>", "<eos>", "<pad>", *letters, "<0x0A>"])}
    merges = [("u", "n"), ("▁", "un")]
    raw = Tokenizer(models.BPE(table, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )  # fmt: skip
    raw.add_special_tokens([AddedToken(x, special=True) for x in ("<eos>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def rows_of(tokenizer, *records, template="auto"):
    examples, report = examples_from(records, Report("rows"))
    sizes = dict(max_prompt_length=500, max_completion_length=200)
    return tokenize(examples, report, tokenizer, **sizes, template=template)


ROW = {"prompt": "Why?", "completion": "Because of it"}


@pytest.mark.parametrize(
    "template, completion",
    [
        (TURNS, "Because of it<end>"),
        (THOUGHT, "<think>\n\n</think>\n\nBecause of it<end>"),
        (FORGETS, "Because of it<end>"),
        (NO_END, "Because of it<eos>"),
        (BEFORE_EOS, "[assistant] Because of it <eos>"),
        (PARTS, "Because of it<end>"),
    ],
)
def test_a_response_is_what_the_template_writes_behind_the_prompt(template, completion):
    tokenizer = bytewise(template)
    rows = rows_of(tokenizer, ROW)
    (row,) = rows.rows
    assert tokenizer.decode(row.completion_ids) == completion
    assert "Why?" in tokenizer.decode(row.prompt_ids)
    assert rows.report.apart == ([1] if template == FORGETS else [])
    assert ("writes otherwise, as they are: line 1" in str(rows.report)) == (template == FORGETS)
    assert Template(tokenizer).turn_end == row.completion_ids[-1]
    if template in (TURNS, THOUGHT):
        turns = [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because of it"},
        ]
        whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert [*row.prompt_ids, *row.completion_ids] == whole[:-1]  # without the line's end


@pytest.mark.parametrize("response", ["end", "i", "<think>a</think>b", "x<end>", " a ", "a\ue000b"])
def test_no_response_is_lost_or_ended_twice(response):
    for template in (TURNS, THOUGHT, FORGETS, NO_END):
        tokenizer = bytewise(template)
        (row,) = rows_of(tokenizer, {"prompt": "Why?", "completion": response}).rows
        text = tokenizer.decode(row.completion_ids)
        assert response.strip() in text
        assert text.count("<end>") + text.count("<eos>") == 1
        assert text.endswith(("<end>", "<eos>"))


def test_a_response_that_was_begun_goes_on():
    tokenizer = bytewise(TURNS)
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Be"}]
    (row,) = rows_of(tokenizer, {"prompt": begun, "completion": "cause"}).rows
    assert tokenizer.decode(row.prompt_ids).endswith("<turn>assistant\nBe")
    assert tokenizer.decode(row.completion_ids) == "cause<end>"


def test_no_space_comes_between_prompt_and_response():
    tokenizer = metaspace()
    assert tokenizer.convert_ids_to_tokens(tokenizer("able")["input_ids"])[0] == "▁"
    for prompt, response in (("A:", " yes"), ("Say ", "able"), ("def f:\n", "    x")):
        record = {"prompt": prompt, "completion": response}
        (row,) = rows_of(tokenizer, record, template="none").rows
        both = tokenizer(prompt + response)["input_ids"]
        assert [*row.prompt_ids, *row.completion_ids] == [*both, tokenizer.eos_token_id]
    record = {"prompt": "u", "completion": "nable"}  # one token as one text: each for itself
    rows = rows_of(tokenizer, record, template="none")
    assert rows.report.apart == [1]
    assert rows.rows[0].completion_ids == [
        *tokenizer("nable")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_a_prompt_of_no_token_is_left_out():
    tokenizer = bytewise(LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    system = {"prompt": [{"role": "system", "content": "Be brief."}], "completion": "a"}
    rows = rows_of(tokenizer, system, ROW)
    assert rows.report.left_out == {"rows with a prompt of no token": [1]}
    assert [row.id for row in rows.rows] == [2]


def test_a_chat_format_without_a_template_is_not_passed_over(tokenizer):
    """A model that has learnt it would be given the prompt of Alpaca without a word."""
    tokenizer.__class__ = type("MistralCommonBackend", (type(tokenizer),), {})
    with pytest.raises(ValueError, match="template: got 'auto' with a tokenizer of mistral-common"):
        Template.of("auto", "messages", tokenizer)
    assert Template.of("alpaca", "messages", tokenizer).name == "alpaca"
