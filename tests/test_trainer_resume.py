"""In Python: runs that are stopped, resumed, or started where another one was."""

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from test_trainer import ROWS, SIZE, make
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from switchkd.checkpoint import check_checkpoint, find_checkpoint
from switchkd.config import SwitchConfig
from switchkd.console import GracefulStop
from switchkd.trainer import SwitchTrainer

RUN = dict(  # 8 rows: epochs of 4 steps
    method="distillm", lmbda=0.5, replay_capacity=4, per_device_train_batch_size=2, max_steps=12,
    learning_rate=0.3, eval_strategy="epoch", save_strategy="epoch", save_total_limit=9,
    metric_for_best_model="kl",
)  # fmt: skip


class StopIn(GracefulStop):
    """A signal in the middle of a step."""

    def __init__(self, step):
        super().__init__()
        self.step, self.saves = step, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self._handle(None, None)

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self.saves.append(state.global_step)


def result(trainer):
    """All that a run leaves, but its times and folder."""
    folder = Path(trainer.args.output_dir)
    state = trainer.state
    validated = [(e["step"], e["eval_kl"]) for e in state.log_history if "eval_kl" in e]
    completions = [json.loads(line) for line in (folder / "completions.jsonl").open()]
    totals = {k: v for k, v in trainer.totals.items() if "seconds" not in k}
    best = Path(state.best_model_checkpoint).name
    return validated, completions, totals, best, trainer.mixture.state()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("whole"), **RUN)
    trainer.train()
    assert trainer.mixture.share > 0.5 and any("replay_of" in r for r in result(trainer)[1])
    return trainer


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, whole, step):
    """In the middle of an epoch a stop validates nothing; at its end, what is due anyway."""
    stop = StopIn(step)
    first = make(tmp_path, callbacks=[stop], **RUN)
    first.train()
    assert first.state.global_step == step
    assert stop.saves == ([4] if step == 4 else [4, 6] if step == 6 else [2])
    validated = [e["step"] for e in first.state.log_history if "eval_kl" in e]
    assert validated == ([4] if step >= 4 else [])
    again = make(tmp_path, **RUN)
    again.train(resume_from_checkpoint=True)
    assert result(again) == result(whole)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_stop_saves_once_whatever_else_is_due(tmp_path, strategy):
    options = dict(max_steps=6, learning_rate=0.3, eval_strategy="steps", eval_steps=1,
                   save_strategy=strategy, save_steps=1, save_total_limit=1)  # fmt: skip
    stop = StopIn(5)
    trainer = make(tmp_path, callbacks=[stop], **options)
    trainer.train()
    assert trainer.state.best_global_step < 5, "the learning rate should have spoilt the last step"
    assert stop.saves.count(5) == 1
    assert (tmp_path / "checkpoint-5" / "run_state.json").exists()


def test_a_stop_at_the_end_of_an_epoch_is_saved_where_only_the_best_is(tmp_path):
    stop = StopIn(8)
    options = dict(max_steps=12, per_device_train_batch_size=2, save_total_limit=3,
                   eval_strategy="epoch", save_strategy="best")  # fmt: skip
    trainer = make(tmp_path, callbacks=[stop], **options)
    trainer.train()
    assert "eval_kl" in trainer.state.log_history[-2], "the epoch's end should have been validated"
    assert stop.saves == [4, 8], "no sample of so small a model scores"
    assert (tmp_path / "checkpoint-8" / "run_state.json").exists()


def test_what_is_logged_does_not_change_a_run_with_dropout(tmp_path):
    """The student of a decoding copy trains on between its rollouts, with dropout."""
    options = dict(lmbda=1.0, max_steps=6, per_device_train_batch_size=2, disable_dropout=False,
                   rollout_dtype="float32", save_strategy="steps", save_steps=3)  # fmt: skip
    silent = make(tmp_path / "silent", logging_steps=100, **options)
    silent.train()
    often = make(tmp_path / "often", **options)
    often.train()
    again = make(tmp_path / "often", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "often" / "checkpoint-3"))
    apart = [log["rollout/logprob_difference"] for log in often.state.log_history if "loss" in log]
    assert len(apart) == 6 and 0 < max(apart) < 1e-3
    weights = [list(trainer.model.parameters()) for trainer in (silent, often, again)]
    for a, b, c in zip(*weights, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_what_cannot_be_resumed_is_refused(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match="got .*best, expected an existing folder checkpoint-N"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "best"))
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="got no intact checkpoint in"):
        make(tmp_path, **options).train(resume_from_checkpoint=True)
    make(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    other = make(tmp_path, per_device_train_batch_size=4, **options)
    with pytest.raises(ValueError, match="got 4 rows in a step .*, expected 8"):
        other.train(resume_from_checkpoint=checkpoint)
    other = make(tmp_path, target_teacher_share=0.5, **options)
    with pytest.raises(ValueError, match="target_teacher_share: got 0.5, expected none"):
        other.train(resume_from_checkpoint=checkpoint)


def test_where_the_last_rows_are_dropped_the_batch_must_stay(tmp_path):
    """8 rows: a batch of 6 leaves 2 of an epoch out, batches of 2 none."""
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, dataloader_drop_last=True)
    make(tmp_path, per_device_train_batch_size=6, **options).train()
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="got 2 rows in a batch .*drop_last.*, expected 6"):
        make(tmp_path, **split, **options).train(resume_from_checkpoint=True)
    options["dataloader_drop_last"] = False
    make(tmp_path, **split, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_its_optimizer_is_passed_over(tmp_path):
    """Training would go on with a new optimizer and schedule."""
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make(tmp_path / "whole", **options).train()
    last = tmp_path / "whole" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (last / name).read_bytes()
        for left, what in ((None, "missing"), (whole[:500], "broken")):
            (last / name).unlink(missing_ok=True)
            if left is not None:
                (last / name).write_bytes(left)
            with pytest.raises(ValueError, match=f"checkpoint-2: {name[:5]}.* is {what}"):
                check_checkpoint(last)
            assert find_checkpoint(tmp_path / "whole", "last").endswith("checkpoint-1")
        (last / name).write_bytes(whole)
    assert find_checkpoint(tmp_path / "whole", "last") == str(last)
    make(tmp_path / "only", save_only_model=True, **options).train()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing.*save_only_model"):
        make(tmp_path / "only", **options).train(resume_from_checkpoint=True)


def test_a_resumed_run_has_the_threshold_that_it_had(tmp_path):
    options = dict(target_teacher_share=0.5, switch_tau0=1.0, max_new_tokens=16, lmbda=1.0,
                   max_steps=2, save_strategy="steps", save_steps=1)  # fmt: skip
    first = make(tmp_path, **options)
    first.train()
    again = make(tmp_path, **options)
    again.calibrate = None  # it would be chosen anew with this student, and not with the resumed
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.policy == first.policy and again.calibration == first.calibration
    assert again.args.switch_lambda == first.args.switch_lambda


def test_the_share_of_rollouts_follows_from_the_loss_before_the_first_step(tmp_path):
    """Also where nobody has evaluated before."""
    trainer = make(tmp_path / "a", **RUN)
    before = trainer.evaluate()["eval_cross_entropy"]
    fresh = make(tmp_path / "b", **{**RUN, "max_steps": 1})
    fresh.train()
    assert fresh.mixture.reference == before == trainer.mixture.reference


def test_a_new_run_in_the_folder_keeps_the_completions_of_the_last(tmp_path):
    for seed in (1, 2, 3):
        make(tmp_path, lmbda=1.0, seed=seed).train()
    names = ["completions-1.jsonl", "completions-2.jsonl", "completions.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names
    texts = [(tmp_path / name).read_text() for name in names]
    assert len(set(texts)) == 3 and {text.count("\n") for text in texts} == {8}


def test_the_best_checkpoint_moves_with_the_run(tmp_path):
    """Resumed at its end, where Trainer does not look for it again."""
    first = make(tmp_path / "a", **RUN)
    first.train()
    assert first.state.best_global_step < 12
    (tmp_path / "a").rename(tmp_path / "b")
    again = make(tmp_path / "b", **RUN)
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).parent == tmp_path / "b"
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_going_back_to_an_earlier_checkpoint_forgets_the_later_ones(tmp_path):
    """They would be the last after a kill, and their completions are dropped."""
    options = dict(RUN, max_steps=12)
    first = make(tmp_path, **options)
    first.train()
    written = result(first)[1]
    stop = StopIn(6)
    make(tmp_path, callbacks=[stop], **options).train(str(tmp_path / "checkpoint-4"))
    assert Path(find_checkpoint(tmp_path, "last")).name == "checkpoint-6"
    assert {path.name for path in tmp_path.glob("later-*")} == {
        "later-checkpoint-8",
        "later-checkpoint-12",
    }
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert result(again)[1] == written


def test_a_run_that_goes_on_elsewhere_keeps_the_completions_that_are_there(tmp_path):
    make(tmp_path / "a", **RUN).train()
    make(tmp_path / "b", lmbda=1.0).train()
    there = (tmp_path / "b" / "completions.jsonl").read_text()
    make(tmp_path / "b", **RUN).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert (tmp_path / "b" / "completions-1.jsonl").read_text() == there
    assert not list((tmp_path / "a").glob("later-*"))


def test_experts_come_back_from_a_checkpoint(tmp_path):
    """They are one tensor in memory and many in a file, which Trainer by itself does not put
    together: a resumed run, and one that ends with its best checkpoint, would mix two models."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    ends = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=SIZE, **sizes, **experts, **ends)
    ).save_pretrained(tmp_path / "student")

    def trained(best: bool, resume=None):
        args = SwitchConfig(
            str(tmp_path / f"{best}"), use_cpu=True, max_steps=3, save_steps=1, eval_steps=1,
            max_new_tokens=6, max_prompt_length=40, learning_rate=0.1, metric_for_best_model="kl",
            greater_is_better=True, load_best_model_at_end=best, save_total_limit=9,
            log_completions=False,
        )  # fmt: skip
        trainer = SwitchTrainer(
            Qwen3MoeForCausalLM.from_pretrained(tmp_path / "student"),
            tiny_model(vocab_size=SIZE, seed=1, dtype=torch.float32), args, ROWS, ROWS[:3],
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        trainer.train(resume)
        return trainer

    def assert_equal(one, other):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name

    last = trained(best=False).model
    assert_equal(last, trained(False, str(tmp_path / "False" / "checkpoint-1")).model)
    best = trained(best=True)
    folder = Path(best.state.best_model_checkpoint)
    assert folder.name != "checkpoint-3"
    assert_equal(best.model, Qwen3MoeForCausalLM.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got no model.*expected all weights"):
        trained(True, str(folder))


def test_what_ran_out_of_memory_is_neither_recorded_nor_counted(tmp_path, monkeypatch):
    options = dict(RUN, auto_find_batch_size=True, per_device_train_batch_size=8)
    small, at = [], []
    step = SwitchTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        small.append(len(inputs["row_ids"]))
        if small[-1] > 4 or self.state.global_step in at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return step(self, model, inputs, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "compute_loss", compute_loss)
    trainer = make(tmp_path, lr_scheduler_type="constant", **options)
    trainer.train()
    assert small[:5] == [8, 7, 6, 5, 4] and trainer.state.global_step == 12
    lines = result(trainer)[1]
    fresh = [r for r in lines if "replay_of" not in r]
    assert len({(r["step"], r["row"]) for r in fresh}) == len(fresh)
    assert trainer.totals["tokens"] == sum(len(r["tokens"]) for r in fresh)
    at.append(7)
    with pytest.raises(MemoryError, match=r"step 8: CUDA out.*intact checkpoint is .*point-6"):
        make(tmp_path / "late", **options).train()


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_run_that_is_resumed_at_its_end_does_no_step_more(tmp_path, strategy):
    options = dict(RUN, max_steps=6, save_strategy=strategy, eval_strategy=strategy)
    if strategy == "steps":  # the last of them in the middle of an epoch
        options |= dict(save_steps=3, eval_steps=3)
    first = make(tmp_path, **options)
    first.train()
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and result(again)[1:] == result(first)[1:]
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / "checkpoint-7").exists()
