"""Options that would do harm, or nothing, without a word; and those that change between runs."""

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_trainer import SIZE, make
from tokenizers.processors import TemplateProcessing
from transformers import HfArgumentParser, LlamaForCausalLM, TrainerCallback

from switchkd.checks import check_machine, notes
from switchkd.config import SwitchConfig
from switchkd.methods import METHODS
from switchkd.policies import SKD, AdaSwitch, Student
from switchkd.trainer import SwitchTrainer
from switchkd.vocabulary import share_vocabulary


def config(**given):
    return SwitchConfig(use_cpu=True, report_to="none", eval_strategy="no", **given)


RECOMPUTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "given",
    [
        {"ddp_static_graph": True},
        {"detach_mixture": True, "loss_type": "tvd"},
        {"learning_rate": float("inf")},
        {"weight_decay": -0.1},
        {"bf16_full_eval": True},
        {"temperature": 1e-6},
        {"student_temperature": float("inf")},
        {"eval_temperature": 1e-6},
        {"max_new_tokens": 16.0},
        {"rollout_block": 2.5},
        {"top_k": 1.5},
        {"switch_lambda": float("inf")},
        {"accelerator_config": {"bogus": 1}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_configuration_refuses(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}: got "):
        config(**given)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"adam_beta1": 1.0}, "optim: got adamw.*beta"),
        ({"adam_epsilon": -1.0}, "optim: got adamw.*epsilon"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers True.*: pers"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers -1"),
        ({"dataloader_multiprocessing_context": "fork"}, "multiprocessing_context fork"),
        ({"torch_compile_mode": "foo"}, "torch_compile_mode: got foo"),
        ({"push_to_hub": True, "hub_token": "x"}, "push_to_hub: got true, but the Hub says: no"),
        (RECOMPUTED | {"gradient_checkpointing_kwargs": {"bogus": 1}}, "got .*bogus.*Unexpected"),
        (RECOMPUTED | {"gradient_checkpointing_kwargs": {"every_n_layers": 0}}, "integer >= 1"),
    ],
)
def test_what_training_would_find_late_is_tried_before(given, match, monkeypatch):
    def refuse(token):
        raise RuntimeError(f"no {token}")

    monkeypatch.setattr("switchkd.checks.whoami", refuse)
    with pytest.raises(ValueError, match=match):
        check_machine(config(**given))


def test_processes_that_would_wait_for_each_other_are_refused(monkeypatch):
    uneven = {"accelerator_config": {"even_batches": False}}
    for given in (uneven, {"auto_find_batch_size": True}):
        check_machine(config(**given))
        with monkeypatch.context() as two:
            two.setattr(SwitchConfig, "world_size", 2)
            with pytest.raises(ValueError, match=f"{next(iter(given))}: got .*several processes"):
                check_machine(config(**given))


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_knows_which_way_is_better(kind):
    for metric, mode in ((None, "max"), ("rouge_l", "max"), ("kl", "min")):
        args = SwitchConfig(use_cpu=True, lr_scheduler_type=kind, metric_for_best_model=metric)
        assert args.lr_scheduler_kwargs["mode"] == mode
        assert args.metric_for_best_model == (metric or "rouge_l")
    own = dict(lr_scheduler_type=kind, lr_scheduler_kwargs={"mode": "min"})
    assert SwitchConfig(use_cpu=True, **own).lr_scheduler_kwargs == {"mode": "min"}


def test_a_batch_that_processes_share_is_counted_once(monkeypatch):
    monkeypatch.setattr(SwitchConfig, "world_size", 2)
    shared = config(accelerator_config={"split_batches": True}, per_device_train_batch_size=4)
    assert (shared.rows_per_batch, config(per_device_train_batch_size=4).rows_per_batch) == (4, 8)


def test_options_of_another_policy_are_told():
    assert notes(config(adaswitch_k=1.1, adaswitch_window=3, rollout_policy="adaswitch")) == []
    (note,) = notes(config(adaswitch_k=1.1))
    assert note == "adaswitch_k: not used with rollout_policy switch"


@pytest.mark.parametrize(
    "given, note",
    [
        ({"skd_top_k": 5}, "skd_top_k: not used with rollout_policy switch"),
        ({"switch_tau0": 0.5, "rollout_policy": "skd"}, "switch_tau0: not used with rollout_polic"),
        (
            {"contrastive_weight": 0.5},
            "contrastive_weight: not used with loss_type skew_reverse_kl",
        ),
        ({"skew_alpha": 0.5, "loss_type": "tvd"}, "skew_alpha: not used with loss_type tvd"),
        ({"replay_ratio": "constant"}, "replay_ratio: not used with replay_capacity 0"),
        ({"lm_coef": 0.5}, "lm_coef: not used without lm_file"),
        ({"calibration_rows": 8}, "calibration_rows: not used without target_teacher_share"),
        ({"prediction_loss_only": True}, "prediction_loss_only: not used, for validation has"),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps: not used, for validation has"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_an_option_that_has_no_effect_is_told(given, note):
    (told,) = notes(config(**given))
    assert told.startswith(note)


def test_an_option_that_has_an_effect_is_not_told(tmp_path):
    text = tmp_path / "text"
    for given in (
        {"rollout_policy": "skd", "skd_top_k": 5},
        {"loss_type": "contrastive_skew", "contrastive_weight": 0.5, "skew_alpha": 0.3},
        {"replay_capacity": 9, "replay_ratio": "constant"},
        {"lm_file": str(text), "lm_coef": 0.5},
        {"target_teacher_share": 0.5, "calibration_rows": 8, "switch_tau_min": 0.1},
    ):
        assert notes(config(**given)) == []
    for method in METHODS.keys() - {"adaswitch"}:
        assert notes(SwitchConfig(use_cpu=True, method=method)) == []


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"learning_rate": "1e-4"}, "learning_rate: got '1e-4', expected a number"),
        ({"lmbda": "0.5"}, "lmbda: got '0.5', expected a number"),
        ({"bf16": "false"}, "bf16: got 'false', expected true or false"),
        ({"save_completions": "no"}, "save_completions: got 'no', expected true or false"),
        ({"temperature": None}, "temperature: got None, expected a number"),
    ],
    ids=str,
)
def test_text_is_no_number(given, expected):
    """As of a YAML file that Python reads: 1e-4 is text there, and "false" would be true."""
    with pytest.raises(ValueError, match=expected):
        config(**given)


@dataclass
class Derived(SwitchConfig):
    extra: int = 3


def test_a_method_holds_in_a_derived_configuration():
    args = Derived(use_cpu=True, method="skd", max_completion_length=7, extra=4)
    for same in (args, pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert (same.policy(), same.lmbda, same.max_new_tokens) == (SKD(top_k=25), 1.0, 7)
        assert (same.extra, notes(same)) == (4, [])
    with pytest.raises(TypeError, match="Derived: got the unknown argument 'lmbd'"):
        Derived(lmbd=1.0)


def test_a_method_that_a_parser_has_overridden_is_told():
    given = ["--method", "skd", "--use_cpu", "true", "--lmbda", "1"]
    (parsed,) = HfArgumentParser(SwitchConfig).parse_args_into_dataclasses(given)
    for args in (parsed, replace(config(lmbda=1.0), method="skd")):
        (note,) = notes(args)
        assert "method skd with another rollout_policy switch (not skd)" in note
        assert "lmbda" not in note


def test_arguments_may_change_between_two_runs(tmp_path):
    """Of one trainer: policy, sampling, share of rollouts, loss, noise, dtype and folder."""
    trainer = make(tmp_path / "a", dtype=torch.float32, lmbda=1.0)
    trainer.args.rollout_policy, trainer.args.temperature = "adaswitch", 0.7
    trainer.args.adaswitch_k, trainer.args.adaswitch_window = 1.1, 3
    trainer.train()
    assert isinstance(trainer.policy, AdaSwitch) and trainer.sampling.teacher_temperature == 0.7
    engine, trainer.policy = trainer._engine, Student()  # by hand: stays
    trainer.args.rollout_dtype, trainer.args.loss_type = "bfloat16", "contrastive_skew"
    trainer.args.output_dir = str(tmp_path / "b")
    trainer.train()
    assert isinstance(trainer.policy, Student) and trainer._columns == ["from_teacher"]
    assert trainer._engine is not engine and (tmp_path / "b" / "completions.jsonl").exists()
    written = trainer.totals["tokens"]
    trainer.args.lmbda = 0.0
    trainer.train()
    assert trainer.totals["tokens"] == written and trainer.mixture.share == 0.0


def test_an_epoch_that_a_callback_ends_is_followed_by_the_next(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1

    epochs = []
    options = dict(max_steps=3, per_device_train_batch_size=4)
    trainer = make(tmp_path, dtype=torch.float32, callbacks=[Stop()], **options)
    write = trainer._write
    trainer._write = lambda rows, epoch: epochs.append(epoch) or write(rows, epoch)
    trainer.train()
    assert epochs == [0, 1, 1]


def test_a_loss_of_a_batch_by_itself(tmp_path):
    seen = []

    def looking(model, inputs, **options):
        given, kept = dict(inputs), type(trainer).compute_loss
        loss = kept(trainer, model, dict(inputs), **options)
        seen.append((loss.item(), kept(trainer, model, given).item()))
        with pytest.raises(ValueError, match="return_outputs: got True"):
            kept(trainer, model, dict(inputs), return_outputs=True)
        return loss

    trainer = make(tmp_path, dtype=torch.float32)
    trainer.compute_loss = looking
    trainer.train()
    ((whole, alone),) = seen  # a window of one batch
    assert whole == pytest.approx(alone)
    pickle.dumps(trainer.data_collator)  # workers that are not forked are sent it


def test_what_ends_a_response_in_training_ends_one_of_what_is_saved(tmp_path):
    """The teacher's end, and that of the chat template, which is no EOS of the student."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model, teacher = (tiny_model(vocab_size=SIZE + 1, dtype=torch.float32) for _ in range(2))
    teacher.generation_config.eos_token_id = [1, 7]
    assert share_vocabulary(teacher, model, tokenizer, tokenizer).eos_token_ids == (1, 7, turn)
    args = SwitchConfig(
        str(tmp_path), use_cpu=True, eval_strategy="no", max_prompt_length=40, max_new_tokens=9
    )
    rows = [{"prompt": "a", "completion": "b"}]
    trainer = SwitchTrainer(model, teacher, args, rows, processing_class=tokenizer)
    trainer.save_model(str(tmp_path / "saved"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.generation_config.eos_token_id == [1, 7, turn]


def test_tokenizers_that_begin_a_text_otherwise_are_told(tokenizer):
    theirs = byte_tokenizer()
    begins = dict(single="<eos> $A", special_tokens=[("<eos>", 1)])
    theirs._tokenizer.post_processor = TemplateProcessing(**begins)
    teacher, student = tiny_model(vocab_size=SIZE), tiny_model(vocab_size=SIZE)
    (note,) = share_vocabulary(teacher, student, theirs, tokenizer).notes
    assert note.startswith("tokens of a text differ: teacher [1, ")
