"""The command: what it refuses before any weights, its data, and the folder that it writes to."""

import json

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from rich.console import Console

from switchkd import loading, train
from switchkd.command_line import parse
from switchkd.config import SwitchConfig
from switchkd.console import print_summary
from switchkd.run_folder import check_output, reserved, run_settings
from switchkd.trainer import SwitchTrainer

ROWS = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 5)} for i in range(24)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student, one with other tokens, and data; and a run of two steps."""
    folder = tmp_path_factory.mktemp("train")
    for name, seed in (("teacher", 1), ("student", 2), ("other", 3)):
        tiny_model(vocab_size=270, seed=seed, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<new>"] * (name == "other"))
        tokenizer.save_pretrained(folder / name)
    write(folder / "rows.jsonl", ROWS)
    write(folder / "prompts.jsonl", [{"prompt": "hi"}] * 9)
    assert run(folder, "whole", eval_steps=1, save_steps=1, max_steps=2) == 0
    return folder


def argv(folder, name, **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / name,
        "eval_size": 4,
        "max_prompt_length": 20,
        "max_new_tokens": 12,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "eval_strategy": "steps" if "eval_steps" in changes else "no",
        "save_strategy": "steps" if "save_steps" in changes else "no",
        "use_cpu": "true",
        "log_completions": "false",
        "disable_tqdm": "true",
        **changes,
    }
    return [str(part) for key, value in values.items() for part in (f"--{key}", value)]


def run(folder, name, **changes) -> int:
    return train.main(argv(folder, name, **changes))


def data(folder, **changes):
    return loading.load_data(*parse(argv(folder, "data", **changes)), byte_tokenizer())


def texts(rows):
    return {row.example.question for row in rows.rows}


def test_any_process_says_why_it_ends(folder, monkeypatch, capsys):
    def fail(*_):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(train, "run", fail)
    for rank in (0, 1):
        monkeypatch.setattr(SwitchConfig, "process_index", rank)
        monkeypatch.setattr(SwitchConfig, "world_size", 2)
        assert run(folder, "broken") == 1
        assert f"error in process {rank}: the loss is nan" in capsys.readouterr().out


# ---------------------------------------------------------------------- before any weights

CHEAP = [
    ({"dataset_name": "absent.jsonl"}, "expected an existing .jsonl file"),
    ({"exclude_dataset_name": "absent.jsonl"}, "expected an existing .jsonl file"),
    ({"dataset_name": "{}/prompts.jsonl"}, "got rows without a response"),
    ({"teacher_model_name_or_path": "{}/other"}, "token '<new>' has id 258 for the teacher"),
    ({"student_layers": 9}, "expected rising layer numbers from 0 to 1"),
    ({"teacher_model_name_or_path": "{}/other"}, "need equal ids (student "),
    (
        {"max_new_tokens": 120},
        "of 20 and a response of 120 tokens need 140 positions, expected at mo",
    ),
    ({"max_response_length": 120}, "need 140 positions, expected at most 128"),
    ({"lm_file": "absent.txt"}, "lm_file: got absent.txt"),
    ({"teacher_quantization": "3bit"}, "teacher_quantization: got '3bit'"),
    ({"lr_scheduler_kwargs": '{"foo": 1}'}, "lr_scheduler_kwargs: got {'foo': 1} for cosine"),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 0.01}'},
        "lr_end (0.01) must be smaller than initial lr",
    ),
    ({"report_to": "wandb"}, "report_to: got ['wandb']"),
    ({"optim": "galore_adamw"}, "optim: got galore_adamw: "),
    ({"fp16": "true"}, "fp16: got true on a CPU, expected a GPU, or bf16"),
    ({"use_liger_kernel": "true"}, "use_liger_kernel: needs the package liger-kernel"),
    ({"output_dir": "{}/rows.jsonl/run"}, "output_dir: cannot write to"),
    ({"output_dir": ""}, "output_dir: got '', expected a folder"),
]


@pytest.mark.parametrize("changes, message", CHEAP, ids=[next(iter(c)) for c, _ in CHEAP])
def test_what_is_cheap_to_tell_is_told_before_any_weights_are_read(
    folder, changes, message, monkeypatch, capsys
):
    def loaded(*_, **__):
        raise AssertionError("weights were read")

    def refused(*_, **__):
        raise RuntimeError("it is not installed")

    monkeypatch.setattr(loading, "load_model", loaded)
    if "output_dir" in changes:
        monkeypatch.setattr(train, "load_data", loaded)
    monkeypatch.setattr(loading, "is_liger_kernel_available", lambda: False)
    monkeypatch.setattr(
        loading, "get_reporting_integration_callbacks", lambda names: [refused] * len(names)
    )
    monkeypatch.chdir(folder)
    changes = {key: str(value).replace("{}/", f"{folder}/") for key, value in changes.items()}
    assert run(folder, "cheap", **changes) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "error: " in out and message in out
    assert not (folder / "cheap").exists()


# ---------------------------------------------------------------------- data


def test_the_rows_held_out_are_those_of_the_split_seed(folder):
    first = texts(data(folder, seed=1)[1])
    assert first == texts(data(folder, seed=2)[1]) and len(first) == 4
    assert first != texts(data(folder, seed=1, split_seed=7)[1])


def test_rows_of_a_test_set_are_neither_trained_on_nor_held_out(folder):
    trained, held_out = data(folder)
    known = trained.rows[:3], held_out.rows[:2]
    test = [{"prompt": r.example.question, "completion": "x"} for rows in known for r in rows]
    exclude = write(folder / "test.jsonl", test)
    less, fewer = data(folder, exclude_dataset_name=exclude)
    assert [r.id for r in less.rows] == [r.id for r in trained.rows[3:]]
    assert [r.id for r in fewer.rows] == [r.id for r in held_out.rows[2:]]
    lines = [row.id for row in known[0]]
    assert less.report.left_out == {"rows that are in test.jsonl": lines}
    assert "left out 2 rows that are in test.jsonl: line" in str(fewer.report)
    # rows to validate on that are named stay, though they are not trained on
    less, named = data(folder, exclude_dataset_name=exclude, eval_dataset_name=exclude)
    assert not texts(less) & texts(named) and len(named) == 4


def test_the_length_of_responses_of_the_data_is_an_option_of_its_own(folder):
    assert max(len(row.completion_ids) for row in data(folder)[0].rows) == 11
    left_out = data(folder, max_new_tokens=6)[0].report.left_out
    assert list(left_out) == ["rows with a response over 6 tokens"]
    assert not data(folder, max_new_tokens=6, max_response_length=11)[0].report.left_out


# ---------------------------------------------------------------------- the folder


def test_two_runs_do_not_write_into_one_folder(folder, capsys):
    with reserved(folder / "shared"):
        assert run(folder, "shared") == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "shared, where another run is still going on" in said
    assert run(folder, "shared") == 0


def test_a_run_that_is_overwritten_leaves_nothing_to_be_taken_for_the_new_one(
    folder, capsys, monkeypatch
):
    pytest.importorskip("peft")
    assert run(folder, "twice", use_peft="true", student_layers="0", lora_r=2) == 0
    out = folder / "twice"
    assert (out / "adapter_config.json").exists() and (out / "base").is_dir()
    for name in ("report.html", "chat_template.jinja", "notes.txt"):
        (out / name).write_text("")
    inside = {"model_name_or_path": out / "base", "overwrite_output_dir": "true"}
    assert run(folder, "twice", **inside) == 1
    assert "which this run begins with" in " ".join(capsys.readouterr().out.split())
    before = {path.name for path in out.iterdir()} - {"notes.txt", "README.md", ".lock"}

    def fail(*_):
        raise FloatingPointError("the loss is nan")

    with monkeypatch.context() as broken:
        broken.setattr(SwitchTrainer, "_next_rows", fail)
        for _ in range(2):  # the second overwrites a run that has saved nothing
            assert run(folder, "twice", overwrite_output_dir="true", save_steps=1) == 1
    assert {path.name for path in (out / "overwritten").iterdir()} == before
    assert run(folder, "twice", overwrite_output_dir="true") == 0
    left = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "config.yaml", "summary.json", "notes.txt"} <= left
    gone = {"adapter_config.json", "adapter_model.safetensors", "base", "report.html"}
    assert not left & {*gone, "chat_template.jinja", "overwritten"}


def test_a_folder_that_holds_no_results_is_free(folder, tmp_path):
    script, config = parse(argv(folder, "free", output_dir=tmp_path))
    record = tmp_path / "config.yaml"
    record.write_text(yaml.safe_dump(run_settings(script, config)))  # killed before its first step
    assert check_output(script, config) is None
    record.write_text("learning_rate: 0.1\n")  # of its user
    with pytest.raises(ValueError, match="holds another run"):
        check_output(script, config)
    record.unlink()
    (tmp_path / "completions.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds another run"):
        check_output(script, config)


def test_a_run_goes_on_with_its_own_options_and_rows_alone(folder, capsys):
    again = dict(eval_steps=1, save_steps=1, max_steps=2, resume_from_checkpoint="last")

    def refusal(**changes):
        assert run(folder, "whole", **again, **changes) == 1
        return " ".join(capsys.readouterr().out.split())

    record = folder / "whole" / "config.yaml"
    whole = record.read_text()
    for text, message in (("a: [1", "not valid YAML"), ("", "got no key: value lines")):
        record.write_text(text)
        assert message in refusal()
    record.write_text(whole)
    write(folder / "rows.jsonl", [{**row, "completion": "la"} for row in ROWS])
    try:
        assert "training data: got rows with the digest" in refusal()
    finally:
        write(folder / "rows.jsonl", ROWS)


def test_a_run_that_goes_on_elsewhere_begins_there_and_takes_nothing_away(folder, capsys):
    first = folder / "whole" / "checkpoint-1"
    on = dict(eval_steps=1, save_steps=1, max_steps=2, resume_from_checkpoint=first)
    assert run(folder, "another") == 0
    before = (folder / "another" / "completions.jsonl").read_bytes()
    assert run(folder, "another", **on) == 1
    assert "another holds another run" in " ".join(capsys.readouterr().out.split())
    assert (folder / "another" / "completions.jsonl").read_bytes() == before
    assert run(folder, "elsewhere", **on) == 0
    again = {**on, "resume_from_checkpoint": "last", "learning_rate": 0.5}
    assert run(folder, "elsewhere", **again) == 1  # it has a config.yaml of its own
    assert "learning_rate: got 0.5" in " ".join(capsys.readouterr().out.split())


def test_the_folder_of_a_model_that_a_run_begins_with_is_not_its_output(folder, capsys):
    before = (folder / "student" / "model.safetensors").read_bytes()
    assert run(folder, "student") == 1
    assert "which this run begins with" in " ".join(capsys.readouterr().out.split())
    assert (folder / "student" / "model.safetensors").read_bytes() == before


def test_stopping_at_once_tells_of_a_checkpoint_where_there_is_one(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    said = {}
    for name in ("whole", "nothing"):
        assert run(folder, name) == 130
        said[name] = "".join(capsys.readouterr().out.split())
    assert said["nothing"] == "stoppedatonce"
    assert "checkpoint-2with--resume_from_checkpointlast" in said["whole"]


def test_the_table_says_which_checkpoint_it_is_of(folder, capsys):
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["best_metric"] == "rouge_l" and "checkpoint-" in summary["best_checkpoint"]
    for steps, said in ((100, True), (50, False)):
        console = Console(width=100)
        best = {"best_checkpoint": "runs/a-1/checkpoint-50", "steps": steps}
        print_summary({**summary, **best}, console)
        out = capsys.readouterr().out
        assert ("after: checkpoint-50, best rouge_l on these rows" in out) is said
