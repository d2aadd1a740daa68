"""Presets of published methods: their constants, what wins over them, and their losses by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from test_trainer import ROWS, gradient, make

from switchkd.command_line import parse
from switchkd.config import LOSSES, POLICIES, SwitchConfig
from switchkd.data import Row
from switchkd.losses import collate, distillation_loss
from switchkd.methods import METHODS
from switchkd.mixture import Text
from switchkd.plan_memory import Memory
from switchkd.plan_models import build
from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher
from switchkd.train import as_flags, main

EXTRA = {"adaswitch": {"adaswitch_k": 1.1, "adaswitch_window": 3}}


def config(**given):
    return SwitchConfig(use_cpu=True, **given)


# Policy, loss and lmbda as the papers and their code have them, apart from the table.
PUBLISHED = {
    "sft": (None, "cross_entropy", 0.0),
    "kd": (None, "kl_teacher_student", 0.0),
    "seqkd": (Teacher(), "cross_entropy", 1.0),
    "imitkd": (Student(), "kl_teacher_student", 1.0),
    "gkd": (Student(), "generalized_jsd", 0.5),
    "minillm-mix": (Switch(schedule="mix-in", rate=0.2), "kl_student_teacher", 1.0),
    "distillm": (Student(), "skew_reverse_kl", 0.0),
    "distillm2": (Switch(schedule="sequence", rate=0.5), "contrastive_skew", 1.0),
    "skd": (SKD(top_k=25), "kl_teacher_student", 1.0),
    "switch": (Switch(tau0=1.0, decay=0.1), "skew_reverse_kl", 0.5),
    "adaswitch": (AdaSwitch(K=1.1, L=3), "kl_teacher_student", 1.0),
    "ssd": (Switch(schedule="constant", tau0=0.3, base="e"), "kl_teacher_student", 1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_constants_are_the_published_ones(name):
    c = config(method=name, **EXTRA.get(name, {}))
    policy, loss, share = PUBLISHED[name]
    assert (c.loss_type, c.lmbda) == (loss, share)
    assert policy is None or c.policy() == policy
    assert METHODS[name].source


def test_a_plan_counts_rollouts_that_begin_later():
    embedded = {"model_name_or_path": "embedded", "teacher_model_name_or_path": "embedded"}
    sizes = {"max_prompt_length": 8, "max_new_tokens": 8, "method": "distillm"}
    script, args = parse([f"--{name}={value}" for name, value in (embedded | sizes).items()])
    memory = Memory(build(script, args), args)
    assert args.lmbda == 0 and "rollout" in memory.phases(memory.asked)


def test_further_constants():
    assert PUBLISHED.keys() == METHODS.keys()
    assert config(method="gkd").beta == 0.5
    assert config(method="gkd").sampling().student_temperature == 1.0
    for name in ("distillm", "switch", "distillm2"):
        assert config(method=name).skew_alpha == 0.1
    distillm = config(method="distillm")
    assert distillm.adaptive_lmbda and distillm.replay_capacity == 1000
    assert distillm.replay_ratio == "decreasing" and not distillm.detach_mixture
    second = config(method="distillm2")
    assert second.detach_mixture and second.contrastive_weight == 1.0
    sampling = config(method="skd").sampling()
    assert (sampling.student_temperature, sampling.teacher_temperature) == (0.5, 0.2)
    assert sampling.top_p == 0.5
    assert config(method="minillm-mix").importance_weight
    assert 0.2 <= config(method="ssd").switch_tau0 <= 0.5 < math.log(2)
    assert not config(method="seqkd").noise_per_epoch
    assert not config(method="sft").needs_teacher and config(method="kd").needs_teacher


def test_the_default_is_switch():
    names = ("rollout_policy", "loss_type", "skew_alpha", "lmbda", "switch_tau0", "switch_lambda")
    plain, switch = config(), config(method="switch")
    assert [getattr(plain, n) for n in names] == [getattr(switch, n) for n in names]


def test_what_is_given_wins_even_where_it_is_the_options_own_default(tmp_path):
    assert config(method="kd", lmbda=0.5).lmbda == 0.5
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "a", "method": "skd", "skd_top_k": 10}))
    assert parse(["--config", str(path)])[1].skd_top_k == 10
    c = parse(["--config", str(path), "--top_p", "1.0", "--skd_top_k=7"])[1]
    assert (c.skd_top_k, c.top_p, c.student_temperature) == (7, 1.0, 0.5)
    c = parse(["--config", str(path), "--rollout-policy", "student"])[1]
    assert (c.rollout_policy, c.top_p) == ("student", 1.0)
    c = parse(["--config", str(path), "--method", "gkd"])[1]  # a flag wins over the file
    assert (c.loss_type, c.rollout_policy, c.student_temperature) == (
        "generalized_jsd", "student", None,
    )  # fmt: skip


def test_a_given_loss_or_policy_replaces_all_that_the_method_says_of_it():
    c = config(method="gkd", loss_type="tvd")
    assert (c.loss_type, c.beta, c.rollout_policy) == ("tvd", None, "student")
    c = config(method="skd", rollout_policy="student")
    assert (c.top_p, c.student_temperature, c.loss_type) == (1.0, None, "kl_teacher_student")
    assert not config(method="minillm-mix", rollout_policy="student").importance_weight


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "gdk"}, "method: got 'gdk', expected one of sft, kd, seqkd"),
        ({"method": "adaswitch"}, "adaswitch_k: got None, expected a number > 0"),
        ({"method": "sft", "loss_type": "tvd"}, "method: got 'sft', expected loss_type cross_ent"),
        ({"method": "gkd", "loss_type": "tvd", "beta": 0.5}, "beta: got 0.5, expected no beta"),
        ({"method": "distillm", "eval_strategy": "no"}, "adaptive_lmbda: got True, expected an ev"),
        ({"replay_capacity": -1}, "replay_capacity: got -1, expected an integer >= 0"),
        ({"replay_ratio": "half"}, "replay_ratio: got 'half', expected one of"),
        ({"jsd_base": "10"}, "jsd_base: got '10', expected 2 or e"),
        ({"contrastive_weight": 3.0}, "contrastive_weight: got 3.0, expected a number in"),
        ({"importance_weight": True}, "importance_weight: got True, expected switch_schedule mix"),
        ({"method": "minillm-mix", "temperature": 0.7}, "importance_weight: .*temperature 1"),
        ({"method": "minillm-mix", "switch_schedule": "linear"}, "importance_weight: got True"),
        ({"method": "minillm-mix", "replay_capacity": 9}, "importance_weight: .*no replay"),
    ],
)
def test_conflicts_and_unknown_names_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_subcommands(capsys):
    assert as_flags(["sft", "--max_steps", "3"]) == ["--method", "sft", "--max_steps", "3"]
    assert as_flags(["train", "--lmbda", "1"]) == as_flags(["--lmbda", "1"]) == ["--lmbda", "1"]
    assert as_flags([]) == as_flags(["train"]) == []
    assert parse(as_flags(["sft"]))[1].loss_type == "cross_entropy"
    assert main(["sft", "--method", "gkd"]) == 1
    assert "got sft and --method" in capsys.readouterr().out
    assert main(["tune"]) == 1
    assert "got the subcommand 'tune', expected train, sft" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(METHODS) in shown.replace("minillm- mix", "minillm-mix")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(tmp_path, name):
    given = EXTRA.get(name, {})
    if name in ("switch", "ssd"):  # responses are short here, and divergences large
        given = {"switch_tau0": {"switch": 0.5, "ssd": 0.3}[name]}
    if name == "distillm":  # the share starts at 0
        given = {"lmbda": 0.6, "replay_capacity": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make(
        tmp_path, method=name, max_steps=3, learning_rate=1e-2, load_best_model_at_end=False,
        teacher=name != "sft", **given,
    )  # fmt: skip
    before = trainer.evaluate()["eval_cross_entropy"]
    trainer.train()
    assert trainer.evaluate()["eval_cross_entropy"] != before
    share = {"data": 0, "rollout": 0}
    for row in trainer.mixture.choose(trainer.train_dataset.rows * 3, 0):
        share[row if row in share else "rollout"] += 1
    assert (share["rollout"] == 0) == (trainer.args.lmbda == 0)
    tokens, teacher = trainer.totals["tokens"], trainer.totals["teacher_tokens"]
    if name in ("sft", "kd"):
        assert tokens == 0
    elif name in ("imitkd", "gkd", "distillm"):
        assert tokens > 0 and teacher == 0
    elif name == "seqkd":
        assert tokens == teacher > 0
    else:
        assert 0 < teacher < tokens


def test_seqkd_trains_on_one_text_for_each_prompt(tmp_path):
    trainer = make(tmp_path, method="seqkd", max_steps=3)
    trainer.train()
    written = {}
    for line in (tmp_path / "completions.jsonl").open():
        record = json.loads(line)
        written.setdefault(record["row"], set()).add(tuple(record["tokens"]))
    assert len(written) == len(ROWS) and all(len(texts) == 1 for texts in written.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_goes_with_any_loss(tmp_path, policy):
    first = POLICIES.index(policy)  # two losses a policy: each policy and each loss has its turn
    for loss in (LOSSES[first], LOSSES[first + 3]):
        trainer = make(
            tmp_path / loss, rows=ROWS[:2], per_device_train_batch_size=2, lmbda=1.0,
            rollout_policy=policy, loss_type=loss, max_new_tokens=4, adaswitch_k=1.5,
            adaswitch_window=2,
        )  # fmt: skip
        loss = logged_loss(trainer)
        assert math.isfinite(loss) and loss > 0


def test_distillm2_writes_whole_responses_by_either_model(tmp_path):
    trainer = make(tmp_path, method="distillm2", max_steps=4)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").open()]
    writers = {tuple(set(line["from_teacher"])) for line in lines}
    assert writers == {(0,), (1,)}
    of_row = {}
    for line in lines:
        of_row.setdefault(line["row"], set()).add(line["from_teacher"][0])
    assert any(len(both) == 2 for both in of_row.values()), "the coin is tossed in each epoch"


# ------------------------------------------------------------------ losses by hand, in float64


def rows_of(trainer):
    """(p, q, tokens, writers) of every response that completions.jsonl records, at T = 1."""
    for line in (Path(trainer.args.output_dir) / "completions.jsonl").open():
        record = json.loads(line)
        row = trainer.mixture.row_of[record["row"]]
        ids = torch.tensor([row.prompt_ids + record["tokens"]])
        at = slice(len(row.prompt_ids) - 1, ids.shape[1] - 1)  # position i predicts token i + 1
        with torch.no_grad():
            p = trainer.teacher(ids).logits[0, at].softmax(-1)
            q = trainer.model(ids).logits[0, at].softmax(-1)
        yield p, q, torch.tensor(record["tokens"]), torch.tensor(record["from_teacher"]).bool()


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


def logged_loss(trainer):
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return loss


def test_minillm_mix_weights_each_token_by_q_over_the_mixture(tmp_path):
    # A learning rate of almost nothing: the student after the step is the one that wrote.
    trainer = make(tmp_path, method="minillm-mix", learning_rate=1e-30)
    loss = logged_loss(trainer)
    total, count, weights = 0.0, 0, []
    for p, q, tokens, _ in rows_of(trainer):
        p_y, q_y = (x.gather(1, tokens[:, None])[:, 0] for x in (p, q))
        w = q_y / (0.2 * p_y + 0.8 * q_y)
        weights.append(w)
        total, count = total + (w * kl(q, p)).sum().item(), count + len(tokens)
    assert loss == pytest.approx(total / count, rel=1e-5)
    w = torch.cat(weights)
    assert w.max() <= 1.25 + 1e-9 and w.min() < 0.8


def test_distillm2_is_skl_on_the_teachers_text_and_srkl_on_the_students(tmp_path):
    trainer = make(tmp_path, method="distillm2", contrastive_weight=1.25, learning_rate=1e-30)
    loss = logged_loss(trainer)
    total = count = 0
    for p, q, tokens, writers in rows_of(trainer):
        skl, srkl = kl(p, 0.1 * p + 0.9 * q), kl(q, 0.9 * p + 0.1 * q)
        total += torch.where(writers, 0.75 * skl, 1.25 * srkl).sum().item()
        count += len(tokens)
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["distillm2", "minillm-mix"])
def test_values_per_token_follow_their_rows_through_the_split(tmp_path, name):
    whole, _ = gradient(tmp_path / "1", method=name)
    split, _ = gradient(
        tmp_path / "4", method=name, gradient_accumulation_steps=4, per_device_train_batch_size=2
    )
    for key, value in whole.items():
        torch.testing.assert_close(split[key], value, rtol=1e-9, atol=1e-12)


def test_responses_of_the_data_are_the_teachers_and_have_weight_1():
    text = Text(Row([5], [6, 7, 1], None))
    columns = text.columns()
    assert columns["from_teacher"].tolist() == [True] * 3
    assert columns["row_weights"].tolist() == [1.0] * 3


@pytest.mark.parametrize("all_of", [True, False])
def test_a_batch_written_by_one_side_alone_has_that_sides_loss(tmp_path, all_of):
    trainer = make(tmp_path)
    batch = collate([[5, 6], [7]], [[8, 9], [10]], 0, from_teacher=[torch.full((2,), all_of),
                    torch.full((1,), all_of)])  # fmt: skip
    model, options = trainer.model, dict(vocab_size=trainer.vocabulary.size, alpha=0.1)
    got = distillation_loss(
        trainer.teacher, model, model, batch, kind="contrastive_skew", **options
    )
    kind = "skew_kl" if all_of else "skew_reverse_kl"
    want = distillation_loss(trainer.teacher, model, model, batch, kind=kind, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_nats_and_bits_of_one_threshold(tmp_path):
    """A threshold in nats of ln 2 times that in bits makes the same choices."""
    texts = []
    for base, tau0 in (("2", 0.4), ("e", 0.4 * math.log(2))):
        trainer = make(tmp_path / base, method="ssd", jsd_base=base, switch_tau0=tau0)
        rollout = trainer.roll_out(trainer.train_dataset.rows, epoch=0)
        texts.append((rollout.completions(), rollout.divergence))
    assert texts[0][0] == texts[1][0]
    torch.testing.assert_close(texts[0][1] * math.log(2), texts[1][1], equal_nan=True)
