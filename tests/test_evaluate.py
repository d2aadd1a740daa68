"""Scores, their floors, and the evaluation command."""

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from switchkd import metrics
from switchkd.data import Report, examples_from, tokenize
from switchkd.evaluate import PAPER_SETS, EvalArguments, find_sets, main


def rows_of(records):
    examples, report = examples_from(records, Report("rows"))
    return tokenize(
        examples, report, byte_tokenizer(), max_prompt_length=900, max_completion_length=900
    ).rows


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat" = 3 of 4 predicted and 3 of 5 reference words
    precision, recall = 3 / 4, 3 / 5
    want = 100 * 2 * precision * recall / (precision + recall)
    assert metrics.rouge_l("the cat sat here", ["the cat has sat down"]) == pytest.approx(want)
    assert metrics.rouge_l("running dogs", ["run dog"]) == pytest.approx(100)  # stemmed
    assert metrics.rouge_l("b", ["a", "b", "c"]) == pytest.approx(100)  # the best reference


def test_score_splits_by_reference_length():
    long = " ".join("abcdefghijkl")
    result = metrics.score(["x", long], [["x"], [long]])
    assert result["rouge_l_1_to_10_words"] == result["rouge_l_11_words_up"] == pytest.approx(100)
    result = metrics.score(["y", long], [["x"], [long]])
    assert (result["rouge_l_1_to_10_words"], result["rouge_l"]) == (0, pytest.approx(50))
    assert "rouge_l_11_words_up" not in metrics.score(["y"], [["x"]])


def test_bleu_takes_every_reference():
    text = "the quick brown fox jumps"
    assert metrics.score([text], [["nothing like it at all", text]])["bleu"] == pytest.approx(100)


def test_floors_by_hand():
    rows = rows_of(
        [
            {"instruction": "red green", "output": "red"},
            {"instruction": "blue", "output": ["sky", "blue"]},
        ]
    )
    floors = metrics.floors(rows)
    copied = (100 * 2 * 0.5 * 1 / 1.5 + 100) / 2  # "red green" for "red"; "blue" for "blue"
    assert floors["prompt_copied"]["rouge_l"] == pytest.approx(copied)
    assert floors["another_reference"]["rouge_l"] == 0


def test_sets_of_the_paper_are_found_by_file(tmp_path):
    (tmp_path / "dolly").mkdir()
    for name in ("dolly/test.jsonl", "vicuna.jsonl"):
        (tmp_path / name).write_text("{}\n")
    sets = find_sets(EvalArguments(data_dir=str(tmp_path), data=["mine=x.jsonl", "some/set"]))
    assert list(sets) == ["Dolly", "Vicuna", "mine", "set"]
    assert set(PAPER_SETS) == {"Dolly", "SelfInst", "Vicuna", "S-NI", "UnNI"}
    with pytest.raises(ValueError, match="has none of"):
        find_sets(EvalArguments(data_dir=str(tmp_path / "dolly")))


@pytest.fixture
def model_dir(tmp_path):
    tiny_model(vocab_size=258, dtype=torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "completion": "a b c"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def evaluate(folder, out, **changes):
    values = {
        "model_name_or_path": folder / "model",
        "data": f"tiny={folder}/rows.jsonl",
        "max_prompt_length": 20,
        "max_new_tokens": 8,
        "output": folder / out,
        **changes,
    }
    argv = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    return main(argv)


def test_the_command_writes_mean_deviation_and_floors(model_dir, capsys):
    assert evaluate(model_dir, "a.json") == 0
    result = json.loads((model_dir / "a.json").read_text())
    scores = result["sets"]["tiny"]
    assert scores["rows"] == 5 and len(scores["rouge_l"]["seeds"]) == 5
    for metric in ("rouge_l", "bleu", "rouge_l_1_to_10_words"):
        assert {"mean", "std", "seeds"} == scores[metric].keys()
    assert scores["floors"].keys() == {"prompt_copied", "another_reference"}
    text = capsys.readouterr().out
    assert "  copied" in text and "  other" in text and "±" in text
    # the noise is keyed by row and seed, so the batch size changes nothing
    assert evaluate(model_dir, "b.json", batch_size=2) == 0
    assert json.loads((model_dir / "b.json").read_text())["sets"] == result["sets"]


def test_bad_arguments_are_told(model_dir, capsys):
    assert evaluate(model_dir, "c.json", limit=0) == 1
    assert "limit: got 0, expected" in capsys.readouterr().out
    assert evaluate(model_dir, "c.json", data="x=absent.jsonl") == 1
    assert "expected an existing .jsonl file" in " ".join(capsys.readouterr().out.split())
    assert not (model_dir / "c.json").exists()
