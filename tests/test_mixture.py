"""DistiLLM's scheduler and replay buffer: the rule, the batch layout, and resumption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from test_trainer import ROWS, make
from transformers import TrainerCallback

from switchkd.data import Example, Row, Rows
from switchkd.mixture import Mixture, Text

LINES = [Row([5], [6, 1], Example((), ("x",), line)) for line in range(1, 2001)]


def mixture(**options):
    given = dict(seed=3, lmbda=0.5)
    return Mixture(Rows(LINES, None), **{**given, **options})


def rolled_out(row, step=1, tokens=(7, 8)):
    text = Text(row, "rollout", list(tokens), step)
    text.from_teacher = torch.tensor([False, True])
    return text


def alone(objects):
    return objects


def test_the_share_rises_when_validation_worsens_by_a_tenth_since_the_last_rise():
    """loss >= reference + 0.1: share += 0.1, and only then the reference moves."""
    mix = mixture(lmbda=0.0, adaptive_lmbda=True)
    losses = [2.0, 1.5, 2.09, 2.1, 2.15, 2.25, 2.0, 2.3, 2.4]
    shares = []
    for step, loss in enumerate(losses):
        mix.validated(loss, step)
        mix.validated(loss + 9, step)  # the same step, evaluated again after it was resumed
        shares.append(round(mix.share, 10))
    assert shares == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3]
    for step in range(100, 130):
        mix.validated(float(step), step)
    assert mix.share == 1.0


def test_a_fixed_share_stays():
    mix = mixture(lmbda=0.5)
    for step, loss in enumerate([1.0, 5.0]):
        mix.validated(loss, step)
    assert mix.share == 0.5


@pytest.mark.parametrize(
    "ratio, progress, fresh",
    [("decreasing", 0.25, 0.75), ("constant", 0.25, 0.5), ("increasing", 0.25, 0.25)],
)
def test_a_full_buffer_takes_over_a_part_of_the_generated_rows(ratio, progress, fresh):
    mix = mixture(replay_capacity=4, replay_ratio=ratio)
    before = mix.choose(LINES, 0, progress)
    assert "replay" not in before, "until the buffer is full all generated rows are fresh"
    mix.keep([rolled_out(row) for row in LINES[:4]], alone)
    after = mix.choose(LINES, 0, progress)
    for source, share in (("data", 0.5), ("rollout", 0.5 * fresh), ("replay", 0.5 - 0.5 * fresh)):
        assert after.count(source) / len(LINES) == pytest.approx(share, abs=0.04)
    assert [s == "data" for s in before] == [s == "data" for s in after]


def test_the_oldest_samples_leave_the_buffer():
    mix = mixture(replay_capacity=3)
    for step, row in enumerate(LINES[:5], start=1):
        mix.keep([rolled_out(row, step), Text(row)], alone)
    assert [(row, step) for row, step, *_ in mix.buffer] == [(3, 3), (4, 4), (5, 5)]


def test_a_replayed_row_brings_its_own_prompt_and_writers():
    mix = mixture(lmbda=1.0, replay_capacity=1, replay_ratio="increasing")
    mix.keep([rolled_out(LINES[41], step=9)], alone)
    (text,) = mix.draw(LINES[:1], 0, 0.0)
    assert (text.source, text.row, text.step, text.tokens) == ("replay", LINES[41], 9, [7, 8])
    assert text.columns()["from_teacher"].tolist() == [False, True]


def test_layout_changes_neither_the_choice_nor_the_buffer():
    def step(parts):
        """Two optimizer steps of rows that are dealt to `parts` ranks."""
        mixes = [mixture(replay_capacity=16) for _ in range(parts)]
        drawn = {}
        for number in (1, 2):
            rows = LINES[number * 40 : (number + 1) * 40]
            texts = [m.draw(rows[i::parts], 0, 0.1) for i, m in enumerate(mixes)]
            for text in (t for part in texts for t in part if t.source == "rollout"):
                text.tokens, text.from_teacher = [text.row.id], torch.tensor([False])
                text.step = number
            gathered = [[] for _ in mixes]
            for part, mix, kept in zip(texts, mixes, gathered, strict=True):
                mix.keep(part, lambda own, kept=kept: kept.extend(own) or [])
            everything = [entry for kept in gathered for entry in kept]
            for mix in mixes:
                mix.keep([], lambda _own, all_of=everything: all_of)
            for part, own in enumerate(texts):
                for row, text in zip(rows[part::parts], own, strict=True):
                    drawn[row.id] = (text.source, text.row.id, text.tokens)
        assert all(list(m.buffer) == list(mixes[0].buffer) for m in mixes)
        return drawn, list(mixes[0].buffer)

    one = step(1)
    assert {source for source, *_ in one[0].values()} == {"data", "rollout", "replay"}
    assert one == step(2) == step(4)


def test_the_state_survives_json():
    mix = mixture(lmbda=0.3, adaptive_lmbda=True, replay_capacity=3)
    mix.validated(1.0, 1)
    mix.validated(1.2, 2)
    mix.keep([rolled_out(row) for row in LINES[:5]], alone)
    again = mixture(lmbda=0.3, adaptive_lmbda=True, replay_capacity=3)
    again.load(json.loads(json.dumps(mix.state())))
    assert again.state() == mix.state() and again.share == 0.4
    rows = LINES[100:300]
    for a, b in zip(mix.draw(rows, 1, 0.9), again.draw(rows, 1, 0.9), strict=True):
        assert (a.source, a.row, a.tokens, a.step) == (b.source, b.row, b.tokens, b.step)


def test_a_share_that_does_not_adapt_is_that_of_the_options():
    again = mixture(lmbda=0.9)
    again.load(mixture(lmbda=0.3).state())
    assert again.share == 0.9


# ------------------------------------------------------------------ in training

DISTILLM = dict(
    method="distillm", lmbda=0.7, replay_capacity=5, max_steps=8, per_device_train_batch_size=4,
    learning_rate=0.05, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    save_total_limit=9, load_best_model_at_end=False,
)  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").open()]


def test_replayed_rows_are_trained_on_marked_and_not_counted_as_rollouts(tmp_path):
    trainer = make(tmp_path, **DISTILLM)
    trainer.mixture.reference = 5.0  # a loss that the untrained student has not
    trainer.train()
    lines = records(tmp_path)
    replayed = [line for line in lines if "replay_of" in line]
    fresh = {(r["step"], r["row"]): r for r in lines if "replay_of" not in r}
    assert replayed and len(fresh) + len(replayed) == len(lines)
    for line in replayed:
        original = fresh[line["replay_of"], line["row"]]
        assert line["step"] > line["replay_of"]
        assert line["tokens"] == original["tokens"] and line["prompt"] == original["prompt"]
        assert line["divergence"] == [None] * len(line["tokens"])
    assert trainer.totals["tokens"] == sum(len(r["tokens"]) for r in fresh.values())
    logs = [entry for entry in trainer.state.log_history if "mixture/lmbda" in entry]
    assert [e["mixture/replay"] * 4 for e in logs] == [
        sum(r["step"] == step for r in replayed) for step in range(1, 9)
    ]
    assert trainer.mixture.share > 0.7, "validation is worse than the reference"


def test_the_loss_of_a_replayed_row_is_that_of_its_old_text_under_todays_models(tmp_path):
    from switchkd_kernels import divergence_loss

    trainer = make(tmp_path, lmbda=1.0, replay_capacity=1, replay_ratio="increasing", rows=ROWS[:4],
                   rollout_policy="student")  # fmt: skip
    row = trainer.train_dataset.rows[2]
    trainer.mixture.keep([rolled_out(row, step=0, tokens=(40, 41))], alone)
    ids = torch.tensor([[*row.prompt_ids, 40, 41]])
    at = slice(len(row.prompt_ids) - 1, ids.shape[1] - 1)
    with torch.no_grad():
        pair = trainer.teacher(ids).logits[0, at], trainer.model(ids).logits[0, at]
    want = divergence_loss(*pair, kind="skew_reverse_kl", alpha=0.1).item()
    trainer.train()  # at progress 0 all four rows are replayed
    assert trainer.totals["tokens"] == 0
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(want, rel=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_resumed_run_is_bit_equal(tmp_path):
    whole = make(tmp_path / "whole", **DISTILLM)
    whole.evaluate()
    whole.train()
    first = make(tmp_path / "part", callbacks=[StopAt(4)], **DISTILLM)
    first.evaluate()
    first.train()
    assert first.state.global_step == 4 and len(first.mixture.buffer) == 5
    again = make(tmp_path / "part", **DISTILLM)
    checkpoint = str(tmp_path / "part" / "checkpoint-4")
    again.load_run_state(checkpoint)
    again.train(resume_from_checkpoint=checkpoint)
    assert again.mixture.state() == whole.mixture.state()
    assert records(tmp_path / "part") == records(tmp_path / "whole")
    assert any(r["step"] > 4 and r.get("replay_of", 9) <= 4 for r in records(tmp_path / "part"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_do_not_matter(tmp_path):
    options = {**DISTILLM, "max_steps": 5}
    whole = make(tmp_path / "1", **options)
    split = make(
        tmp_path / "2",
        **{**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    for trainer in (whole, split):
        trainer.train()

    def written(folder):
        return [(r["step"], r["row"], r.get("replay_of"), r["tokens"]) for r in records(folder)]

    assert written(tmp_path / "1") == written(tmp_path / "2")
    assert whole.mixture.buffer == split.mixture.buffer
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_two_processes_choose_replay_and_schedule_as_one(tmp_path):
    """Replay, scheduler and calibration, with per-rank rollouts of one global batch."""
    for name, seed in (("teacher", 1), ("student", 2)):
        model = tiny_model(vocab_size=258, seed=seed, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    given = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "target_teacher_share": 0.5,
        "adaptive_lmbda": "true",
        "lmbda": 0.6,
        "replay_capacity": 6,
        "learning_rate": 0.05,
        "eval_size": 4,  # 20 rows are left: no batch that ranks would fill up with others
        "max_new_tokens": 12,
        "max_prompt_length": 40,
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": "false",
        "use_cpu": "true",
        "ddp_backend": "gloo",
        "log_completions": "false",
        "disable_tqdm": "true",
    }
    roots = [str(Path(__file__).parent.parent / part) for part in (".", "kernels")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        values = {**given, "output_dir": folder, "per_device_train_batch_size": 4 // ranks}
        argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        command = [sys.executable, "-m", *launch, "switchkd.train", *argv]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        state = json.loads((folder / "checkpoint-6" / "run_state.json").read_text())
        lines = [(r["step"], r["row"], r.get("replay_of", 0), r["tokens"]) for r in records(folder)]
        tau = yaml.safe_load((folder / "config.yaml").read_text())["switch_lambda"]
        found[ranks] = state["mixture"], sorted(lines), tau
    one, two = found[1], found[2]
    assert one[1] == two[1] and any(replay_of for _, _, replay_of, _ in one[1])
    assert len(one[0]["buffer"]) == 6 and one[0]["buffer"] == two[0]["buffer"]
    assert one[0]["reference"] == pytest.approx(two[0]["reference"], rel=1e-6)
    assert one[2] == pytest.approx(two[2], rel=1e-4)
