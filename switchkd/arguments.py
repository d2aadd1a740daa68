"""Options for what `transformers.TrainingArguments` knows nothing of: the models and the data.

Names follow TRL's ModelConfig and ScriptArguments where those have one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Real
from types import NoneType
from typing import get_args, get_type_hints

from switchkd.names import EMBEDDED
from switchkd.quantization import NAMED
from switchkd.templates import TEMPLATES

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def option(text: str, default=None, **flag):
    """A dataclass field with its help text; `flag` goes to argparse."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata={"help": text, **flag})
    return field(default=default, metadata={"help": text, **flag})


def expect(options, name: str, ok: bool, expected: str) -> None:
    """ValueError unless the option of that name is as expected."""
    if not ok:
        raise ValueError(f"{name}: got {getattr(options, name)!r}, expected {expected}")


def read_mapping(options, name: str) -> None:
    """An option that may come as JSON, as a mapping or None."""
    value = getattr(options, name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    ok = value is None or isinstance(value, dict)
    expect(options, name, ok, 'a mapping, or JSON of one: {"name": value}')
    setattr(options, name, value or None)


def check_numbers(options) -> None:
    """Options that are numbers or truths are no text, as a file may hold: "false" would be true."""
    hints = get_type_hints(type(options))
    for one in fields(options):
        kinds = {*(get_args(hints[one.name]) or (hints[one.name],))}
        if one.init and kinds <= {bool, int, float, NoneType}:
            value = getattr(options, one.name)
            ok = isinstance(value, Real) or (value is None and NoneType in kinds)
            expect(options, one.name, ok, "true or false" if bool in kinds else "a number")


def is_whole(value, least: int) -> bool:
    return isinstance(value, int) and value >= least


@dataclass
class ScriptArguments:
    """Which models and which data.

    Raises ValueError at construction for values that cannot work, saying got and expected.
    """

    model_name_or_path: str = option("Student: Hub id, folder, or 'embedded'.", EMBEDDED)
    model_revision: str = option("Revision of the student on the Hub.", "main")
    gguf_file: str | None = option("Read the student from this GGUF file in its folder.")
    student_layers: str | None = option("Keep only these layers of the student, e.g. 0-11,18-29.")
    student_quantization: str | None = option(
        "The student's base in fewer bits, under its adapter (QLoRA): as teacher_quantization."
    )
    dtype: str = option("Type of the student's weights: float32, bfloat16, auto.", "float32")
    attn_implementation: str | None = option("Attention of both models: sdpa, eager, ...")
    trust_remote_code: bool = option("Allow code from the Hub for both models.", False)
    teacher_model_name_or_path: str | None = option("Teacher: Hub id, folder, or 'embedded'.")
    teacher_model_revision: str = option("Revision of the teacher on the Hub.", "main")
    teacher_gguf_file: str | None = option("Read the teacher from this GGUF file in its folder.")
    teacher_dtype: str = option("Type of the teacher's weights.", "auto")
    teacher_quantization: str | None = option(f"{', '.join(NAMED)}, or JSON of such a config.")
    use_peft: bool = option("Train LoRA adapters on the student (needs peft).", False)
    lora_r: int = option("Rank of the LoRA adapters.", 16)
    lora_alpha: int = option("Scale of the LoRA adapters.", 32)
    lora_dropout: float = option("Dropout of the LoRA adapters.", 0.0)
    lora_target_modules: list[str] | None = option("Their modules: q_proj v_proj; all-linear.")
    dataset_name: str = option("Training data: .jsonl file, Hub id, or 'embedded'.", EMBEDDED)
    dataset_train_split: str = option("Split to train on (Hub and embedded data).", "train")
    exclude_dataset_name: str | None = option(
        "Rows whose prompt is in this data are left out of training, e.g. a test set."
    )
    eval_dataset_name: str | None = option("Validation data; by default rows held out of training.")
    dataset_test_split: str = option("Split of the validation data.", "validation")
    eval_size: int = option("Rows held out for validation, or at most so many are used.", 100)
    split_seed: int = option(
        "Seed of the rows held out for validation: the same for every training seed.", 42
    )
    max_train_rows: int | None = option("Use only the first so many rows.")
    max_response_length: int | None = option(
        "Response tokens of data rows at most; longer rows are left out. Default: max_new_tokens."
    )
    skip_malformed: bool = option("Leave malformed rows out instead of stopping.", False)
    template: str = option(f"One of {', '.join(TEMPLATES)}.", "auto")

    def __post_init__(self):
        need = partial(expect, self)
        for name in ("dtype", "teacher_dtype"):
            value = DTYPES.get(getattr(self, name), getattr(self, name))
            need(name, value in ("auto", *DTYPES.values()), f"{', '.join(DTYPES.values())} or auto")
            setattr(self, name, value)
        for one in fields(self):
            idle = one.name.startswith("lora_") and not self.use_peft
            same = getattr(self, one.name) == one.default
            need(one.name, same or not idle, "use_peft true with it")
        if self.student_quantization is not None:
            need("use_peft", self.use_peft, "true with student_quantization: adapters are trained")
            for name in ("student_layers", "gguf_file"):
                need(name, getattr(self, name) is None, "none with student_quantization")
        for name in ("lora_r", "eval_size", "max_train_rows", "max_response_length"):
            value = getattr(self, name)
            need(name, value is None or value >= 1, "an integer >= 1")
        need("template", self.template in TEMPLATES, f"one of {', '.join(TEMPLATES)}")
