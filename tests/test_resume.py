"""Interrupted runs: Ctrl-C, kill -9, broken checkpoints, full disks, other runs' folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file

from switchkd.checkpoint import check_checkpoint, last_checkpoint
from switchkd.train import main

ROWS = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 5)} for i in range(24)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A teacher, a student and data on disk, and an uninterrupted run of them."""
    folder = tmp_path_factory.mktemp("run")
    import torch

    for name, seed in (("teacher", 1), ("student", 2)):
        tiny_model(vocab_size=258, seed=seed, dtype=torch.float32).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.txt").write_text("All happy families are alike; each unhappy one is not. " * 9)
    arguments = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "eval_size": 4,
        "max_prompt_length": 20,
        "max_new_tokens": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lm_file": folder / "text.txt",
        "max_steps": 8,  # crosses an epoch: 20 rows are 5 steps
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 9,
        "switch_tau0": 0.5,
        "use_cpu": "true",
        "log_completions": "false",
        "disable_tqdm": "true",
    }
    setup = Setup(folder, arguments)
    assert setup.run("whole") == 0
    return setup


class Setup:
    def __init__(self, folder: Path, arguments: dict):
        self.folder, self.arguments = folder, arguments

    def argv(self, name: str, **changes) -> list[str]:
        values = {**self.arguments, "output_dir": self.folder / name, **changes}
        return [part for key, value in values.items() for part in (f"--{key}", str(value))]

    def run(self, name: str, **changes) -> int:
        return main(self.argv(name, **changes))

    def start(self, name: str, launcher: tuple = (), **changes) -> subprocess.Popen:
        """A training in processes of a group of their own, as those of a terminal are."""
        python = [sys.executable, "-m", *launcher]
        command = [*python, "switchkd.train", *self.argv(name, **changes)]
        roots = [str(Path(__file__).parent.parent / part) for part in (".", "kernels")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def assert_same_as_whole(self, name: str):
        """Weights, tokens and losses, bit for bit."""
        whole, other = self.folder / "whole", self.folder / name
        a, b = (load_file(f / "checkpoint-8" / "model.safetensors") for f in (whole, other))
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].equal(b[key]), key
        completions = "completions.jsonl"
        assert (whole / completions).read_bytes() == (other / completions).read_bytes()
        assert losses(whole) == losses(other)
        sums = [json.loads((f / "summary.json").read_text()) for f in (whole, other)]
        for key in ("before", "teacher_share", "rollout_tokens", "steps"):
            assert strip(sums[0][key]) == strip(sums[1][key])
        assert strip(sums[0]["after"]) == strip(sums[1]["after"])


def strip(value):
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value


def losses(folder: Path) -> dict:
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    entries = [e for e in state["log_history"] if "loss" in e]
    return {e["step"]: (e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries}


def wait_for_step(process, folder: Path, step: int):
    """Until the rollouts of `step` are written (two minutes at most)."""
    path = folder / "completions.jsonl"
    for _ in range(1200):
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never reached")


def test_every_run_writes_its_summary(setup):
    summary = json.loads((setup.folder / "whole" / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"cross_entropy", "kl", "jsd", "rouge_l"} <= summary[when].keys()
    assert 0 < summary["teacher_share"] < 1
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    assert {"prompt_copied", "another_reference"} == summary["floors"].keys()
    assert (setup.folder / "whole" / "model.safetensors").exists()
    assert len(losses(setup.folder / "whole")) == 8


def test_kill_9_in_the_middle_and_resume_is_bit_exact(setup):
    process = setup.start("killed")
    wait_for_step(process, setup.folder / "killed", 6)
    process.kill()
    process.wait()
    assert not (setup.folder / "killed" / "summary.json").exists()
    with (setup.folder / "killed" / "completions.jsonl").open("a") as file:
        file.write('{"step": 6, "row": 1, "prom')  # a line that the kill cut off
    assert setup.run("killed", resume_from_checkpoint="last") == 0
    setup.assert_same_as_whole("killed")


def test_ctrl_c_saves_and_resume_is_bit_exact(setup):
    process = setup.start("stopped")
    wait_for_step(process, setup.folder / "stopped", 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "continue with --resume_from_checkpoint last" in " ".join(output.split())
    assert last_checkpoint(setup.folder / "stopped") is not None
    assert setup.run("stopped", resume_from_checkpoint="last") == 0
    setup.assert_same_as_whole("stopped")


TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
HALF = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}


def assert_about_the_same(one: Path, two: Path):
    """Tokens bit for bit, losses as far as sums over two processes leave them equal."""

    def written(folder):
        lines = (json.loads(line) for line in (folder / "completions.jsonl").open())
        return sorted((r["step"], r["row"], r["tokens"], r["from_teacher"]) for r in lines)

    assert written(one) == written(two)
    for step, values in losses(one).items():
        assert losses(two)[step] == pytest.approx(values, rel=1e-4)


def test_two_processes_train_as_one(setup):
    process = setup.start("two", TWO, **HALF)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert_about_the_same(setup.folder / "whole", setup.folder / "two")


def test_ctrl_c_reaches_two_processes_and_their_launcher(setup):
    """The launcher hands on what the terminal has sent to all: each process gets it twice."""
    process = setup.start("two-stopped", TWO, **HALF)
    wait_for_step(process, setup.folder / "two-stopped", 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output.count("stopping after this step and saving") == 1, output
    assert output.count("continue with --resume_from_checkpoint last") == 1, output
    assert "stopped at once" not in output
    checkpoint = last_checkpoint(setup.folder / "two-stopped")
    assert checkpoint is not None and not checkpoint.endswith("-8")
    assert setup.run("two-stopped", resume_from_checkpoint="last") == 0
    assert_about_the_same(setup.folder / "whole", setup.folder / "two-stopped")


def test_a_signal_to_one_of_two_processes_stops_both(setup):
    process = setup.start("one-of-two", TWO, **HALF)
    wait_for_step(process, setup.folder / "one-of-two", 3)
    second = [p for p in psutil.Process(process.pid).children() if "switchkd.train" in p.cmdline()]
    second[-1].send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output.count("continue with --resume_from_checkpoint last") == 1, output
    checkpoint = last_checkpoint(setup.folder / "one-of-two")
    assert checkpoint is not None and not checkpoint.endswith("-8")


def test_a_checkpoint_cut_off_while_saving_is_passed_over(setup, capsys):
    folder = setup.folder / "whole"
    broken = folder / "checkpoint-9"
    broken.mkdir()
    assert last_checkpoint(folder).endswith("checkpoint-8")
    (broken / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-9: run_state\.json is missing"):
        check_checkpoint(broken)
    (broken / "run_state.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"checkpoint-9: model\.safetensors is broken"):
        check_checkpoint(broken)
    assert setup.run("whole", resume_from_checkpoint=broken) == 1
    assert "model.safetensors is broken" in " ".join(capsys.readouterr().out.split())
    for path in broken.iterdir():
        path.unlink()
    broken.rmdir()


def test_the_folder_of_another_run_is_not_overwritten(setup, capsys):
    before = (setup.folder / "whole" / "completions.jsonl").read_bytes()
    assert setup.run("whole") == 1
    assert "holds another run; expected a new folder" in " ".join(capsys.readouterr().out.split())
    assert (setup.folder / "whole" / "completions.jsonl").read_bytes() == before


def test_resuming_with_other_settings_is_refused(setup, capsys):
    assert setup.run("whole", resume_from_checkpoint="last", switch_lambda=0.3) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "switch_lambda: got 0.3, expected 0.1 as in the run to resume" in text
    assert setup.run("nothing", resume_from_checkpoint="last") == 1
    assert "no intact checkpoint" in " ".join(capsys.readouterr().out.split())


def test_bad_input_ends_with_one_line_and_code_1(setup, capsys):
    def message(name, **changes):
        assert setup.run(name, **changes) == 1
        return " ".join(capsys.readouterr().out.split())

    absent = setup.folder / "absent"
    assert "cannot load the tokenizer" in message("a", model_name_or_path=absent)
    assert "cannot load the tokenizer" in message("a", model_name_or_path=absent), "not taken"
    kept = (setup.folder / "whole" / "completions.jsonl").read_bytes()
    overwrite = {"model_name_or_path": absent, "overwrite_output_dir": "true"}
    assert "cannot load the tokenizer" in message("whole", **overwrite)
    assert (setup.folder / "whole" / "completions.jsonl").read_bytes() == kept
    assert last_checkpoint(setup.folder / "whole").endswith("checkpoint-8")
    (setup.folder / "cut.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"')
    assert "cut.jsonl: got 1 malformed rows" in message(
        "b", dataset_name=setup.folder / "cut.jsonl"
    )
    (setup.folder / "empty.jsonl").write_text("")
    assert "got no usable rows" in message("c", dataset_name=setup.folder / "empty.jsonl")
    assert "unknown option --lmbdaa; did you mean --lmbda?" in message("d", lmbdaa=1)


def test_a_full_disk_loses_nothing_already_written(setup, tmp_path):
    """On a small tmpfs: the failing checkpoint is removed, the one before it stays intact."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 3 * sum(f.stat().st_size for f in (setup.folder / "whole/checkpoint-2").iterdir()) // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        process = setup.start("disk", output_dir=disk / "out")
        output, _ = process.communicate(timeout=120)
        text = " ".join(output.split())
        assert process.returncode == 1, output
        assert "could not save checkpoint-4" in text and "No space left" in text
        assert "the last intact checkpoint is" in text
        left = last_checkpoint(disk / "out")
        assert left is not None and left.endswith("checkpoint-2")
        assert not (disk / "out" / "checkpoint-4").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
