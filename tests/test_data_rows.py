"""Rows from data sets of Python, and what no `Rows` may hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from switchkd.data import Rows, read_examples, rows_from
from switchkd.mixture import text_blocks
from switchkd.records import pieces_of
from switchkd.templates import alpaca_prompt

RECORDS = [{"prompt": f"say {i}", "completion": str(i)} for i in range(3)]


class MapStyle(Dataset):
    """Knows an item for each index, past its length, too."""

    def __len__(self):
        return len(RECORDS)

    def __getitem__(self, index):
        assert index < 99, "read far past its end"
        return RECORDS[index % len(RECORDS)]


def test_a_map_style_data_set_is_read_to_its_length(tokenizer):
    rows = rows_from(MapStyle(), tokenizer, 40, 9).rows
    assert rows == rows_from(RECORDS, tokenizer, 40, 9).rows and len(rows) == 3


def test_rows_of_one_id_are_refused(tokenizer):
    one, other = (rows_from(RECORDS[:n], tokenizer, 40, 9) for n in (2, 1))
    with pytest.raises(ValueError, match="rows: got the id 1 twice, expected another for each row"):
        Rows(one.rows + other.rows, one.report)
    assert len(Rows([], one.report)) == 0


def test_columns_that_are_not_read_are_named(tokenizer):
    """The response may be in one of them: such rows are prompts alone."""
    asked = [{"prompt": f"say {i}", "response": str(i), "id": i} for i in range(3)]
    report = rows_from(asked, tokenizer, 40, 9).report
    assert "rows (prompt/completion; none template; not read: id, response)" in str(report)
    assert "\n  3 prompts without a response" in str(report) and report.notable
    report = rows_from(RECORDS, tokenizer, 40, 9).report
    assert not report.notable and "not read" not in str(report) and "without" not in str(report)


def test_an_empty_instruction_stands_for_its_input(tokenizer):
    """Some data sets have the whole prompt in `input`."""
    for extra in ("input", "context"):
        record = {"instruction": " ", extra: "2 + 2?", "output": "4"}
        (row,) = rows_from([record], tokenizer, 500, 9).rows
        assert tokenizer.decode(row.prompt_ids) == alpaca_prompt("2 + 2?")
        assert row.example.question == "2 + 2?"


@pytest.mark.parametrize(
    "given, name",
    [
        (SimpleNamespace(columns=["prompt"], __iter__=None), "SimpleNamespace"),
        (Path("a"), "PosixPath"),
        (5, "int"),
        ("a.jsonl", "str"),
        ({"train": RECORDS}, "dict"),
    ],
)
def test_what_has_no_rows_is_refused(tokenizer, given, name):
    """The first stands for a DataFrame, whose items are the names of its columns."""
    with pytest.raises(ValueError, match=f"dataset: got {name}, expected a datasets.Dataset"):
        rows_from(given, tokenizer, 40, 9)


def test_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"got .*rows\.jsonl\.gz, expected JSON Lines.*the folder"):
        read_examples(str(path))


@pytest.mark.parametrize("chat", [None, "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"])
def test_texts_are_tokenised_together_and_mean_what_they_mean_alone(tokenizer, chat, monkeypatch):
    """A tokenizer shares many texts out to all cores; an id is one object, be it in many rows."""
    tokenizer.chat_template, calls = chat, []
    records = [{"prompt": "ö" * n, "completion": "ü" * (n % 3 + 1)} for n in range(1, 8)]
    records += [{"prompt": "no response"}, {"prompt": "too long " * 9, "completion": "x"}]
    alone = [rows_from([r], tokenizer, 40, 9).rows[0] for r in records[:-1]]

    class Counted(type(tokenizer)):
        def __call__(self, text, **options):
            calls.append(text)
            return super().__call__(text, **options)

    tokenizer.__class__ = Counted
    monkeypatch.setattr("switchkd.data.TOGETHER", 5)  # 9 rows: two times prompts and wholes
    rows = rows_from(records, tokenizer, 40, 9).rows
    assert [(row.prompt_ids, row.completion_ids) for row in rows] == [
        (row.prompt_ids, row.completion_ids) for row in alone
    ]
    assert len(calls) == 4 and [row.id for row in rows] == [*range(1, 9)]
    assert len({id(token) for row in rows for token in row.prompt_ids if token > 256}) <= 1


def test_a_long_text_is_tokenised_in_pieces_of_whole_lines(tmp_path, tokenizer, monkeypatch):
    """As one it would take two hundred times its size."""
    text = "".join(f"{'ä' * (n % 7)}{n}\n" for n in range(300)) + "\n\nend"
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    whole = text_blocks(str(path), tokenizer, 5)
    monkeypatch.setattr("switchkd.records.PIECE", 8)
    pieces = list(pieces_of(path))
    assert "".join(pieces) == text and 100 < len(pieces) < 300  # and more than go together
    assert text_blocks(str(path), tokenizer, 5).equal(whole)


def test_a_row_that_is_left_out_brings_no_warning_about_its_length(tokenizer, monkeypatch):
    said, tokenizer.model_max_length = [], 20
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", said.append)
    rows = [*RECORDS, {"prompt": "x" * 30, "completion": "y"}]
    assert len(rows_from(rows, tokenizer, 20, 9)) == 3
    assert said == []
