"""Small models, a tokenizer without files, and settings that hold for every test."""

import os
from contextlib import suppress
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny, and other tests run beside: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # read when the kernels are defined: they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cache,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.models.qwen3_next import modeling_qwen3_next


def _patch_once() -> None:
    """Triton's interpreter patches its language again whenever one function calls another: a third
    of the time of the interpreted tests, for nothing."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()

    def once(fn):
        langs = [lang for lang in (tl, tl.core) if lang in fn.__globals__.values()]
        unpatched = [lang for lang in langs if tl.core.is_builtin(lang.load)]
        return nothing if langs and not unpatched else patch(fn)

    interpreter._patch_lang = once


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    with suppress(AttributeError):  # another version's interpreter has other names
        _patch_once()
torch.set_num_threads(1)  # whatever OMP_NUM_THREADS was

VOCAB = 60  # shared real vocabulary of the tiny models
EOS, PAD = 1, 0

_DEEP = dict(
    num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=128
)
_GATED = dict(**_DEEP, intermediate_size=48, num_key_value_heads=2)


def _config(name: str, vocab_size: int, **changes):
    ids = dict(vocab_size=vocab_size, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
    if name == "gpt2":
        return GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=128, **ids)
    if name == "opt":
        return OPTConfig(**_DEEP, ffn_dim=48, word_embed_proj_dim=16, **ids)
    if name == "bloom":
        return BloomConfig(n_layer=2, n_head=4, hidden_size=32, **ids)
    if name == "mistral":
        return MistralConfig(**{**_GATED, "sliding_window": 5, **changes}, **ids)
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        own = dict(head_dim=8, sliding_window=5, layer_types=kinds)
        return Gemma3TextConfig(**{**_GATED, **own, **changes}, **ids)
    if name == "lfm2":
        own = dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
        return Lfm2Config(**{**_GATED, **own, **changes}, **ids)
    if name == "qwen3_next":
        heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, head_dim=8)
        own = dict(linear_key_head_dim=8, linear_value_head_dim=12, mlp_only_layers=[0, 1])
        kinds = ["linear_attention", "full_attention"]
        return Qwen3NextConfig(**{**_GATED, **heads, **own, "layer_types": kinds, **changes}, **ids)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[name]
    extra = {"head_dim": 8} if name == "qwen3" else {}
    return kind(**{**_GATED, **changes}, **extra, **ids)


ARCHITECTURES = ("gpt2", "opt", "llama", "qwen2", "qwen3")
OTHERS = ("mistral", "gemma3")  # windows in all layers, and in one of two
if hasattr(Cache, "get_conv_state"):  # as the block decoder asks
    OTHERS += ("lfm2", "qwen3_next")  # one of two layers without attention


def tiny_model(name="llama", *, seed=0, vocab_size=VOCAB, dtype=torch.float64, spread=15.0, **kw):
    """A random model whose distributions are far from uniform (`spread` scales the head)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(name, vocab_size, **kw)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    return model


def byte_tokenizer(pad="<pad>"):
    """One token a byte, the first ids special; pad may be '<eos>', too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<eos>"]
    table = {token: i for i, token in enumerate([*specials, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=table, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token=pad)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _delta_rule(query, key, value, g, beta, initial_state=None, **_):
    """A token after the other, in float64 if they are; transformers goes to float32."""
    more = value.shape[2] // key.shape[2]
    query, key = (torch.nn.functional.normalize(x, dim=-1, eps=1e-3) for x in (query, key))
    query, key = (x.repeat_interleave(more, 2) for x in (query * key.shape[3] ** -0.5, key))
    state, out = initial_state, []
    if state is None:
        state = key.new_zeros(len(key), key.shape[2], key.shape[3], value.shape[3])
    for q, k, v, decay, write in zip(
        *(x.unbind(1) for x in (query, key, value, g, beta)), strict=True
    ):
        state = state * decay.exp()[..., None, None]
        change = (v - torch.einsum("bhk,bhkv->bhv", k, state)) * write[..., None]
        state = state + k[..., None] * change[..., None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q, state))
    return torch.stack(out, 1).to(value.dtype), state


@pytest.fixture
def exact_rule(monkeypatch):
    """For Qwen3-Next: what is equal in float64 is compared in float64."""
    for name in ("chunk", "recurrent"):
        monkeypatch.setattr(modeling_qwen3_next, f"torch_{name}_gated_delta_rule", _delta_rule)
