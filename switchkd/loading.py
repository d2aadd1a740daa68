"""What the options of a run name: tokenizers, rows, models; and what is wrong with them, as soon
as it can be told."""

from __future__ import annotations

import random

import torch
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from switchkd import checks
from switchkd.arguments import ScriptArguments, expect
from switchkd.config import SwitchConfig
from switchkd.data import Report, Rows, read_examples, read_prompts, tokenize
from switchkd.models import (
    cut_layers,
    load_config,
    load_model,
    load_tokenizer,
    parse_layers,
)
from switchkd.quantization import quantization_config
from switchkd.rollout import check_lengths
from switchkd.templates import with_kwargs
from switchkd.vocabulary import check_tables


def student_place(script: ScriptArguments) -> dict:
    """Where the student is, for the functions of `switchkd.models` that load something."""
    return {
        "name": script.model_name_or_path,
        "gguf_file": script.gguf_file,
        "revision": script.model_revision,
        "trust_remote_code": script.trust_remote_code,
    }


def teacher_place(script: ScriptArguments, config: SwitchConfig) -> dict | None:
    """Where the teacher is; None if it is not needed or the student's base."""
    if script.teacher_model_name_or_path is None:
        if config.needs_teacher and not config.teacher_is_base:
            raise ValueError(
                "teacher_model_name_or_path: got None, expected a teacher "
                f"(rollout_policy {config.rollout_policy}, loss_type {config.loss_type})"
            )
        if script.teacher_quantization is not None:
            raise ValueError("teacher_quantization: expected teacher_model_name_or_path, too")
        return None
    return {
        "name": script.teacher_model_name_or_path,
        "gguf_file": script.teacher_gguf_file,
        "revision": script.teacher_model_revision,
        "trust_remote_code": script.trust_remote_code,
    }


def load_tokenizers(script: ScriptArguments, config: SwitchConfig) -> tuple:
    """(the student's, which writes for both, the teacher's or None); ValueError if their tokens
    differ."""
    mine, place = load_tokenizer(**student_place(script)), teacher_place(script, config)
    told = config.chat_template_kwargs
    expect(config, "chat_template_kwargs", not told or script.template in ("auto", "chat"),
           f"none with template {script.template}")  # fmt: skip
    if place is None:
        return with_kwargs(mine, told), None
    theirs = load_tokenizer(**place)
    try:
        check_tables(theirs, mine)
    except ValueError as error:
        names = script.model_name_or_path, script.teacher_model_name_or_path
        raise ValueError(f"{error} (student {names[0]}, teacher {names[1]})") from None
    return with_kwargs(mine, told), theirs


def check_options(script: ScriptArguments, config: SwitchConfig) -> None:
    """Refuse what the models' configurations, or the packages that are here, cannot serve."""
    student, teacher = load_config(**student_place(script)), teacher_place(script, config)
    if script.student_layers is not None:
        parse_layers(script.student_layers, student.get_text_config().num_hidden_layers)
    response = max(config.max_new_tokens, script.max_response_length or 0)
    for model in (student, *([] if teacher is None else [load_config(**teacher)])):
        check_lengths(model, [[0] * config.max_prompt_length], response)
    for name in ("student_quantization", "teacher_quantization"):
        _quantized(script, config, name)
    peft_config(script)
    checks.check_machine(config)
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel: needs the package liger-kernel")
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()  # says which package it needs
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"report_to: got {config.report_to}: {error}") from None
    kind, options = config.lr_scheduler_type, config.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
        get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "value", kind)
        raise ValueError(f"lr_scheduler_kwargs: got {options} for {name}: {error}") from None


def load_data(
    script: ScriptArguments, config: SwitchConfig, tokenizer, day: str = ""
) -> tuple[Rows, Rows]:
    """Tokenised training and validation rows; validation is held out of training if not named.
    day: see `data.tokenize`."""
    options = dict(
        max_prompt_length=config.max_prompt_length,
        max_completion_length=script.max_response_length or config.max_new_tokens,
        template=script.template,
        day=day,
    )
    skip = script.skip_malformed
    examples, report = read_examples(
        script.dataset_name,
        split=script.dataset_train_split,
        limit=script.max_train_rows,
        skip_malformed=skip,
    )
    exclude = None
    if script.exclude_dataset_name is not None:
        named = script.exclude_dataset_name
        exclude = read_prompts(named, tokenizer, script.template, skip, day)
    if script.eval_dataset_name is not None:
        held_out, eval_report = read_examples(
            script.eval_dataset_name,
            split=script.dataset_test_split,
            skip_malformed=skip,
        )
        valid = tokenize(held_out[: script.eval_size], eval_report, tokenizer, **options)
    else:
        count = min(script.eval_size, len(examples) // 2)
        if count < 1:
            raise ValueError(
                f"{report.source}: got {len(examples)} rows, expected at least 2 to hold out "
                "validation rows, or eval_dataset_name"
            )
        picked = set(random.Random(script.split_seed).sample(range(len(examples)), count))
        held_out = [e for i, e in enumerate(examples) if i in picked]
        examples = [e for i, e in enumerate(examples) if i not in picked]
        eval_report = Report(
            f"{report.source} (held out)", form=report.form, columns=report.columns
        )
        valid = tokenize(held_out, eval_report, tokenizer, **options, exclude=exclude)
    train = tokenize(examples, report, tokenizer, **options, exclude=exclude)
    checks.check_rows(train, config)
    has_teacher = config.teacher_is_base or teacher_place(script, config) is not None
    checks.check_validation(valid, config, has_teacher)
    return train, valid


def _quantized(script: ScriptArguments, config: SwitchConfig, name: str) -> dict:
    """Options of loading for weights in fewer bits; they cannot be moved later."""
    text = getattr(script, name)
    if text is None:
        return {}
    device_map = {"": config.device}
    return {"quantization_config": quantization_config(text, name), "device_map": device_map}


def load_models(script: ScriptArguments, config: SwitchConfig) -> tuple:
    """(student, teacher); None for a teacher that is not needed or the student's base."""
    options = {}
    if script.attn_implementation is not None:
        options["attn_implementation"] = script.attn_implementation
    fewer_bits, dtype = _quantized(script, config, "student_quantization"), script.dtype
    if fewer_bits and (config.bf16 or config.fp16):  # what a base computes in; adapters keep theirs
        dtype = "bfloat16" if config.bf16 else "float16"
    student = load_model(**student_place(script), dtype=dtype, **options, **fewer_bits)
    if script.student_layers is not None:
        cut_layers(student, script.student_layers)
    place = teacher_place(script, config)
    if place is None:
        return student, None
    options |= _quantized(script, config, "teacher_quantization")
    return student, load_model(**place, dtype=script.teacher_dtype, **options)


def peft_config(script: ScriptArguments):
    """A LoraConfig, or None."""
    if not script.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("use_peft: needs the package peft; pip install peft") from None
    target = script.lora_target_modules
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear" if target == ["all-linear"] else target,
        task_type="CAUSAL_LM",
    )
