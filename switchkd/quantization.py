"""Weights in fewer bits, by the backends that transformers loads: names and JSON to configs."""

from __future__ import annotations

import json

import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig


def _torchao(kind: str) -> TorchAoConfig:
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, kind)())


NAMED = {
    "4bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: _torchao("Int4WeightOnlyConfig"),
    "quanto-int8": lambda: QuantoConfig(weights="int8"),
    "quanto-int4": lambda: QuantoConfig(weights="int4"),
}


def quantization_config(text: str, option: str = "teacher_quantization"):
    """The config of a name in `NAMED`, or of a JSON object as transformers writes it.

    Raises ValueError for another name, for JSON without a known quant_method, and where the
    backend is not installed.
    """
    if text in NAMED:
        make = NAMED[text]
    elif text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{option}: not valid JSON ({error})") from None
        method = values.get("quant_method")
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ValueError(f"{option}: got quant_method {method!r}, expected one of {known}")

        def make():
            return AutoQuantizationConfig.from_dict(values)
    else:
        raise ValueError(
            f"{option}: got {text!r}, expected one of {', '.join(NAMED)}, or a JSON "
            'object with "quant_method"'
        )
    try:
        return make()
    except (ImportError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} {text}: {reason}") from error
