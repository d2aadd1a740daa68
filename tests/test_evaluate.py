"""Scores, their floors, and the evaluation command."""

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from rich.console import Console

from switchkd import metrics
from switchkd.data import Report, examples_from, tokenize
from switchkd.evaluate import Checkpoint, main, read_set, responses_file
from switchkd.evaluate_options import PAPER_SETS, EvalArguments, Source, find_sets
from switchkd.evaluate_table import average, spread
from switchkd.rollout import Sampling, rollout_in_batches
from switchkd.vocabulary import share_vocabulary


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
    for name in ("dolly/test.jsonl", "vicuna.jsonl", "self_inst.jsonl", "unnatural_short.jsonl"):
        (tmp_path / name).write_text("{}\n")
    sets = find_sets(EvalArguments(data_dir=str(tmp_path), data=["mine=x.jsonl", "some/set"]))
    assert list(sets) == ["Dolly", "SelfInst", "Vicuna", "UnNI short", "mine", "set"]
    assert sets["Dolly"].files == (str(tmp_path / "dolly" / "test.jsonl"),)
    assert sets["SelfInst"].first == 242 and sets["UnNI short"].note and not sets["Dolly"].note
    assert {"Dolly", "SelfInst", "Vicuna", "S-NI", "UnNI"} < set(PAPER_SETS)
    (tmp_path / "year=2024").mkdir()
    file = tmp_path / "year=2024" / "x.jsonl"
    file.write_text("{}\n")
    sets = find_sets(EvalArguments(data=[str(file), f"y={file}", f"lr=1={file}", "a=b=hub/id"]))
    named = {name: source.files[0] for name, source in sets.items()}
    assert named == {**dict.fromkeys(("x", "y", "lr=1"), str(file)), "a=b": "hub/id"}
    with pytest.raises(ValueError, match="has none of"):
        find_sets(EvalArguments(data_dir=str(tmp_path / "dolly" / "..") + "/dolly"))


def save_model(folder, seed):
    tiny_model(vocab_size=258, dtype=torch.float32, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_rows(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def save_models(folder):
    for seed, name in enumerate(("model", "other")):
        save_model(folder / name, seed)
    save_rows(folder / "rows.jsonl", [{"prompt": f"say {i}", "completion": "a b c"}
                                        for i in range(5)])  # fmt: skip
    save_rows(folder / "more.jsonl", [{"prompt": f"now {i}", "completion": "d e"}
                                        for i in range(3)])  # fmt: skip
    return folder


@pytest.fixture
def model_dir(tmp_path):
    return save_models(tmp_path)


def evaluate(folder, out, *flags, **changes):
    values = {
        "model_name_or_path": folder / "model",
        "data": f"tiny={folder}/rows.jsonl",
        "max_prompt_length": 20,
        "max_new_tokens": 8,
        "json": folder / out,
        "device": "cpu",
        **changes,
    }
    argv = []
    for key, value in values.items():
        value = value if isinstance(value, (list, tuple)) else [value]
        argv += [f"--{key}", *map(str, value)]
    return main([*argv, *flags])


def results(folder, name):
    return json.loads((folder / name).read_text())


def test_the_command_writes_mean_deviation_and_floors(model_dir, capsys):
    assert evaluate(model_dir, "a.json", labels="m") == 0
    got = results(model_dir, "a.json")
    scores = got["models"]["m"]["sets"]["tiny"]
    assert got["sets"]["tiny"]["rows"] == 5 and len(scores["rouge_l"]["seeds"]) == 5
    for metric in ("rouge_l", "bleu", "rouge_l_1_to_10_words"):
        assert {"mean", "std", "seeds"} == scores[metric].keys()
    assert got["sets"]["tiny"]["floors"].keys() == {"prompt_copied", "another_reference"}
    text = capsys.readouterr().out
    assert "prompt copied" in text and "another reference" in text and "±" in text
    # the noise is keyed by row and seed, so the batch size changes nothing
    assert evaluate(model_dir, "b.json", labels="m", batch_size=2) == 0
    assert results(model_dir, "b.json") == got


def sample_both_ways(model, seed):
    """Responses of `generate` and of the naive loop; the rows that `generate` said were left."""
    records = [{"prompt": "x" * n, "completion": "y"} for n in (3, 9, 1, 5, 7)]
    rows, tokenizer, left = rows_of(records), byte_tokenizer(), []
    vocabulary = share_vocabulary(None, model, None, tokenizer)
    options = dict(sampling=Sampling(seed=seed), max_new_tokens=12, batch_size=2)
    told = dict(on_step=lambda _, n: left.append(n))
    texts = metrics.generate(model, rows, tokenizer, vocabulary, **options, **told)
    naive = rollout_in_batches(
        None, model, [row.prompt_ids for row in rows], sequence_ids=[row.id for row in rows],
        eos_token_ids=vocabulary.eos_token_ids, pad_token_id=0, vocab_size=vocabulary.size,
        **options,
    )  # fmt: skip
    want = [tokenizer.decode(x, skip_special_tokens=True).strip() for x in naive.completions()]
    return texts, want, left


def test_samples_are_those_of_the_naive_loop(monkeypatch):
    model = tiny_model(vocab_size=258)
    monkeypatch.setattr(metrics, "rollout_in_batches", None)  # not what `generate` may call
    texts, want, left = sample_both_ways(model, seed=1)
    assert texts == want and len(set(texts)) > 1
    assert left[-1] == 0 and left == sorted(left, reverse=True)
    assert sample_both_ways(model, seed=2)[0] != texts


def test_a_model_that_the_cache_cannot_serve_is_sampled_step_by_step(monkeypatch, caplog):
    model = tiny_model("bloom", vocab_size=258)
    monkeypatch.setattr(metrics, "block_rollout", None)
    texts, want, left = sample_both_ways(model, seed=1)
    assert texts == want and "not told positions" in caplog.text
    assert left[-1] == 0 and left == sorted(left, reverse=True) and left[0] > 2


def test_checkpoints_side_by_side_share_one_engine_each(model_dir, monkeypatch):
    engines = []

    def engine_for(model, made=metrics.engine_for):
        engines.append(made(model))
        return engines[-1]

    monkeypatch.setattr(metrics, "engine_for", engine_for)
    models = [model_dir / "model", model_dir / "other"]
    data = [f"tiny={model_dir}/rows.jsonl", f"more={model_dir}/more.jsonl"]
    code = evaluate(
        model_dir, "r.json", model_name_or_path=models, labels=["A", "B|"], data=data,
        seeds=[1, 2], markdown=model_dir / "t.md", save_responses=model_dir / "texts",
    )  # fmt: skip
    assert code == 0 and len(engines) == 2 and all(e.slots == 5 for e in engines)
    got = results(model_dir, "r.json")
    cells = {m: [got["models"][m]["sets"][s]["rouge_l"] for s in got["sets"]] for m in ("A", "B|")}
    assert cells["A"] != cells["B|"]
    by_seed = [sum(c["seeds"][i] for c in cells["A"]) / 2 for i in (0, 1)]
    mean, std = sum(by_seed) / 2, abs(by_seed[0] - by_seed[1]) / 2**0.5
    lines = (model_dir / "t.md").read_text().splitlines()
    assert lines[0] == "|  | tiny (5) | more (3) | average |"
    assert lines[2].startswith("| A | ") and lines[2].endswith(f" | {mean:.2f} ±{std:.2f} |")
    assert [line.split(" | ")[0] for line in lines[3:6]] == [
        "| B\\|", "| prompt copied", "| another reference"
    ]  # fmt: skip
    saved = [json.loads(x) for x in (model_dir / "texts" / "A" / "more.jsonl").open()]
    assert [(r["row"], r["seed"]) for r in saved] == [(i, s) for s in (1, 2) for i in (1, 2, 3)]
    of_first = [r["rouge_l"] for r in saved if r["seed"] == 1]
    assert sum(of_first) / 3 == pytest.approx(cells["A"][1]["seeds"][0])


def test_labels_and_names_in_brackets_are_shown_as_they_are(model_dir, capsys):
    """To rich a bracket begins its markup, and one that ends none stops it."""
    models = [model_dir / "model", model_dir / "other"]
    names = dict(labels=["[alpha] :fire:", "[/x]"], data=f"[red]=={model_dir}/rows.jsonl")
    for _ in range(2):  # decoded, and taken from the file
        assert evaluate(model_dir, "b.json", model_name_or_path=models, seeds=[1], **names) == 0
        shown = capsys.readouterr().out.split("prompt copied")[0]
        for text in ("│ [alpha] :fire:", "│ [/x]", "┃ [red]= (5)"):
            assert text in shown


def test_no_ngram_twice(model_dir, capsys):
    rules, texts = {"seeds": [1], "max_new_tokens": 60}, []
    for size in (0, 1):
        folder = model_dir / f"texts-{size}"
        flags = ("--no_repeat_ngram_size", str(size), "--save_responses", str(folder))
        assert evaluate(model_dir, f"n{size}.json", *flags, **rules) == 0
        (file,) = folder.rglob("tiny.jsonl")
        lines = (json.loads(line)["response"] for line in file.open())
        texts.append([text.replace("\ufffd", "") for text in lines])  # halves of characters
    assert "at most 60 tokens, no 1-gram twice; rows" in " ".join(capsys.readouterr().out.split())
    assert all(len(set(text)) == len(text) for text in texts[1])  # a token is a byte
    assert any(len(set(text)) < len(text) for text in texts[0])
    before = results(model_dir, "n0.json")
    del before["settings"]["no_repeat_ngram_size"]  # as it was written before there was the rule
    (model_dir / "n0.json").write_text(json.dumps(before))
    assert evaluate(model_dir, "n0.json", **rules) == 0
    assert evaluate(model_dir, "n0.json", "--no_repeat_ngram_size", "6", **rules) == 1
    assert "results with no_repeat_ngram_size 0, got 6" in " ".join(capsys.readouterr().out.split())


def test_a_bad_flag_takes_one_line(capsys):
    assert main(["--limit", "abc"]) == 1
    assert capsys.readouterr() == ("error: argument --limit: invalid int value: 'abc'\n", "")
    assert main(["--limi=3"]) == 1
    assert "unknown option --limi; did you mean --limit?" in capsys.readouterr().out


def test_responses_are_kept_apart():
    names = ("runs/a", "runs_a", "v1.5", "..", "v1.6")
    files = {responses_file("out", label, "S-NI") for label in names}
    assert len(files) == 5 and all(f.parts[0] == "out" and len(f.parts) == 3 for f in files)
    assert ".." not in {part for f in files for part in f.parts}
    assert responses_file("out", "m", "set 1.5") != responses_file("out", "m", "set 1.6")


def test_rows_too_long_for_one_model_are_left_out_for_all(model_dir):
    class Halves:  # two characters a token
        chat_template, eos_token_id, added_tokens_decoder = None, 1, {}

        def __call__(self, texts, **_):
            if isinstance(texts, str):
                return {"input_ids": list(range(2, 3 + len(texts) // 2))}
            return {"input_ids": [self(text)["input_ids"] for text in texts]}

    records = [{"prompt": "x" * n, "completion": "y"} for n in (4, 12, 6)]
    save_rows(model_dir / "long.jsonl", records)
    args = EvalArguments(max_prompt_length=8)
    checkpoints = [Checkpoint(x, x, None, None, None, None, t) for x, t in
                   (("a", Halves()), ("b", byte_tokenizer()))]  # fmt: skip
    read = read_set(
        Source((str(model_dir / "long.jsonl"),)), checkpoints, args, Console(quiet=True)
    )
    assert [[row.id for row in rows] for rows in read] == [[1, 3], [1, 3]]
    assert [len(row.prompt_ids) for row in read[0]] == [3, 4]


def test_a_set_that_is_not_the_papers_is_not_in_the_average():
    sets = {n: {"note": "x" if n == "c" else ""} for n in "abc"}
    values = {n: spread(seeds) for n, seeds in (("a", [1, 3]), ("b", [5, 5]), ("c", [90, 90]))}
    assert average(values, sets) == {"mean": 3.5, "std": pytest.approx(0.5**0.5), "seeds": [3, 4]}
    assert average({**values, "b": None}, sets) is None


def test_the_split_of_a_data_set_is_test_or_the_one_named(model_dir):
    for split, count in (("train", 4), ("validation", 3), ("test", 2)):
        records = [{"prompt": f"{split} {i}", "completion": "y"} for i in range(count)]
        (model_dir / "hub").mkdir(exist_ok=True)
        save_rows(model_dir / "hub" / f"{split}.jsonl", records)
    checkpoints = [Checkpoint("m", "m", None, None, None, None, byte_tokenizer())]
    for split, count in ((None, 2), ("validation", 3), ("train", 4)):
        args = EvalArguments(split=split)
        (rows,) = read_set(
            Source((str(model_dir / "hub"),)), checkpoints, args, Console(quiet=True)
        )
        assert len(rows) == count


def test_malformed_rows_stop_or_are_left_out(model_dir, capsys):
    with (model_dir / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    assert evaluate(model_dir, "s.json", seeds=[1]) == 1
    assert "skip_malformed: true" in capsys.readouterr().out
    assert evaluate(model_dir, "s.json", seeds=[1], skip_malformed="true") == 0
    assert "left out 1 malformed rows: line 6" in capsys.readouterr().out
    assert results(model_dir, "s.json")["sets"]["tiny"]["rows"] == 5


def test_bad_arguments_are_told(model_dir, capsys):
    def said():
        return " ".join(capsys.readouterr().out.split())

    assert evaluate(model_dir, "c.json", limit=0) == 1
    assert "limit: got 0, expected" in said()
    for name in ("max_new_tokens", "max_prompt_length"):
        assert evaluate(model_dir, "c.json", **{name: 0}) == 1
        assert f"{name}: got 0, expected an integer >= 1" in said()
    assert evaluate(model_dir, "c.json", template="foo") == 1
    assert "template: got 'foo', expected one of auto, chat, alpaca, none" in said()
    assert evaluate(model_dir, "c.json", dtype="fp8") == 1
    assert "dtype: got 'fp8', expected one of auto, float32, bfloat16" in said()
    assert EvalArguments(dtype="bf16").dtype == "bfloat16"  # as in training
    for data in (["a/test.jsonl", "b/test.jsonl"], ["test=a.jsonl", "test=b.jsonl"]):
        assert evaluate(model_dir, "c.json", data=data) == 1
        assert "data: got two sets test, expected a name for each (NAME=" in said()
    assert evaluate(model_dir, "c.json", data="x=absent.jsonl") == 1
    assert "expected an existing .jsonl file" in said()
    twice = [model_dir / "model"] * 2
    assert evaluate(model_dir, "c.json", model_name_or_path=twice) == 1
    assert "expected a name of its own for each model (--labels)" in said()
    assert evaluate(model_dir, "c.json", model_name_or_path=twice, labels="A") == 1
    assert "expected one for each of 2 models" in said()
    assert evaluate(model_dir, "rows.jsonl") == 1
    assert "holds something else" in said()
    assert not (model_dir / "c.json").exists()
