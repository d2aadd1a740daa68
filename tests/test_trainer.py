"""One optimizer window, its loss and its gradient; what is logged, saved and refused."""

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from transformers import TrainerCallback

from switchkd.checkpoint import last_checkpoint
from switchkd.config import SwitchConfig
from switchkd.mixture import Text
from switchkd.trainer import SwitchTrainer

SIZE = 258
ROWS = [
    {"prompt": "q" * (1 + 3 * i) + "=", "completion": "ab" * (1 + (i * 5) % 4)} for i in range(8)
]


class Watch(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})


def make(
    tmp_path,
    *,
    rows=ROWS,
    teacher=True,
    dtype=torch.float64,
    callbacks=None,
    peft_config=None,
    **kwargs,
):
    options = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        max_new_tokens=9,
        max_prompt_length=40,
        switch_tau0=0.5,
        eval_strategy="no",
        save_strategy="no",
        log_completions=False,
        disable_tqdm=True,
        logging_steps=1,
    )
    options.update(kwargs)
    return SwitchTrainer(
        model=tiny_model("gpt2", vocab_size=SIZE, seed=2, dtype=dtype),
        teacher_model=tiny_model(vocab_size=SIZE, seed=1, dtype=dtype) if teacher else None,
        args=SwitchConfig(**options),
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def gradient(tmp_path, **kwargs):
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch], **kwargs)
    trainer.train()
    return watch.gradients[0], trainer


@pytest.mark.parametrize("extra", [False, True], ids=["distillation", "with text loss"])
def test_the_gradient_does_not_depend_on_the_accumulation_split(tmp_path, extra):
    options = {}
    if extra:
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
        options = dict(lm_file=str(text), lm_coef=0.7)
    whole, trainer = gradient(tmp_path / "1", **options)
    assert trainer.totals["tokens"] > 0, "some rows must be rollouts"
    for steps in (2, 4):
        split, _ = gradient(
            tmp_path / str(steps),
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
            **options,
        )
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-9, atol=1e-12)
    if extra:
        without, _ = gradient(tmp_path / "plain")
        name = "transformer.wte.weight"
        assert not torch.allclose(without[name], whole[name])


def test_the_loss_is_the_mean_over_all_response_tokens(tmp_path):
    """Against the definition: full logits of both models, every response token once."""
    from switchkd_kernels import divergence_loss

    trainer = make(tmp_path, lmbda=0.0)
    total, count = 0.0, 0
    for row in trainer.train_dataset.rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        at = slice(len(row.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            p, q = trainer.teacher(ids).logits[0, at], trainer.model(ids).logits[0, at]
        total += divergence_loss(p, q, kind="skew_reverse_kl", alpha=0.1, reduction="sum").item()
        count += len(row.completion_ids)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(total / count, rel=1e-6)  # Trainer logs in float32


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_are_mixed_per_row_and_repeatably(tmp_path, share):
    trainer = make(tmp_path, lmbda=share, rows=ROWS * 40)
    rows = trainer.train_dataset.rows
    chosen = trainer.mixture.choose(rows, epoch=0)
    assert set(chosen) <= {"data", "rollout"}
    assert abs(chosen.count("rollout") / len(chosen) - share) < 0.1
    assert chosen == trainer.mixture.choose(rows, epoch=0)
    assert chosen[::-1] == trainer.mixture.choose(rows[::-1], epoch=0)
    if share == 0.5:
        assert chosen != trainer.mixture.choose(rows, epoch=1)


def test_rows_without_a_response_are_always_rolled_out(tmp_path):
    trainer = make(tmp_path, lmbda=1.0, rows=[{"prompt": "hi"}, {"prompt": "ho"}])
    trainer.mixture.share = 0.0
    assert trainer.mixture.choose(trainer.train_dataset.rows, 0) == ["rollout"] * 2


def test_rollouts_do_not_depend_on_the_rollout_batch(tmp_path):
    trainer = make(tmp_path)
    rows = trainer.train_dataset.rows
    together = trainer.roll_out(rows, epoch=3)
    trainer.args.rollout_batch_size = 3
    apart = trainer.roll_out(rows, epoch=3)
    assert together.completions() == apart.completions()
    assert together.completions() != trainer.roll_out(rows, epoch=4).completions()


def test_the_teacher_stays_as_it_was(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    before = {n: p.clone() for n, p in trainer.teacher.named_parameters()}
    trainer.train()
    assert not trainer.teacher.training
    for name, parameter in trainer.teacher.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_completions_file_holds_the_record_of_every_token(tmp_path):
    trainer = make(tmp_path, lmbda=1.0, max_steps=2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").open()]
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    for line in lines:
        n = len(line["tokens"])
        assert trainer.processing_class.decode(line["tokens"]) == line["completion"]
        for name in ("from_teacher", "divergence", "threshold", "teacher_logprob"):
            assert len(line[name]) == n
        for writer, d, tau in zip(
            line["from_teacher"], line["divergence"], line["threshold"], strict=True
        ):
            assert bool(writer) == (d > tau)
    assert sum(sum(line["from_teacher"]) for line in lines) == trainer.totals["teacher_tokens"] > 0


def test_logs_tell_what_the_rollout_did(tmp_path):
    trainer = make(tmp_path, lmbda=1.0)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    share = trainer.totals["teacher_tokens"] / trainer.totals["tokens"]
    assert entry["rollout/teacher_share"] == pytest.approx(share)
    for name in ("completions/mean_length", "completions/clipped_ratio", "time/rollout"):
        assert name in entry


def test_validation_measures_divergences_and_rouge(tmp_path):
    trainer = make(tmp_path)
    result = trainer.evaluate()
    assert {"eval_cross_entropy", "eval_kl", "eval_jsd", "eval_rouge_l"} <= result.keys()
    assert result == {**trainer.evaluate(), "eval_seconds": result["eval_seconds"]}
    from switchkd_kernels import jsd

    total = count = 0
    for row in trainer.eval_dataset.rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        at = slice(len(row.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            pair = trainer.teacher(ids).logits[0, at], trainer.model(ids).logits[0, at]
        total, count = total + jsd(*pair).sum().item(), count + len(row.completion_ids)
    assert result["eval_jsd"] == pytest.approx(total / count, rel=1e-5)


def test_supervised_fine_tuning_needs_no_teacher(tmp_path):
    trainer = make(tmp_path, teacher=False, lmbda=0.0, loss_type="cross_entropy", max_steps=30)
    before = trainer.evaluate()["eval_cross_entropy"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_cross_entropy"] < before - 0.5
    assert "eval_kl" not in after
    with pytest.raises(ValueError, match="teacher_model: got None"):
        make(tmp_path, teacher=False)


def test_distillation_brings_the_student_to_the_teacher(tmp_path):
    trainer = make(tmp_path, max_steps=40, dtype=torch.float32)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.7 * before["eval_kl"]
    assert after["eval_jsd"] < before["eval_jsd"]


def test_rollout_copy_in_another_type_follows_the_student(tmp_path):
    trainer = make(tmp_path, dtype=torch.float32, rollout_dtype="bfloat16")
    copy = trainer._student_for_decoding()
    assert copy.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    again = trainer._student_for_decoding()
    for mine, current in zip(again.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, current.bfloat16())


def test_the_decoding_copy_is_independent_of_autocast_and_keeps_its_buffers(tmp_path):
    trainer = make(tmp_path, dtype=torch.float32, bf16=True, lmbda=1.0)
    trainer.train()  # from here on the student's forward is wrapped in autocast
    student, copy = trainer.model, trainer._student_for_decoding()
    assert copy is not student and copy.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = copy(ids).logits
        assert before.dtype == torch.bfloat16
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(copy(ids).logits, before)


def test_rotary_frequencies_stay_in_float32():
    from switchkd.distributed import decoding_copy

    copy = decoding_copy(tiny_model(dtype=torch.float32), torch.bfloat16)
    assert {b.dtype for b in copy.buffers() if b.is_floating_point()} == {torch.float32}


def test_lora_trains_only_the_adapter_and_saves_it(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    trainer = make(
        tmp_path, dtype=torch.float32, peft_config=config, save_strategy="steps", max_steps=3,
        save_steps=3,
    )  # fmt: skip
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, base[name])
    assert trainer.totals["tokens"] > 0
    assert trainer.evaluate()["eval_kl"] != before
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    trainer = make(
        tmp_path, dtype=torch.float32, max_steps=6, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=1, metric_for_best_model="kl",
        learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    measured = [e["eval_kl"] for e in trainer.state.log_history if "eval_kl" in e]
    best = min(range(6), key=measured.__getitem__)
    assert best != 5, "the learning rate should have spoilt the last step"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_kl"] == pytest.approx(measured[best], rel=1e-5)


def test_nan_in_the_student_stops_with_step_and_row_and_keeps_the_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters())[:] = float("nan")

    for share, where in ((1.0, "token 0 of sequence"), (0.0, "data row")):
        folder = tmp_path / str(share)
        trainer = make(
            folder, lmbda=share, max_steps=5, callbacks=[Poison()], save_strategy="steps",
            save_steps=2,
        )  # fmt: skip
        with pytest.raises((FloatingPointError, ValueError), match=where) as error:
            trainer.train()
        assert "step 4" in str(error.value)
        assert f"{folder}/checkpoint-2" in str(error.value)


def test_nan_in_validation_stops_with_step_and_checkpoint(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters())[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 2, validation: .*NaN.*checkpoint-1"):
        trainer.evaluate()


def test_models_that_cannot_work_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="need 540 positions, expected at most 128"):
        make(tmp_path, max_prompt_length=500, max_new_tokens=40)


def test_the_console_sample_shows_who_wrote_each_token(tmp_path):
    from rich.console import Console

    from switchkd.console import print_completion

    tokenizer = byte_tokenizer()
    text = "né <b>[/red]"  # two bytes make the é; neither HTML nor markup may be interpreted
    tokens = tokenizer(text)["input_ids"]
    record = {"step": 3, "row": 7, "prompt": "[bold]p", "tokens": tokens}
    record["from_teacher"] = [0] * 4 + [1] * (len(tokens) - 4)
    console = Console(record=True, width=80, force_terminal=True)
    print_completion(tokenizer, record, console)
    styled, plain = console.export_text(styles=True, clear=False), console.export_text()
    assert text in plain and "[bold]p" in plain and "step 3, data row 7" in plain
    assert f"4 tokens by the student,  {len(tokens) - 4} by the teacher" in plain
    assert "\x1b[30;103m" in styled  # black on bright yellow


def test_gradient_checkpointing_leaves_cache_and_rollouts_alone(tmp_path):
    plain = make(tmp_path / "a", lmbda=1.0)
    plain.train()
    saving = make(tmp_path / "b", lmbda=1.0, gradient_checkpointing=True)
    saving.train()
    assert saving.model.is_gradient_checkpointing
    files = [(tmp_path / x / "completions.jsonl").read_text() for x in "ab"]
    assert files[0] == files[1]
    for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_log_tells_how_far_kept_states_are_from_fresh_ones(tmp_path):
    trainer = make(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    (entry,) = trainer.state.log_history[:-1]
    assert 0 <= entry["rollout/hidden_difference"] < 1e-9
    assert 0 <= entry["rollout/logprob_difference"] < 1e-9
    rows = trainer.train_dataset.rows
    rollout = trainer.roll_out(rows[:1], epoch=0)
    text = Text(rows[0], "rollout", rollout.completions()[0], hidden=rollout.hidden()[0])
    apart = trainer.differences(text, rollout.student_logprob[0] + 0.25)
    assert apart["rollout/logprob_difference"] == pytest.approx(0.25)
    trainer.teacher.double().lm_head.weight.data += 1  # the head comes after the states
    states = torch.zeros(2, 32, dtype=torch.float64)
    from switchkd.losses import kept_difference

    assert kept_difference(trainer.teacher, rows[0], [5, 6], states) == 1.0


def test_earlier_completions_as_drafts_change_rounds_and_nothing_else(tmp_path):
    """Four epochs; with the noise of the first a completion changes only where the student has."""
    options = dict(max_steps=4, lmbda=1.0, learning_rate=1e-5, save_strategy="steps", save_steps=2)
    per_round, tokens, trainers = {}, {}, {}
    for noise in (True, False):
        for history in (False, True):
            folder = tmp_path / f"{noise}{history}"
            trainer = make(folder, noise_per_epoch=noise, draft_from_history=history, **options)
            trainer.train()
            logs = trainer.state.log_history[:-1]
            per_round[noise, history] = [entry["rollout/tokens_per_round"] for entry in logs]
            lines = (folder / "completions.jsonl").read_text().splitlines()
            tokens[noise, history] = [json.loads(line)["tokens"] for line in lines]
            trainers[noise, history] = trainer
    for noise in (True, False):
        assert tokens[noise, True] == tokens[noise, False]
        assert per_round[noise, True][0] == per_round[noise, False][0]  # nothing earlier yet
    assert tokens[True, True] != tokens[False, True]
    assert min(per_round[False, True][1:]) >= max(per_round[False, False][1:])
    # A resumed run drafts from what the first one wrote.
    again = make(tmp_path / "FalseTrue", noise_per_epoch=False, draft_from_history=True, **options)
    again.load_run_state(str(tmp_path / "FalseTrue" / "checkpoint-2"))
    wanted = {row.id: tokens[False, True][8 + i] for i, row in enumerate(trainers[
        False, True].train_dataset.rows)}  # fmt: skip
    assert sorted(again._history.values()) == sorted(wanted.values())
