"""The threshold for a wanted teacher's share: on made-up divergences, in training, from a run."""

import json
import math

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from rich.console import Console
from test_trainer import ROWS, make

from switchkd.calibration import (
    TOLERANCE,
    Divergences,
    calibrate,
    check,
    curve,
    print_calibration,
    solve,
)
from switchkd.config import SwitchConfig
from switchkd.policies import AdaSwitch, Student, Switch
from switchkd.train import main


def made_up(scale=1.0, rows=60, length=40, seed=0):
    """Divergences in [0, scale] with no regard to position."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    positions = torch.arange(length).expand(rows, length)
    return positions.flatten(), values.flatten()


def measured(policy, scale=1.0):
    positions, values = made_up(scale)
    tau = policy.threshold(None, 0, torch.zeros_like(positions), positions)
    return Divergences(positions, values, int((values > tau).sum()))


@pytest.mark.parametrize("schedule", ["exponential", "growth"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_lambda_alone_is_chosen_where_it_can_be(schedule, target):
    policy = Switch(schedule=schedule, max_new_tokens=40)
    found = solve(measured(policy), policy, target)
    assert found.tau0 == 1.0 and found.decay > 0
    assert measured(found).teacher_share == pytest.approx(target, abs=0.005)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_other_schedules_are_set_by_tau0(schedule, target):
    policy = Switch(schedule=schedule, max_new_tokens=40)
    found = solve(measured(policy), policy, target)
    assert found.decay == policy.decay
    assert measured(found).teacher_share == pytest.approx(target, abs=0.005)
    if schedule == "constant":
        assert found.tau0 == pytest.approx(1 - target, abs=0.02)  # divergences are uniform


def test_tau0_falls_only_where_lambda_cannot_reach_the_share():
    # With tau0 = 1 the first of 40 tokens is never the teacher's: at most 97.5 %.
    policy = Switch()
    assert solve(measured(policy), policy, 0.97).tau0 == 1.0
    found = solve(measured(policy), policy, 0.985)
    assert found.tau0 < 1
    assert measured(found).teacher_share == pytest.approx(0.985, abs=0.002)
    # and it rises where lambda = 0 lets the teacher write too much
    low = Switch(tau0=0.2)
    found = solve(measured(low), low, 0.5)
    assert found.decay == 0 and found.tau0 == pytest.approx(0.5, abs=0.02)


def test_a_threshold_in_nats_stays_below_ln_2():
    policy = Switch(schedule="constant", base="e", tau0=0.3)
    found = solve(measured(policy, math.log(2)), policy, 0.01)
    assert found.tau0 <= math.log(2)
    assert measured(found, math.log(2)).teacher_share == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize("feedback", [0.6, -0.9, -3.0])
def test_rollouts_correct_the_prediction(feedback):
    """The text answers the threshold: divergences change with the share that the teacher writes.
    Where they work against it strongly, predictions overshoot to and fro."""
    shares = []

    def measure(policy):
        share = 0.5
        for _ in range(200):  # the share that agrees with itself
            wanted = measured(policy, scale=math.exp(feedback * (share - 0.5))).teacher_share
            share += 0.1 * (wanted - share)
        result = measured(policy, scale=math.exp(feedback * (share - 0.5)))
        shares.append(result.teacher_share)
        return result

    policy, result = calibrate(Switch(), 0.6, measure)
    assert result.teacher_share == shares[-1] == pytest.approx(0.6, abs=TOLERANCE)
    assert result.rollouts == len(shares) > 1
    assert (policy.tau0, policy.decay) == (result.switch_tau0, result.switch_lambda)


@pytest.mark.parametrize(
    "policy, target, message",
    [
        (Switch(), 1.5, "got 1.5, expected a share between 0 and 1"),
        (Switch(), 0.0, "got 0.0, expected a share between 0 and 1"),
        (Student(), 0.5, "got rollout_policy student, expected switch"),
        (AdaSwitch(K=2.0, L=4), 0.5, "got rollout_policy adaswitch, expected switch"),
        (Switch(schedule="random"), 0.5, "got switch_schedule random, whose share is switch_rate"),
    ],
)
def test_where_nothing_can_be_chosen(policy, target, message):
    with pytest.raises(ValueError, match=f"target_teacher_share: {message}"):
        check(policy, target)


def test_a_share_that_cannot_be_reached_is_refused_with_the_nearest():
    def measure(policy):  # two equal models: all divergences are 0
        positions, values = made_up(scale=0.0)
        return Divergences(positions, values, 0)

    with pytest.raises(ValueError, match=r"got 0.5, expected one that .* the nearest was 0.000"):
        calibrate(Switch(), 0.5, measure)
    # a floor under the threshold, above most divergences
    with pytest.raises(ValueError, match=r"exponential reaches; the nearest was 0\.1"):
        calibrate(Switch(tau_min=0.9), 0.5, measured)


@pytest.mark.parametrize("reached, near", [(0.001, False), (0.004, False), (0.008, True)])
def test_a_small_share_is_reached_within_half_of_itself(reached, near):
    def measure(policy):
        positions, values = made_up()
        return Divergences(positions, values, round(reached * len(values)))

    if near:
        assert calibrate(Switch(), 0.01, measure)[1].teacher_share == pytest.approx(0.008, abs=1e-3)
    else:
        with pytest.raises(ValueError, match=f"the nearest was {reached:.3f}"):
            calibrate(Switch(), 0.01, measure)


def test_a_few_tokens_are_blamed_before_the_schedule():
    def measure(policy):  # one row of seven tokens
        return Divergences(torch.arange(7), torch.full((7,), 0.5, dtype=torch.float64), 3)

    with pytest.raises(ValueError, match=r"expected more calibration_rows \(7 tokens tell"):
        calibrate(Switch(), 0.5, measure)


def test_parts_of_several_ranks_join_to_the_whole():
    whole = measured(Switch())
    parts = [
        Divergences(whole.positions[i::2], whole.values[i::2], whole.teacher_tokens // 2 + i * odd)
        for odd in [whole.teacher_tokens % 2]
        for i in (0, 1)
    ]
    joined = Divergences.join(parts)
    assert joined.teacher_share == whole.teacher_share
    assert solve(joined, Switch(), 0.4) == solve(whole, Switch(), 0.4)
    assert [row["tokens"] for row in curve(joined, Switch())] == [
        60 * n for n in (1, 1, 2, 4, 8, 16, 8)
    ]


def test_the_printed_curve_holds_quantiles_thresholds_and_shares():
    policy, result = calibrate(Switch(), 0.5, measured)
    assert [(r["first"], r["last"]) for r in result.curve][-2:] == [(16, 31), (32, 39)]
    last = result.curve[-1]
    assert last["divergence"] == pytest.approx([0.1, 0.5, 0.9], abs=0.05)
    assert last["tau"] == pytest.approx([math.exp(-policy.decay * t) for t in (32, 39)])
    assert sum(r["tokens"] * r["teacher_share"] for r in result.curve) / 2400 == pytest.approx(
        result.teacher_share
    )
    console = Console(record=True, width=90)
    print_calibration(result, "bits", console)
    text = console.export_text()
    assert "JSD in bits" in text and "32 - 39" in text and "█" in text
    assert f"switch_lambda {result.switch_lambda:.4g}" in text
    assert f"{result.rollouts}: {result.teacher_share:.1%}" in text


# ------------------------------------------------------------------ in training


def test_a_trainer_chooses_before_it_trains(tmp_path):
    options = dict(switch_tau0=1.0, max_new_tokens=16, lmbda=1.0, rows=ROWS * 8)
    trainer = make(tmp_path / "a", target_teacher_share=0.5, learning_rate=1e-6, **options)
    trainer.train()
    chosen = trainer.calibration
    assert chosen["teacher_share"] == pytest.approx(0.5, abs=TOLERANCE)
    assert (trainer.args.switch_lambda, trainer.args.switch_tau0) == (
        chosen["switch_lambda"], chosen["switch_tau0"],
    )  # fmt: skip
    assert trainer.policy.decay == chosen["switch_lambda"] != 0.1
    # Other noise than the calibration's: the share holds for other rollouts of these rows.
    rows = trainer.train_dataset.rows
    fresh = trainer.roll_out(rows, epoch=5)
    assert fresh.teacher_tokens() / int(fresh.lengths.sum()) == pytest.approx(0.5, abs=0.08)
    again = make(tmp_path / "b", target_teacher_share=0.5, **options)
    assert again.calibrate().to_dict() == chosen
    with pytest.raises(ValueError, match="target_teacher_share: got 0.5, expected rollouts"):
        SwitchConfig(use_cpu=True, target_teacher_share=0.5, lmbda=0.0)
    with pytest.raises(ValueError, match="calibration_rows: got 0, expected an integer >= 1"):
        SwitchConfig(use_cpu=True, calibration_rows=0)


def test_a_calibration_that_fails_leaves_the_policy_that_was(tmp_path):
    trainer = make(tmp_path, target_teacher_share=0.001, lmbda=1.0)
    before = trainer.policy
    with pytest.raises(ValueError, match=r"target_teacher_share: got 0\.001, expected more"):
        trainer.calibrate()
    assert trainer.policy is before and trainer.calibration is None


def test_a_run_stores_its_choice_and_resumes_with_it(tmp_path, capsys):
    for name, seed in (("teacher", 1), ("student", 2)):
        model = tiny_model(vocab_size=258, seed=seed, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    given = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "target_teacher_share": 0.4,
        "eval_size": 2,
        "max_new_tokens": 16,
        "max_prompt_length": 40,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": "true",
        "log_completions": "false",
        "disable_tqdm": "true",
    }

    def run(**changes):
        values = {**given, **changes}
        code = main([part for key, value in values.items() for part in (f"--{key}", str(value))])
        return code, " ".join(capsys.readouterr().out.split())

    code, text = run()
    assert code == 0 and "for a teacher's share of 40%: switch_tau0" in text
    chosen = json.loads((tmp_path / "run" / "summary.json").read_text())["calibration"]
    assert chosen["teacher_share"] == pytest.approx(0.4, abs=TOLERANCE)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for name in ("switch_tau0", "switch_lambda"):
        assert stored[name] == chosen[name]
    before = (tmp_path / "run" / "completions.jsonl").read_text()
    code, text = run(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    assert code == 0 and "teacher's share of" not in text, "nothing is chosen anew"
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["calibration"] == chosen
    assert (tmp_path / "run" / "completions.jsonl").read_text() == before
    code, text = run(resume_from_checkpoint="last", target_teacher_share=0.6)
    assert code == 1 and "target_teacher_share: got 0.6, expected 0.4 as in the run" in text
