"""benchmarks/experiments: arms that training takes, runs that are shared, statistics, tables."""

import csv
import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import arms, intervention, misguidance, runs, tables
from switchkd.arguments import ScriptArguments
from switchkd.config import SwitchConfig

QUIET = Console(quiet=True)


def planned(tmp_path, *flags):
    return runs.Runs(command.parse(["decay", "--runs", str(tmp_path), *flags]), QUIET)


@pytest.mark.parametrize("scale", runs.SCALES)
def test_every_arm_is_a_configuration_of_training(scale, tmp_path):
    plan = planned(tmp_path, "--scale", scale)
    compared = (arms.METHODS, arms.DECAY, arms.SCHEDULES, arms.LOSSES, arms.sizes(plan.scale))
    script, config = ({f.name for f in fields(c)} for c in (ScriptArguments, SwitchConfig))
    for arm in (arm for some in compared for arm in some.values()):
        options = plan.distilled(arm, seed=1)
        options = {k: v for k, v in options.items() if k not in script - config}
        assert SwitchConfig(**options, output_dir=str(tmp_path), use_cpu=True).max_steps > 0


def test_runs_that_differ_in_defaults_only_are_one(tmp_path):
    plan = planned(tmp_path)
    path = {name: plan.path(plan.distilled(arm, 1)) for name, arm in arms.DECAY.items()}
    assert path["λ = 1/10"] == plan.path(plan.distilled(arms.SCHEDULES["exponential"], 1))
    assert len(set(path.values())) == len(path)
    assert path["λ = 1/10"] != plan.path(plan.distilled(arms.SWITCH, 2))
    other = planned(tmp_path, "--max_steps", "7")
    assert path["λ = 1/10"] != other.path(other.distilled(arms.SWITCH, 1))


def test_only_what_is_missing_is_trained(tmp_path, monkeypatch):
    plan, trained = planned(tmp_path, "--seeds", "2"), []

    def run(command, **_options):
        folder = next(x for x in command if x.startswith("--output_dir=")).split("=", 1)[1]
        trained.append(folder)
        with open(f"{folder}/summary.json", "w", encoding="utf-8") as file:
            json.dump({"after": {"kl": len(trained)}, "teacher_share": 0.5}, file)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs.subprocess, "run", run)
    plan.train([arms.SWITCH])
    assert len(trained) == 4  # a start and a run for each seed
    assert [s["kl"] for s in plan.summaries(arms.SWITCH)] == [3, 4]
    assert plan.summaries(arms.SWITCH)[0]["teacher_share"] == 0.5
    plan.train([arms.SWITCH, arms.SCHEDULES["linear"]])
    assert len(trained) == 6


def test_a_failed_run_says_where_its_log_is(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    with pytest.raises(RuntimeError, match=r"failed: exit 3, see log\.txt"):
        planned(tmp_path, "--seeds", "1").train([arms.SWITCH])


def test_mean_and_deviation():
    assert runs.mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    mean, deviation = runs.mean_and_deviation([4.0])
    assert mean == 4.0 and math.isnan(deviation)
    assert tables.cell((mean, deviation)) == "4" and tables.cell((2.0, 0.5)) == "2 ± 0.5"
    assert runs.mean_and_deviation([1.0, None]) is None
    assert all(map(math.isnan, runs.mean_and_deviation([1.0, math.nan])))


def test_spearman_is_of_ranks_and_shares_those_of_equals():
    assert misguidance.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert misguidance.spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    # ranks 0.5, 0.5, 2 against 0, 1, 2: covariance 1.5 over sqrt(1.5 * 2)
    assert misguidance.spearman([5, 5, 7], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(misguidance.spearman([1, 2], [1, 2]))
    assert math.isnan(misguidance.spearman([1, 1, 1], [1, 2, 3]))


def test_interventions_are_counted_by_position_and_by_divergence():
    record = {"from_teacher": [0, 1, 0, 0, 1], "divergence": [0.0, 0.95, 0.15, 0.15, 0.31]}
    record["threshold"] = [1.0, 0.9, 0.8, 0.7, 0.1]
    by_position, by_divergence = intervention.count([record, record])
    assert by_position[0][:2] == [8, 2] and by_position[1][:2] == [2, 2]
    assert by_position[1][2:] == pytest.approx([0.62, 0.2])
    shares = {intervention.BOUNDS[k]: v[:2] for k, v in by_divergence.items()}
    assert shares == {0: [2, 0], 0.1: [4, 0], 0.3: [2, 2], 0.9: [2, 2]}


def test_interventions_deviate_between_seeds(tmp_path):
    def run(*teacher):
        n = len(teacher)
        return [{"from_teacher": teacher, "divergence": [0.15] * n, "threshold": [0.1] * n}]

    intervention.analyse([run(0, 1, 1, 1), run(0, 0, 1, 0, 1)], tmp_path, QUIET)
    with (tmp_path / "intervention_by_position.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["tokens"], first["teacher_share"]) == ("8", "0.5")
    assert float(first["teacher_share_deviation"]) == pytest.approx(math.sqrt(0.125), rel=1e-5)
    assert (second["tokens"], second["teacher_share_deviation"]) == ("1", "nan")  # of one seed


def test_a_table_and_a_plot_of_arms(tmp_path):
    found = {
        name: [dict.fromkeys(runs.MEASURES, value + i) for i in range(2)]
        for name, value in (("one", 1.0), ("two", 5.0))
    }
    found["two"][0]["teacher_share"] = None
    tables.compare("decay", "decay", found, tmp_path, QUIET)
    with (tmp_path / "decay.csv").open(encoding="utf-8") as file:
        one, two = csv.DictReader(file)
    assert one["arm"] == "one" and float(one["kl_mean"]) == 1.5 and one["seeds"] == "2"
    assert float(two["rouge_l_deviation"]) == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert two["teacher_share_mean"] == "nan"
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["decay", "--seeds", "0"])
    assert "--seeds: got 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_two_experiments_for_real(tmp_path):
    flags = ["--seeds", "1", "--max_steps", "1", "--sft_steps", "1", "--eval_size", "4"]
    flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--probe_size", "8"]
    assert command.main(["intervention", "misguidance", *flags]) == 0
    with (tmp_path / "intervention_by_position.csv").open(encoding="utf-8") as file:
        shares = [float(row["teacher_share"]) for row in csv.DictReader(file)]
    assert shares[0] < shares[-1]  # the threshold falls
    with (tmp_path / "misguidance.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["rollouts"] for row in rows} == {"student", "SWITCH"}
    assert sum(float(row["rollouts_a_seed"]) for row in rows if row["rollouts"] == "SWITCH") > 4
