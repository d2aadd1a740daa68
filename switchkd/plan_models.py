"""Teacher and student as a training run would load them, without their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from switchkd import adapters
from switchkd.arguments import ScriptArguments
from switchkd.config import SwitchConfig
from switchkd.loading import peft_config, student_place, teacher_place
from switchkd.models import (
    checkpoint_activations,
    cut_layers,
    disable_dropout,
    keep_layers,
    load_config,
)
from switchkd.rollout import check_lengths


@dataclass
class Pair:
    """Models of fake tensors. decoding: the student as it writes rollouts, the same or a copy.
    small(role, n): a real one like "teacher", "student" or "decoding", at random, of n layers."""

    mode: FakeTensorMode
    student: nn.Module
    decoding: nn.Module
    teacher: nn.Module | None
    shared_base: bool  # the teacher is the student without its adapter
    small: Callable[[str, int], nn.Module]
    notes: list[str]

    @property
    def copied(self) -> bool:
        return self.decoding.dtype != next(self.student.parameters()).dtype


def build(script: ScriptArguments, config: SwitchConfig) -> Pair:
    """Raises ValueError as loading would: unknown models, layers, lengths, dtypes."""
    notes: list[str] = []
    mine = _config(student_place(script), "student", notes)
    place, shared = teacher_place(script, config), config.teacher_is_base
    theirs = None if place is None or shared else _config(place, "teacher", notes)
    for role in ("teacher", "student"):
        if getattr(script, f"{role}_quantization") is not None:
            notes.append(f"the quantised {role} is counted as if it were not")
    dtype = _dtype(script.dtype, mine, script.gguf_file)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):  # adapters cannot be added to fake tensors
        student = _student(script, config, mine, dtype, trained=True)
        decoding_dtype = config.decoding_dtype() or next(student.parameters()).dtype
        decoding = student
        if decoding_dtype != next(student.parameters()).dtype:
            decoding = _student(script, config, mine, decoding_dtype, trained=False)
        teacher = None
        if shared:
            teacher = _student(script, config, mine, dtype, trained=False)
        elif theirs is not None:
            their_dtype = _dtype(script.teacher_dtype, theirs, script.teacher_gguf_file)
            teacher = _skeleton(script, theirs, their_dtype).eval().requires_grad_(False)
    with mode:
        for model in {id(m): m for m in (student, decoding, teacher) if m is not None}.values():
            to_fake(model)
    for model in (student, teacher):
        if model is not None:
            _check_experts(model)
            longest = max(config.max_new_tokens, script.max_response_length or 0)
            check_lengths(model, [[0] * config.max_prompt_length], longest)

    def small(role: str, layers: int) -> nn.Module:
        if role == "teacher" and not shared:
            return _skeleton(script, _cut(theirs, layers), their_dtype).eval().requires_grad_(False)
        whole = replace(script, student_layers=None)
        kind = decoding_dtype if role == "decoding" else dtype
        return _student(whole, config, _cut(mine, layers), kind, trained=role == "student")

    return Pair(mode, student, decoding, teacher, shared, small, notes)


def _check_experts(model: nn.Module) -> None:
    grouped = getattr(model.config.get_text_config(), "_experts_implementation", "") == "grouped_mm"
    if grouped and any(p.dim() == 3 and p.dtype != torch.bfloat16 for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: got experts in {model.dtype}, expected torch.bfloat16: in no "
            "other type can the shapes of their products be told without making them"
        )


def to_fake(model: nn.Module) -> None:
    """Replace the tensors of a model on the meta device by fake ones, tied ones by one."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:  # a bias that is not there
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = new
                store[name] = made[id(tensor)]


def _config(place: dict, role: str, notes: list[str]):
    config = load_config(**place)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and place["gguf_file"] is None:
        method = dict(quantised).get("quant_method", "unknown")
        notes.append(f"the {role} is quantised ({method}) and counted as if it were not")
        del config.quantization_config
    return config


def _dtype(name: str, config, gguf_file: str | None) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    stored = None if gguf_file is not None else config.get_text_config().dtype
    return stored or torch.float32


def _cut(config, layers: int):
    config = copy.deepcopy(config)
    text = config.get_text_config()
    keep_layers(text, range(layers), text.num_hidden_layers)
    return config


def _skeleton(script: ScriptArguments, config, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config),
        dtype=dtype,
        attn_implementation=script.attn_implementation,
        trust_remote_code=script.trust_remote_code,
    )


def _student(script, config: SwitchConfig, model_config, dtype, *, trained: bool) -> nn.Module:
    model = _skeleton(script, model_config, dtype)
    if script.student_layers is not None:
        cut_layers(model, script.student_layers)
    if not trained:
        return model.eval().requires_grad_(False)
    if config.disable_dropout:
        disable_dropout(model)
    adapter = peft_config(script)
    if adapter is not None:
        model = adapters.add(model, adapter, config.seed)
    if config.gradient_checkpointing:
        checkpoint_activations(model, config.gradient_checkpointing_kwargs)
    return model.train()
