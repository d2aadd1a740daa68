"""In Python: what SwitchTrainer loads, what it refuses, and what it tells."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_trainer import ROWS, SIZE, make
from transformers import TrainingArguments

from switchkd.checkpoint import read_run_state
from switchkd.config import SwitchConfig
from switchkd.data import rows_from
from switchkd.trainer import SwitchTrainer


def build(tmp_path, **changes):
    options = dict(
        model=tiny_model("gpt2", vocab_size=SIZE, seed=2, dtype=torch.float32),
        teacher_model=tiny_model(vocab_size=SIZE, seed=1, dtype=torch.float32),
        args=SwitchConfig(output_dir=str(tmp_path), max_new_tokens=9, max_prompt_length=40),
        train_dataset=ROWS, eval_dataset=ROWS[:3], processing_class=byte_tokenizer(),
    )  # fmt: skip
    return SwitchTrainer(**{**options, **changes})


def test_a_student_given_by_name_is_trained_in_float32(tmp_path):
    for name, seed in (("teacher", 1), ("student", 2)):
        model = tiny_model(vocab_size=SIZE, seed=seed, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    names = {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    trainer = build(tmp_path, **names)
    assert (trainer.model.dtype, trainer.teacher.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "name",
    ["compute_metrics", "compute_loss_func", "data_collator", "preprocess_logits_for_metrics"],
)
def test_what_would_never_be_called_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: got .*, expected none"):
        build(tmp_path, **{name: print})


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args: got TrainingArguments, expected a SwitchConfig"):
        build(tmp_path, args=TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="model_init: got"):
        build(tmp_path, model=None, model_init=tiny_model)
    for given, error, match in (
        ({"model": None}, ValueError, "^model: got None, expected"),
        ({"model": tmp_path}, ValueError, "^model: got PosixPath, expected .*as text"),
        ({"teacher_model": None}, ValueError, "^teacher_model: got None, .*rollout_policy switch"),
        ({"teacher_model": print}, ValueError, "^teacher_model: got builtin_function"),
        ({"tokenizer": None}, TypeError, "argument 'tokenizer'; did you mean processing_class"),
        ({"teacher": None}, TypeError, "argument 'teacher'; did you mean teacher_model"),
        ({"args": {}}, TypeError, "^args: got dict, expected a SwitchConfig"),
        ({"processing_class": None}, ValueError, "^processing_class: got None"),
        ({"processing_class": "gpt2"}, ValueError, "^processing_class: got str, expected a toke"),
        ({"peft_config": {"r": 8}}, ValueError, "^peft_config: got dict, expected one of peft"),
        ({"eval_dataset": None}, ValueError, "^eval_dataset: got None, .* or eval_strategy='no'"),
    ):
        with pytest.raises(error, match=match):
            build(tmp_path, **given)
    model = tiny_model(vocab_size=SIZE, dtype=torch.float32)
    with pytest.raises(ValueError, match="teacher_model: got weights that are the student's"):
        build(tmp_path, model=model, teacher_model=model)
    with pytest.raises(ValueError, match="model: got no trainable parameter"):
        build(tmp_path, model=model.requires_grad_(False))


def test_of_a_processor_its_tokenizer_is_taken(tmp_path):
    processor = SimpleNamespace(tokenizer=byte_tokenizer())  # no other part of it reads text
    trainer = build(tmp_path, processing_class=processor, teacher_processing_class=processor)
    assert trainer.processing_class is processor.tokenizer


def test_models_that_scale_their_logits_apart_are_refused_before_work(tmp_path):
    capped = dict(vocab_size=SIZE, final_logit_softcapping=30.0, dtype=torch.float32)
    teacher = tiny_model("gemma3", **capped)
    with pytest.raises(ValueError, match="teacher and student scale their logits differently"):
        build(tmp_path, teacher_model=teacher)
    args = SwitchConfig(str(tmp_path), method="seqkd", max_new_tokens=9, max_prompt_length=40)
    build(tmp_path, teacher_model=teacher, args=args)  # its text alone is learnt


@pytest.mark.parametrize("role", ["processing_class", "teacher_processing_class"])
def test_a_tokenizer_needs_no_pad_token_but_one_that_ends_responses(tmp_path, role):
    """GPT-2's and Llama's have none to fill up a batch."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    options = dict(max_steps=1, max_new_tokens=9, max_prompt_length=40, lmbda=1.0, use_cpu=True)
    args = SwitchConfig(output_dir=str(tmp_path), disable_tqdm=True, **options)
    trainer = build(tmp_path, args=args, **{role: tokenizer})
    trainer.train()
    assert trainer.totals["tokens"] > 0 and tokenizer.pad_token == "<eos>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=f"^{role}: got no EOS token, expected one to end resp"):
        build(tmp_path, **{role: tokenizer})


def test_a_student_in_float16_is_trained_by_an_adapter_only(tmp_path):
    peft = pytest.importorskip("peft")
    half = dict(vocab_size=SIZE, dtype=torch.float16, spread=1.0)
    with pytest.raises(ValueError, match="model: got trainable parameters in float16, expected fl"):
        build(tmp_path, model=tiny_model("gpt2", **half))
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    build(tmp_path, model=tiny_model("gpt2", **half), peft_config=lora)


@pytest.mark.parametrize("method", ["sft", "kd", "switch"])
def test_rows_without_a_response_need_lmbda_1(tmp_path, method):
    prompts = [{"prompt": "hi"}, {"prompt": "ho", "completion": "he"}]
    with pytest.raises(ValueError, match="dataset: got rows without a response, expected"):
        make(tmp_path, method=method, rows=prompts)
    other = [{"prompt": "hi", "answer": "ho"}] * 2
    with pytest.raises(ValueError, match=r"without a response \(not read: answer\), expected"):
        make(tmp_path, method=method, rows=other)
    make(tmp_path, method="switch", lmbda=1.0, rows=prompts)


def test_rows_that_fill_no_batch_are_not_all_dropped(tmp_path):
    options = dict(dataloader_drop_last=True, rows=ROWS[:7])
    with pytest.raises(ValueError, match="dataloader_drop_last: got 7 rows of .*at least 8"):
        make(tmp_path, **options)
    make(tmp_path, per_device_train_batch_size=7, **options)


def test_evaluate_takes_rows_in_any_form(tmp_path):
    from datasets import Dataset

    trainer = make(tmp_path)
    wanted = {**trainer.evaluate(), "eval_seconds": None}
    tokenised = rows_from(ROWS[:3], byte_tokenizer(), 40, 9)
    for rows in (ROWS[:3], Dataset.from_list(ROWS[:3]), tokenised):
        assert {**trainer.evaluate(rows), "eval_seconds": None} == wanted
    with pytest.raises(ValueError, match="got no usable rows"):
        trainer.evaluate([])
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset: got None"):
        trainer.evaluate()
    with pytest.raises(TypeError, match="predict: expected evaluate"):
        trainer.predict(ROWS)


def test_only_training_counts_as_training_time(tmp_path, monkeypatch):
    """Not what a notebook does before it, between two trainings, or after them."""
    now, idle = [0.0], 1000.0
    monkeypatch.setattr("switchkd.trainer.time.time", lambda: now[0])
    roll_out = SwitchTrainer.roll_out

    def takes_three_seconds(*args):
        now[0] += 3
        return roll_out(*args)

    monkeypatch.setattr(SwitchTrainer, "roll_out", takes_three_seconds)
    trainer = make(tmp_path, lmbda=1.0, max_steps=2, save_strategy="steps", save_steps=1)
    for wanted in (6, 12):
        now[0] += idle
        trainer.train()
        now[0] += idle
        saved = [read_run_state(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
        seconds = [state["totals"]["seconds"] for state in [*saved, trainer.run_state()]]
        assert seconds == [wanted - 3, wanted, wanted] and trainer.totals["seconds"] == wanted


def test_nothing_is_logged_by_steps_where_logging_steps_is_0(tmp_path):
    trainer = make(tmp_path, max_steps=2, logging_strategy="no", logging_steps=0)
    trainer.train()
    assert trainer.totals["tokens"] > 0


def test_what_the_models_do_not_share_is_told_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path)
    told = [r.getMessage() for r in caplog.records if r.name == "switchkd.trainer"]
    assert told == [f"note: {note}" for note in trainer.vocabulary.notes]
    assert any("padded" in note or "smaller" in note for note in told)


def test_rows_that_are_left_out_are_told(tmp_path, caplog):
    """Of training, of validation and of `evaluate`: as the command prints them."""
    rows = [*ROWS, {"prompt": "q" * 50, "completion": "a"}, {"prompt": "a", "completion": "b" * 20}]

    def told(work):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            work()
        return [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]

    made = []
    for dataset in ("train_dataset", "eval_dataset"):
        (note,) = told(lambda name=dataset: made.append(build(tmp_path, **{name: rows})))
        assert "dataset: 8 rows (prompt/completion; none template)" in note
        assert "left out 1 rows with a prompt over 40 tokens: line 9" in note
        assert "left out 1 rows with a response over 9 tokens: line 10" in note
    assert len(told(lambda: made[0].evaluate(rows))) == 1 and not told(made[0].evaluate)


@pytest.mark.parametrize(
    ("capability", "bf16", "said"),
    [("AVX2", True, True), ("AVX2", False, False), ("AVX512", True, False)],
)
def test_slow_bfloat16_is_said(tmp_path, monkeypatch, caplog, capability, bf16, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    make(tmp_path, bf16=bf16)
    assert ("multiplies bfloat16 several times more slowly" in caplog.text) is said
