"""Reading, detecting, templating, tokenising; and what happens to bad rows."""

import json

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from switchkd.data import (
    Report,
    Rows,
    examples_from,
    read_examples,
    read_prompts,
    rows_from,
    tokenize,
)
from switchkd.mixture import text_blocks
from switchkd.templates import alpaca_prompt

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def tokenized(records, tokenizer, prompt=500, completion=50, template="auto"):
    examples, report = examples_from(records, Report("rows"))
    return tokenize(
        examples,
        report,
        tokenizer,
        max_prompt_length=prompt,
        max_completion_length=completion,
        template=template,
    )


def test_alpaca_template_with_and_without_input():
    with_input = alpaca_prompt("Do it.", "this")
    assert with_input.startswith("Below is an instruction that describes a task, paired with an")
    assert with_input.endswith(
        "\n\n### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n"
    )
    without = alpaca_prompt("Do it.")
    assert "Input" not in without and "paired" not in without


@pytest.mark.parametrize(
    "record, form",
    [
        (ALPACA, "instruction/input/output"),
        (
            {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "x"},
            "instruction/context/response",
        ),
    ],
)
def test_both_instruction_forms_make_the_same_tokens(record, form, tokenizer):
    rows = tokenized([record], tokenizer)
    assert rows.report.form == form and rows.report.template == "alpaca template"
    (row,) = rows.rows
    assert tokenizer.decode(row.prompt_ids) == alpaca_prompt("Add.", "1 and 2")
    assert row.completion_ids == [*tokenizer("3")["input_ids"], tokenizer.eos_token_id]
    assert row.example.question == "Add.\n1 and 2"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"},
        {
            "prompt": [{"role": "user", "content": "hi", "input": None}],
            "completion": [{"role": "assistant", "content": "yo"}],
        },
        {"prompt": "hi", "completion": "yo"},
    ],
)
def test_chat_template_is_used_where_there_is_one(record, tokenizer):
    tokenizer.chat_template = CHAT
    rows = tokenized([record], tokenizer)
    assert rows.report.template == "chat template"
    assert tokenizer.decode(rows.rows[0].prompt_ids) == "[user]hi[assistant]"
    assert tokenizer.decode(rows.rows[0].completion_ids) == "yo<eos>"


def message(role, content):
    return {"role": role, "content": content}


def test_turns_of_a_completion_before_the_last_belong_to_the_prompt(tokenizer):
    """And a prompt that ends in the assistant's words is gone on with, a turn of its own is not."""
    tokenizer.chat_template = CHAT
    a, b = message("user", "a"), message("assistant", "b")
    c, d = message("user", "c"), message("assistant", "d")
    for record, prompt in (
        ({"prompt": [a], "completion": [b, c, d]}, tokenizer.apply_chat_template(
            [a, b, c], add_generation_prompt=True, tokenize=False)),
        ({"prompt": [a, b], "completion": [d]}, tokenizer.apply_chat_template(
            [a, b], continue_final_message=True, tokenize=False)),
        ({"messages": [a, b, d]}, tokenizer.apply_chat_template(
            [a, b], add_generation_prompt=True, tokenize=False)),
    ):  # fmt: skip
        (row,) = tokenized([record], tokenizer).rows
        assert tokenizer.decode(row.prompt_ids) == prompt
        assert row.completion_ids == [*tokenizer("d")["input_ids"], tokenizer.eos_token_id]
    for record in ({"prompt": [a], "completion": [b, c]}, {"prompt": "a", "completion": [c]}):
        with pytest.raises(ValueError, match="completion: expected a last message of the assist"):
            tokenized([record], tokenizer)


def test_an_end_that_is_there_already_is_not_doubled(tokenizer):
    (row,) = tokenized([{"prompt": "a", "completion": "b<eos>"}], tokenizer).rows
    assert row.completion_ids == [*tokenizer("b")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("ends", ["", "<eos>"])
def test_an_end_that_a_tokenizer_puts_after_each_text_is_not_in_the_prompt(tokenizer, ends):
    special = [("<pad>", 0), ("<eos>", 1)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=special
    )
    record = {"prompt": f"hi{ends}", "completion": "yo"}
    (row,) = tokenized([record], tokenizer).rows
    assert tokenizer.decode(row.prompt_ids) == f"<pad>hi{ends}"
    assert tokenizer.decode(row.completion_ids) == "yo<eos>"
    (row,) = tokenized([ALPACA], tokenizer).rows
    assert tokenizer.decode(row.prompt_ids) == "<pad>" + alpaca_prompt("Add.", "1 and 2")


@pytest.mark.parametrize("given", ["rows.jsonl", {"train": [], "test": []}])
def test_what_is_no_data_set_in_python_is_named(given, tokenizer):
    with pytest.raises(ValueError, match=f"dataset: got {type(given).__name__}, expected a datas"):
        rows_from(given, tokenizer, 9, 9)


def test_plain_prompts_stay_as_they_are_and_may_lack_a_completion(tokenizer):
    rows = tokenized([{"prompt": "2+2="}], tokenizer)
    assert rows.report.template == "none template"
    assert tokenizer.decode(rows.rows[0].prompt_ids) == "2+2="
    assert rows.rows[0].completion_ids == []


def test_pad_equal_to_eos_keeps_the_eos_target():
    tokenizer = byte_tokenizer(pad="<eos>")
    (row,) = tokenized([ALPACA], tokenizer).rows
    assert row.completion_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_several_references_are_kept(tokenizer):
    (row,) = tokenized([{**ALPACA, "output": ["3", "three"]}], tokenizer).rows
    assert row.example.references == ("3", "three")
    assert tokenizer.decode(row.completion_ids) == "3<eos>"


def test_blank_references_are_none(tokenizer):
    """The first of a row is trained on: a blank one would teach to end at once."""
    (row,) = tokenized([{**ALPACA, "output": ["", " \n", "3", "", "three"]}], tokenizer).rows
    assert row.example.references == ("3", "three")
    assert tokenizer.decode(row.completion_ids) == "3<eos>"


def test_rows_left_out_are_counted_with_reason_and_line(tmp_path, tokenizer):
    rows = [ALPACA, {**ALPACA, "output": " "}, {"instruction": "", "output": "3"}, ALPACA]
    rows.append({**ALPACA, "output": "x" * 51})
    rows.append({**ALPACA, "input": "x" * 600})
    path = write(tmp_path / "a.jsonl", rows)
    with open(path, "a") as file:
        file.write("\n" + json.dumps(ALPACA) + "\n")
    examples, report = read_examples(path)
    kept = tokenize(examples, report, tokenizer, max_prompt_length=500, max_completion_length=50)
    assert [row.id for row in kept.rows] == [1, 4, 8]
    assert report.left_out == {
        "rows with an empty response": [2],
        "rows with an empty prompt": [3],
        "rows with a response over 50 tokens": [5],
        "rows with a prompt over 500 tokens": [6],
        "blank lines": [7],
    }
    assert "left out 1 rows with an empty response: line 2" in str(report)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"instruction": "a", "outp', r"line 2: not valid JSON .* cut off\?"),
        ("[1, 2]", r"line 2: got list, expected a JSON object"),
        ("[" * 100_000, r"line 2: not valid JSON \(maximum recursion depth exceeded"),
        ('{"prompt": ' + "1" * 5000 + "}", r"line 2: not valid JSON \(Exceeds the limit"),
        ('{"question": "a"}', r"line 2: got the keys \['question'\], expected one of"),
        ('{"instruction": 3, "output": "b"}', r"line 2: instruction: got int, expected a string"),
        ('{"instruction": "a", "output": 3}', r"line 2: output: got 3, expected a string"),
        ('{"prompt": "a", "completion": "b"}', r"line 2: got the form prompt/completion, expected"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages: expected messages with a role"),
        ('{"instruction": "a", "output": []}', r"line 2: output: got \[\], expected a string"),
        (r'{"instruction": "a \ud83d", "output": "b"}', r"line 2: .*surrogates not allowed"),
        (r'{"instruction": "a", "output": "\ude00"}', r"line 2: .*surrogates not allowed"),
    ],
)
def test_malformed_rows_stop_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ALPACA) + "\n" + line)
    with pytest.raises(ValueError, match=r"rows\.jsonl: got 1 malformed rows.*\n" + message):
        read_examples(str(path))
    examples, report = read_examples(str(path), skip_malformed=True)
    assert len(examples) == 1 and report.left_out == {"malformed rows": [2]}


def test_rows_with_thoughts_apart_are_malformed(tokenizer):
    thought = {**message("assistant", "4"), "reasoning_content": "easy"}
    with pytest.raises(ValueError, match="messages: got a message with reasoning_content"):
        tokenized([{"messages": [message("user", "2+2?"), thought]}], tokenizer)


def test_context_of_an_instruction_by_either_name(tokenizer):
    for record in ({"input": "cat", "response": "chat"}, {"context": "cat", "output": "chat"}):
        (row,) = tokenized([{"instruction": "Translate.", **record}], tokenizer).rows
        assert tokenizer.decode(row.prompt_ids) == alpaca_prompt("Translate.", "cat")


@pytest.mark.parametrize("content", ["", None, "I look."])
def test_rows_that_call_tools_are_malformed(content, tokenizer):
    """Their calls would be missing from the prompt, without a word."""
    tokenizer.chat_template = CHAT
    ask, answer = message("user", "Rain?"), message("assistant", "No.")
    call = {**message("assistant", content), "tool_calls": [{"function": {"name": "look"}}]}
    turns = [ask, call, message("tool", "dry"), answer]
    for record, said in (
        ({"messages": turns}, "messages: got a message with tool_calls"),
        ({"prompt": turns[:3], "completion": "No."}, "prompt: got a message with tool_calls"),
        ({"prompt": [ask], "completion": turns[1:]}, "completion: got a message with tool_calls"),
        ({"messages": [ask, answer], "tools": [{"name": "look"}]}, r"tools: got \[.*, expected"),
    ):
        with pytest.raises(ValueError, match=f"malformed rows.*\nline 1: {said}"):
            tokenized([record], tokenizer)
    # a column that other rows of a data set fill
    columns = {"messages": [{**ask, "tool_calls": None}, {**answer, "tool_calls": []}]}
    assert len(tokenized([{**columns, "tools": None}], tokenizer)) == 1


def test_files_of_other_programs_are_read_or_named(tmp_path, tokenizer):
    def file(name, text, encoding="utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding, newline="")
        return str(tmp_path / name)

    lines = [json.dumps({**ALPACA, "output": "é"}, ensure_ascii=False)] * 2
    windows = file("windows.jsonl", "\r\n".join(lines), "utf-8-sig")
    arrays = [file("a.json", f"\n[{lines[0]},\n{lines[1]}]"), file("b.json", "\n".join(lines))]
    for path in (windows, *arrays):
        examples, _ = read_examples(path)
        assert [e.references for e in examples] == [("é",)] * 2
    text = file("windows.txt", "ab\r\nc", "utf-8-sig")
    assert tokenizer.decode(text_blocks(text, tokenizer, 4)[0]) == "ab\nc"
    for name, where in (
        ("latin-1", "line 2: got the byte 0xe9"),
        ("utf-16", "line 1: got the byte"),
    ):
        path = file(f"{name}.jsonl", "\n".join([json.dumps(ALPACA), *lines]), name)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl, {where} .*expected a file in UTF-8"):
            read_examples(path, skip_malformed=True)
    with pytest.raises(ValueError, match=r"cut\.json: not a valid JSON array .*cut off\?"):
        read_examples(file("cut.json", f"[{lines[0]},"))
    with pytest.raises(ValueError, match=r"deep\.json: not a valid JSON array \(maximum rec"):
        read_examples(file("deep.json", "[" * 100_000))
    with pytest.raises(
        ValueError, match=r"got .*rows\.csv, expected JSON Lines, one object a line"
    ):
        read_examples(file("rows.csv", "instruction,output\na,b\n"))


def test_hub_datasets_are_read_through_datasets(tmp_path):
    """A folder of data files is read as a repository of the Hub is."""
    write(tmp_path / "train.jsonl", [ALPACA, {**ALPACA, "output": ""}])
    examples, report = read_examples(str(tmp_path), split="train")
    assert [e.references for e in examples] == [("3",)]
    assert report.left_out == {"rows with an empty response": [2]}
    with pytest.raises(ValueError, match=r"cannot load .*absent"):
        read_examples(str(tmp_path), split="absent")
    with pytest.raises(ValueError, match=r"with the splits train, expected test or valid"):
        read_examples(str(tmp_path), split=("test", "valid"))
    assert read_prompts(str(tmp_path), byte_tokenizer(), "auto").source.endswith("[train]")
    write(tmp_path / "validation.jsonl", [ALPACA])
    _, report = read_examples(str(tmp_path), split=("test", "validation"))
    assert report.source.endswith("[validation]")


def test_empty_and_missing_data_are_refused(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: got no usable rows"):
        read_examples(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="expected an existing .jsonl file"):
        read_examples(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="no row is left"):
        tokenized([ALPACA], tokenizer, prompt=3)


def test_several_messages_need_a_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    with pytest.raises(ValueError, match="got 2 prompt messages, but the tokenizer has no"):
        tokenized([{"messages": turns}], tokenizer)
    with pytest.raises(ValueError, match="template: got 'chat', but"):
        tokenized([ALPACA], tokenizer, template="chat")
    with pytest.raises(ValueError, match="template: got 'chatml', expected one of auto, chat, alp"):
        tokenized([ALPACA], tokenizer, template="chatml")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="rows, line 1: .*says: System role not supported"):
        tokenized([{"messages": turns}], tokenizer)


def test_prompts_of_other_data_are_left_out_in_whatever_form_they_are(tmp_path, tokenizer):
    test = [ALPACA, {"instruction": "Sing.", "output": "la"}]
    asked = [
        {"instruction": "Add.", "context": "1 and 2", "response": "4"},  # the same prompt
        {"instruction": "Add.", "context": "1 and 3", "response": "4"},
    ]
    as_text = [{"prompt": alpaca_prompt("Sing."), "completion": "x"}, {"prompt": "Sing"}]
    for chat in (None, CHAT):
        tokenizer.chat_template = chat
        exclude = read_prompts(write(tmp_path / "test.jsonl", test), tokenizer, "auto")
        for records in (asked, as_text) if chat is None else (asked,):
            examples, report = examples_from(records, Report("rows"))
            limits = dict(max_prompt_length=500, max_completion_length=50)
            rows = tokenize(examples, report, tokenizer, **limits, exclude=exclude)
            assert [row.id for row in rows.rows] == [2]
            assert report.left_out == {"rows that are in test.jsonl": [1]}


def test_a_digest_changes_with_any_token(tokenizer):
    rows = tokenized([ALPACA, {**ALPACA, "output": "4"}], tokenizer)
    digests = {
        rows.digest,
        tokenized([ALPACA, {**ALPACA, "output": "5"}], tokenizer).digest,
        Rows(rows.rows[::-1], rows.report).digest,
        Rows(rows.rows[:1], rows.report).digest,
    }
    assert len(digests) == 4 and Rows(rows.rows, rows.report).digest in digests


@given(st.text(min_size=1).filter(str.strip), st.text(), st.text(min_size=1).filter(str.strip))
def test_any_text_survives_the_round_trip(instruction, extra, output):
    record = {"instruction": instruction, "input": extra, "output": output}
    tokenizer = byte_tokenizer()
    (row,) = tokenized([record], tokenizer, prompt=10**6, completion=10**6).rows
    assert tokenizer.decode(row.prompt_ids) == alpaca_prompt(instruction, extra)
    assert tokenizer.decode(row.completion_ids[:-1]) == output


def test_text_blocks(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("abcdefg")
    blocks = text_blocks(str(path), tokenizer, 3)
    assert [tokenizer.decode(b) for b in blocks] == ["abc", "def"]
    with pytest.raises(ValueError, match="got 7 tokens, expected at least 8"):
        text_blocks(str(path), tokenizer, 8)


def test_embedded_data_is_there_with_its_licence():
    from switchkd.names import EMBEDDED_DIR

    train, report = read_examples("embedded", split="train")
    assert report.source == "embedded train.jsonl"  # not a file of the user's
    valid, _ = read_examples("embedded", split="valid")
    assert len(train) >= 300 and len(valid) >= 50
    assert not {e.question for e in train} & {e.question for e in valid}
    notice = (EMBEDDED_DIR / "NOTICE.md").read_text()
    assert "CC BY-SA 3.0" in notice and "Databricks" in notice
