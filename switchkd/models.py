"""Loading teacher and student, and the checks that they can share a rollout."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from switchkd.adapters import check_below_head
from switchkd.names import EMBEDDED, EMBEDDED_DIR


def load_tokenizer(name: str, *, gguf_file: str | None = None, **kwargs):
    """The tokenizer of a Hub id, a folder, or `embedded`; its pad token falls back to EOS.

    Masks are built from lengths, never from ids, so pad == eos is harmless here.
    """
    tokenizer = _load(AutoTokenizer, name, gguf_file, **kwargs)
    return check_tokenizer(tokenizer, f"tokenizer of {name}")


def check_tokenizer(tokenizer, name: str):
    """The tokenizer, its pad token set; ValueError if nothing could end a response."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: got no EOS token, expected one to end responses")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, dtype="auto", gguf_file: str | None = None, **kwargs):
    """A causal language model of a Hub id, a folder, `embedded`, or a GGUF file in either.

    Weights are read from safetensors (or dequantised from GGUF) only, never from pickles.
    """
    if gguf_file is None:
        kwargs.setdefault("use_safetensors", True)
    model = _load(AutoModelForCausalLM, name, gguf_file, dtype=dtype, **kwargs)
    if gguf_file is not None:  # the weights are dense now; drop the marks that forbid saving them
        for owner, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, mark):
                delattr(owner, mark)
        model.is_quantized = False
    return model


def load_config(name: str, *, gguf_file: str | None = None, **kwargs):
    """The configuration of what `load_model` would load; no weights are read."""
    return _load(AutoConfig, name, gguf_file, **kwargs)


def hub_commit(name: str, files: Iterable[str | None], revision: str | None) -> str | None:
    """The commit of a model on the Hub, of which any of these files has been loaded."""
    files = filter(None, files)
    cached = (try_to_load_from_cache(name, file, revision=revision) for file in files)
    return next((Path(path).parent.name for path in cached if isinstance(path, str)), None)


def _load(factory, name: str, gguf_file: str | None, **kwargs):
    path = str(EMBEDDED_DIR / "teacher") if name == EMBEDDED else name
    kind = "tokenizer" if factory is AutoTokenizer else "model"
    try:
        given = kwargs if gguf_file is None else {**kwargs, "gguf_file": gguf_file}
        return factory.from_pretrained(path, **given)
    except Exception as error:  # the libraries below raise a dozen types; name the file for all
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if HF_HUB_OFFLINE and not Path(path).exists():
            reason = "HF_HUB_OFFLINE is set, and it is neither a folder nor in the Hub's cache"
        if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            reason = "there is no such folder"  # and no id of the Hub is like that
        found = next(Path(path).glob("*.gguf"), None)
        if gguf_file is None and found is not None and not (Path(path) / "config.json").exists():
            reason = f"got no gguf_file (--gguf_file), and the folder holds {found.name}"
        raise ValueError(
            f"cannot load the {kind} {name!r}"
            + (f" (GGUF file {gguf_file})" if gguf_file else "")
            + f": {reason}; expected a Hub id or a folder with config.json and safetensors weights"
        ) from error


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in hidden states, below any adapter.

    Raises ValueError for prompt tuning and the like, which are not in the layers.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"got an adapter of type {adapter.peft_type}, expected one in the layers (LoRA): "
                "decoder and loss work below what it puts before the text"
            )
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return getattr(model, "model", decoder) if decoder is model else decoder  # Llama 4 says itself


def cache_name(model) -> str:
    """What a model's forward, and its output, call the cache: transformers 5.24 has renamed it, and
    Mamba's before."""
    kind = type(model.get_base_model() if hasattr(model, "peft_config") else model)
    names = inspect.signature(getattr(kind, "forward", kind.__call__)).parameters
    return next((x for x in ("cache", "cache_params") if x in names), "past_key_values")


def last_position(device: torch.device) -> int | Tensor:
    """`logits_to_keep` for logits of the last position alone.

    On a CPU as an index: of a slice, torch multiplies row by row with copies of a head that is in
    a half precision, which takes 150 times as long.
    """
    return torch.tensor([-1]) if device.type == "cpu" else 1


def checkpoint_activations(model, options: dict | None = None) -> None:
    """Compute activations again in the backward pass; transformers has renamed the method, too."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(logit_scale * (h W^T + b))."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """Logits (N, vocab_size) of hidden states (N, H), in fp32."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        weight = self.weight[:vocab_size]
        z = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# How configurations call a factor of the logits and what divides them (HyperCLOVA X multiplies).
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")


def head_of(model: nn.Module) -> Head:
    """The output head of a causal language model, with Gemma's soft cap and Cohere's scale; whether
    that is all, `knows_head` tells."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or not hasattr(layer, "weight"):
        raise ValueError(
            f"{type(model).__name__}: got no linear output head, expected get_output_embeddings()"
        )
    if not layer.weight.is_floating_point() or type(layer.weight.data) is not Tensor:
        raise ValueError(
            f"{type(model).__name__}: got an output head of {type(layer.weight.data).__name__}, "
            f"{layer.weight.dtype}, expected one that is not quantised (modules_to_not_convert)"
        )
    scale, softcap = 1.0, None
    for name in (*FACTORS, *DIVISORS):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            divides = name in DIVISORS and config.model_type != "hyperclovax"
            scale = scale / value if divides else scale * value
    for name in SOFTCAPS:
        softcap = softcap or getattr(config, name, None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


class _Hidden(BaseModelOutput):
    """What a decoder may return, with nothing in it but hidden states."""

    def __getattr__(self, name):
        return None


@torch.no_grad()
def knows_head(model: nn.Module) -> bool:
    """Whether a model's logits are those that `head_of` makes of its decoder's hidden states: tried
    on random states, for an architecture may do anything between the two. No layer is run."""
    head, decoder, training = head_of(model), decoder_of(model), model.training
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, head.weight.shape[1], generator=generator).to(head.weight)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=states.device)
    own = vars(decoder).get("forward")  # of a wrapper, if there is one
    decoder.forward = lambda *_, **__: _Hidden(last_hidden_state=states)
    try:
        # Not by a call of the model: hooks, which count or time its passes, are not concerned.
        logits = model.eval().forward(input_ids=tokens, use_cache=False, return_dict=True).logits
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
        model.train(training)
    made = head.logits(states[0], len(head.weight))
    if not isinstance(logits, Tensor) or logits.shape[1:] != made.shape:
        return False
    # What is not finite is another fault, which is found where a token is drawn.
    near = (made - logits[0].float()).norm() <= 0.02 * made.norm()
    return bool(near) or not made.isfinite().all()


def check_head(model: nn.Module, role: str) -> None:
    """Refuse a model whose loss would be that of other logits than its own."""
    check_below_head(model, f"{role}'s adapter")
    wrong = None
    if getattr(model.config, "is_encoder_decoder", False):
        wrong = "an encoder-decoder, expected a causal language model"
    elif hasattr(model, "_orig_mod"):  # it would be saved with that in all names
        wrong = "from torch.compile, expected the model in it; torch_compile true compiles one"
    elif not knows_head(model):
        wrong = (
            "which makes other logits of its hidden states than its output head does; "
            "expected a linear head, at most with a scale and a soft cap"
        )
    if wrong is not None:
        raise ValueError(f"{role}: got {type(model).__name__}, {wrong}")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards, each module is in the mode that it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(), which would set its frozen parts, too
            module.training = True


def layers_in(model: nn.Module) -> nn.ModuleList:
    """The layers of its decoder, whatever an architecture calls their list."""
    lists = (m for m in decoder_of(model).modules() if isinstance(m, nn.ModuleList))
    return next(lists, nn.ModuleList())


def parse_layers(text: str, count: int) -> list[int]:
    """'0-2,5' -> [0, 1, 2, 5], checked against a model of `count` layers."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"student_layers: got {text!r}, expected a form like 0-11,18-29")
        first, last = int(match[1]), int(match[2] or match[1])
        layers += range(first, last + 1)
    if not layers or layers != sorted(set(layers)) or layers[-1] >= count:
        raise ValueError(
            f"student_layers: got {text!r}, expected rising layer numbers from 0 to {count - 1}"
        )
    return layers


def keep_layers(config, keep: Sequence[int], count: int) -> None:
    """Let a configuration of `count` layers tell of some of them alone."""
    for key, value in list(vars(config).items()):  # layer_types, mlp_layer_types, no_rope_layers
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[i] for i in keep])
    for key in ("num_hidden_layers", "decoder_layers"):  # BART's num_hidden_layers: its encoder's
        if hasattr(config, key):
            setattr(config, key, len(keep))


def cut_layers(model: nn.Module, text: str) -> nn.Module:
    """Keep only some decoder layers of `model`, in place: the student cut from a teacher.

    Which ones matters: a contiguous block from the middle is the one to leave out.
    """
    decoder, config = decoder_of(model), model.config.get_text_config()
    name = next((n for n in ("layers", "h") if hasattr(decoder, n)), None)
    if name is None:
        raise ValueError(f"student_layers: {type(decoder).__name__} has no list of layers to cut")
    layers = getattr(decoder, name)
    keep = parse_layers(text, len(layers))
    keep_layers(config, keep, len(layers))
    kept = nn.ModuleList(layers[i] for i in keep)
    for index, layer in enumerate(kept):  # caches are addressed by layer_idx
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index
    setattr(decoder, name, kept)
    _check_cut(model, name, text)
    return model


def _check_cut(model: nn.Module, name: str, text: str) -> None:
    """Raise ValueError if the configuration would build other layers, as it will when the student
    is loaded: where layers differ by their place (dense ones first, scales by depth)."""
    try:
        again = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            built = getattr(decoder_of(type(model)(again)), name)
        have, made = (_traits(layers) for layers in (getattr(decoder_of(model), name), built))
        wrong = next((k for k in {**made, **have} if made.get(k) != have.get(k)), None)
        reason = wrong and f"{wrong} is {have.get(wrong)} and would be {made.get(wrong)}"
    except Exception as error:  # whatever a configuration finds wrong with itself
        reason = " ".join(str(error).split())
    if reason:
        raise ValueError(
            f"student_layers: got {text} of {type(model).__name__}, expected layers that its "
            f"configuration can tell of so few: {reason}"
        )


def _traits(layers: nn.ModuleList) -> dict[str, object]:
    """What a layer computes with, as far as a name can tell: types, shapes, and plain numbers."""
    found = {key: tuple(value.shape) for key, value in layers.state_dict().items()}
    for path, module in layers.named_modules():
        found[path] = type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (int, float, str))
            if plain and not key.startswith("_") and key != "training":
                found[f"{path}.{key}"] = value
    return found


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_weights(model: nn.Module, role: str) -> None:
    """Refuse a checkpoint with NaN or infinite weights before any work starts."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:  # quantised
            continue
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{role}: got NaN or infinite weights in {name}, expected finite ones")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, so that rollout and loss see the same student."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):  # some layers keep the rate as a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
