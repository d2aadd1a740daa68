"""What `evaluate` keeps in its JSON file, and for how long it goes by that."""

import json

import pytest
from test_evaluate import evaluate, results, save_model, save_models

from switchkd import metrics
from switchkd.evaluate import Checkpoint


@pytest.fixture
def model_dir(tmp_path):
    return save_models(tmp_path)


def test_finished_sets_outlive_a_killed_run_and_are_not_run_again(model_dir, monkeypatch, capsys):
    data = [f"tiny={model_dir}/rows.jsonl", f"more={model_dir}/more.jsonl"]
    asked, generate = [], metrics.generate

    def counted(model, rows, *args, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return generate(model, rows, *args, **options)

    monkeypatch.setattr(metrics, "generate", counted)
    assert evaluate(model_dir, "k.json", data=data, seeds=[1, 2]) == 130
    label = str(model_dir / "model")
    assert list(results(model_dir, "k.json")["models"][label]["sets"]) == ["tiny"]
    asked[:] = []
    assert evaluate(model_dir, "k.json", data=data, seeds=[1, 2]) == 0
    assert asked == [3, 3]  # the two seeds of the second set alone
    assert list(results(model_dir, "k.json")["models"][label]["sets"]) == ["tiny", "more"]

    asked[:] = []
    assert evaluate(model_dir, "k.json", data=data, seeds=[1]) == 1  # other settings
    assert "holds results with seeds" in " ".join(capsys.readouterr().out.split())
    assert asked == []
    save_model(model_dir / "model", seed=5)  # other weights under the same name
    assert evaluate(model_dir, "k.json", seeds=[1, 2]) == 0
    assert asked == [5, 5]
    asked[:] = []
    assert evaluate(model_dir, "k.json", "--overwrite", "true", seeds=[1]) == 0
    assert asked == [5] and list(results(model_dir, "k.json")["sets"]) == ["tiny"]


def test_responses_are_written_whole_or_not_at_all(model_dir, monkeypatch):
    """What is cut off would be taken for all of them."""
    folder, rouge_l, scored = model_dir / "texts", metrics.rouge_l, []

    def cut_off(*args):
        scored.append(args)
        if len(scored) == 12:  # 10 of the scores are those of the table
            raise KeyboardInterrupt
        return rouge_l(*args)

    options = dict(seeds=[1, 2], save_responses=folder)
    assert evaluate(model_dir, "w.json", seeds=[1, 2]) == 0
    with monkeypatch.context() as killed:
        killed.setattr("switchkd.evaluate.metrics.rouge_l", cut_off)
        assert evaluate(model_dir, "w.json", **options) == 130
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert evaluate(model_dir, "w.json", **options) == 0
    (file,) = folder.rglob("*.jsonl")
    assert len(file.read_text().splitlines()) == 10


def test_a_label_has_scores_of_one_model_alone(model_dir, capsys):
    """Another model, or other weights under its name, on fewer sets: the others' scores go."""
    data = [f"tiny={model_dir}/rows.jsonl", f"more={model_dir}/more.jsonl"]
    options = dict(labels="m", seeds=[1])

    def kept():
        model = results(model_dir, "l.json")["models"]["m"]
        return list(model["sets"]), model["model"]

    def run(**changes):
        assert evaluate(model_dir, "l.json", **{**options, **changes}) == 0
        return "scores of another model" in capsys.readouterr().out

    model, other = str(model_dir / "model"), str(model_dir / "other")
    assert not run(data=data) and not run()
    assert kept() == (["tiny", "more"], model)
    assert run(model_name_or_path=other) and kept() == (["tiny"], other)
    assert not run(model_name_or_path=other, data=data)
    save_model(model_dir / "other", seed=5)
    assert run(model_name_or_path=other) and kept() == (["tiny"], other)


def test_a_models_settings_and_its_commit_on_the_hub_are_part_of_it(model_dir, monkeypatch):
    folder, hub = model_dir / "model", model_dir / "hub" / "models--some--model"

    def fingerprint(name, revision=None):
        return Checkpoint("m", str(name), revision, None, None, None, None).fingerprint("auto")

    seen = [fingerprint(folder)]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "eos_token_id": 7}))
        seen.append(fingerprint(folder))
    (folder / "results.json").write_text("{}")
    assert len(set(seen)) == 4 and fingerprint(folder) == seen[-1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    for commit in ("1" * 40, "2" * 40):
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "tokenizer.json").write_text("{}")
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / "main").write_text(commit)
        seen += [fingerprint("some/model")] * 2
    assert len(set(seen)) == 6
    assert fingerprint("some/model", "1" * 40) == seen[-3] != fingerprint("some/model")


def test_results_of_before_a_label_had_a_fingerprint_go_on(model_dir, capsys):
    data = [f"tiny={model_dir}/rows.jsonl", f"more={model_dir}/more.jsonl"]
    options = dict(labels="m", seeds=[1])
    for change, kept in ((None, ["tiny", "more"]), (5, ["tiny"])):
        assert evaluate(model_dir, "o.json", data=data, **options) == 0
        before = results(model_dir, "o.json")
        before["models"]["m"].pop("fingerprint", None)
        (model_dir / "o.json").write_text(json.dumps(before))
        capsys.readouterr()
        if change is not None:
            save_model(model_dir / "model", seed=change)
        assert evaluate(model_dir, "o.json", **options) == 0
        assert list(results(model_dir, "o.json")["models"]["m"]["sets"]) == kept
        assert ("taken from" in capsys.readouterr().out) is (change is None)
