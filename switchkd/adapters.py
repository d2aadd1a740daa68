"""LoRA adapters: added to a student, loaded for evaluation; a teacher that is its base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base"  # in the folder of a run: the cut student that its adapter belongs to


def _peft():
    try:
        import peft
    except ImportError:
        raise ValueError("adapters need the package peft; pip install peft") from None
    return peft


def view(model: nn.Module) -> nn.Module:
    """The model in modules of its own, with the same tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def share_base(student: nn.Module, teacher: nn.Module | None, peft_config) -> nn.Module:
    """The teacher that is `student` before it gets an adapter: a `view` of it.

    An adapter is put into the student's modules and leaves the tensors as they are, so nothing has
    to be switched off around the teacher's passes: a CUDA graph or a compiled function of either
    model stays valid, and both may decode in turns.
    """
    if teacher is not None:
        raise ValueError("teacher_is_base: got a teacher, too; expected the student's base alone")
    if peft_config is None:
        raise ValueError("teacher_is_base: got no adapter, expected use_peft or a peft_config")
    if getattr(peft_config, "bias", "none") != "none":
        raise ValueError(
            f"teacher_is_base: got an adapter with bias {peft_config.bias!r}, expected 'none': "
            "training the base's biases would change the teacher"
        )
    return view(student)


def add(model: nn.Module, peft_config, seed: int) -> nn.Module:
    """`model` with an adapter to train, drawn from `seed`: the same in each process.

    Raises ValueError for an adapter on the output head: the loss multiplies by its weights; for one
    that is no part of the layers, or puts one layer in several places; and for a model that has one
    already, in whose place peft would put the new one.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            "use_peft: got a model that has an adapter already, expected it merged into its base "
            "(merge_and_unload)"
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_config: got {type(peft_config).__name__}, expected an adapter in the layers "
            "(LoRA): decoder and loss work below what it puts before the text"
        )
    refused = {
        "alora_invocation_tokens": "decoder and loss work below what switches it on",
        "layer_replication": "copies of a layer share its place in a cache",
    }
    for name, reason in refused.items():
        value = getattr(peft_config, name, None)
        if value is not None:
            raise ValueError(f"peft_config: got {name} {value}, expected none: {reason}")
    set_seed(seed)
    try:
        model = _peft().get_peft_model(model, peft_config)
    except ValueError as error:
        if getattr(peft_config, "target_modules", "") is not None:
            raise
        raise ValueError(
            f"lora_target_modules: got none, and peft knows none for {model.config.model_type!r}; "
            "expected all-linear or names of modules"
        ) from error
    check_below_head(model, "lora_target_modules")
    return model


def check_below_head(model: nn.Module, name: str) -> None:
    """Refuse an adapter on the output head; one that is trained whole (modules_to_save) is none."""
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            f"{name}: got the output head, expected layers below it: the loss works on the head's "
            "weights and would not see its adapter"
        )


def find(model: str, adapter: str | None) -> tuple[str, str | None]:
    """(base model, folder of the adapter or None) of what is to be evaluated.

    model: a Hub id or folder; one that holds an adapter names its base. adapter: its folder, given.
    """
    if adapter is None and not (Path(model) / ADAPTER_CONFIG).is_file():
        return model, None
    folder = Path(adapter or model)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter {folder}: no readable {ADAPTER_CONFIG} ({error})") from None
    if adapter is not None:
        return model, adapter
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"adapter {folder}: {ADAPTER_CONFIG} names no base model, expected it as "
            "model_name_or_path with the folder as adapter"
        )
    if Path(base).name == BASE and not Path(base).exists():  # of a run that has been moved
        near = (folder / BASE, folder.parent / BASE)  # the latter for a checkpoint
        base = next((str(place) for place in near if place.is_dir()), base)
    return base, model


def load(model: nn.Module, folder: str) -> nn.Module:
    """`model` with the adapter of a folder, frozen; raises ValueError if it does not fit."""
    peft = _peft()
    try:
        model = peft.PeftModel.from_pretrained(model, folder)
        with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as tensors:
            saved = set(tensors.keys())
    except Exception as error:  # peft and safetensors raise a dozen types
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load the adapter {folder}: {reason}") from error
    strays = saved ^ set(peft.get_peft_model_state_dict(model))
    if strays:
        raise ValueError(
            f"adapter {folder}: it does not fit the base model ({min(strays)}); expected the model "
            "that it was trained on"
        )
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():  # what ended responses in training
        model.generation_config.eos_token_id = GenerationConfig.from_pretrained(folder).eos_token_id
    return model.eval()
