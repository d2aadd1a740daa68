"""The row cache: what a model says with it is what it says without."""

import pytest
import torch
from conftest import ARCHITECTURES, OTHERS, VOCAB, tiny_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    GPTBigCodeConfig,
    Llama4TextConfig,
    OpenAIGPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from switchkd import attention
from switchkd.cache import CachedModel, NotServed, position_bytes, row_bytes
from switchkd.decoder import rollout
from switchkd.rollout import rollout_naive


def test_layers_and_attention_that_a_cache_cannot_serve_are_refused():
    hybrid = tiny_model("qwen2")
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention.*naive loop"):
        CachedModel(hybrid, 1, 8)
    other = tiny_model()
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        CachedModel(other, 1, 8)


SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=None)
HEADS = dict(SMALL, intermediate_size=96, num_attention_heads=4, max_position_embeddings=64)
ROLL = dict(max_new_tokens=3, eos_token_ids=[1], pad_token_id=0)


@pytest.mark.parametrize(
    "config, naive, block",
    [
        (RwkvConfig(**SMALL), "got an output without", "takes no cache"),
        (OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4),
         "got an output without", "takes no cache"),
        (RecurrentGemmaConfig(**{**HEADS, "num_hidden_layers": 3}, lru_width=32),
         "got an output without", "linear_attention|leaves nothing in the cache"),
        (DogeConfig(**HEADS, pad_token_id=0), None, "keep_window_size.*naive loop decodes it"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_models_that_cannot_be_decoded_are_refused(config, naive, block):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=block):
        rollout(None, model, [[5, 6], [7]], **ROLL)
    if naive is None:
        assert rollout_naive(None, model, [[5, 6], [7]], **ROLL).tokens.shape == (2, 3)
        return
    with pytest.raises(ValueError, match=naive):
        rollout_naive(None, model, [[5, 6], [7]], **ROLL)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES + OTHERS)
def test_cache_agrees_with_a_full_forward_pass(exact_rule, name, attention, one_by_one):
    """Unequal lengths, rows out of order, blocks of several sizes, a rollback and what follows."""
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    ids = torch.randint(2, VOCAB, (3, 20))
    full = model(ids).logits
    cached = CachedModel(model, slots=4, capacity=24)
    order, prompt = torch.tensor([1, 2, 0]), torch.tensor([9, 6, 4])
    cached.feed(ids[order, :9], 0 * prompt, 9, rows=torch.tensor([0, 1, 2]), counts=prompt)
    lengths = prompt.clone()
    for count, back in ((1, 0), (3, 2), (4, 1), (1, 0)):
        tokens = torch.stack([ids[i, n : n + count] for i, n in zip(order, lengths, strict=True)])
        reach = int(lengths.max()) + count
        if one_by_one:
            drafts = [tokens[:, i : i + 1] for i in range(count)]
            hidden = [cached.feed(x, lengths + i, reach, more=i) for i, x in enumerate(drafts)]
            hidden = torch.cat(hidden, 1)
        else:
            hidden = cached.feed(tokens, lengths, reach)
        logits = cached.logits(hidden)
        want = torch.stack([full[i, n : n + count] for i, n in zip(order, lengths, strict=True)])
        exact = attention == "sdpa"  # the eager one takes its softmax in float32
        tolerance = dict(rtol=1e-9, atol=1e-9) if exact else dict(rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(logits, want, **tolerance)
        lengths += count - back


def flash_attn(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size, softcap):
    """What `flash_attn_with_kvcache` computes: queries (b, q, Hq, d) end at cache_seqlens."""
    assert causal and not softcap and k_cache.stride(-1) == 1
    where = torch.arange(k_cache.shape[1])
    last = cache_seqlens[:, None] - q.shape[1] + torch.arange(q.shape[1])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k_cache, v_cache))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    scores.masked_fill_(where > last[:, None, :, None], float("-inf"))
    if window_size != (-1, -1):
        scores.masked_fill_(where < last[:, None, :, None] - window_size[0], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("name", ARCHITECTURES + OTHERS)
def test_flash_attention_is_given_what_it_wants(exact_rule, name, monkeypatch):
    widths = []

    def recorded(q, *caches, **options):
        widths.append(q.shape[1])
        return flash_attn(q, *caches, **options)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", recorded)
    monkeypatch.setattr("switchkd.cache.attention_for", lambda model: attention.FLASH)
    test_cache_agrees_with_a_full_forward_pass(None, name, "sdpa", False)
    layers = 1 if name in ("lfm2", "qwen3_next") else 2  # with attention
    assert widths == [n for n in (9, 1, 3, 4, 1) for _ in range(layers)]


def test_what_attention_is_not_given_is_refused():
    model = tiny_model()
    for name in (attention.ROWS, attention.FLASH):
        function = attention.AttentionInterface()[name]
        with pytest.raises(ValueError, match="LlamaForCausalLM: got s_aux in attention"):
            function(model, None, None, None, None, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="got softcap in attention.*eager"):
        attention.AttentionInterface()[attention.ROWS](model, None, None, None, None, softcap=30.0)


def test_attention_that_cools_with_the_length_of_a_batch_is_refused():
    sizes = dict(num_key_value_heads=2, num_local_experts=2, attention_chunk_size=8, floor_scale=16)
    config = Llama4TextConfig(**HEADS, **sizes, intermediate_size_mlp=48, head_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert rollout(None, model, [[5, 6], [7]], **ROLL).tokens.shape == (2, 3)
    with pytest.raises(NotServed, match="got rows of 17 positions, expected fewer than 16"):
        rollout(None, model, [[5] * 14, [7]], **ROLL)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", *OTHERS, "gpt_bigcode", "deepseek"])
def test_the_memory_of_a_position_is_what_a_cache_takes(name):
    """Fewer heads, one for all of them, compressed ones of other widths than the configuration's"""
    if name == "gpt_bigcode":
        config = GPTBigCodeConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    elif name == "deepseek":
        ranks = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=12)
        config = DeepseekV3Config(**HEADS, **ranks, v_head_dim=8, first_k_dense_replace=2)
    model = tiny_model(name) if name in ARCHITECTURES + OTHERS else None
    model = model or AutoModelForCausalLM.from_config(config).eval()
    cached = CachedModel(model, slots=3, capacity=16)
    cached.feed(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 2)
    layers = cached.cache.layers
    stores = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
    assert position_bytes(model) * 3 * 16 == sum(x.nbytes for x in stores)
    states = [x for layer in layers for x in layer.state.stores()]
    assert row_bytes(model, 8) * 3 == sum(x.nbytes for x in states)
    assert bool(states) == (name in ("lfm2", "qwen3_next"))


def test_attention_of_the_model_is_left_as_it_was():
    model = tiny_model()
    cached = CachedModel(model, 2, 8)
    cached.feed(torch.tensor([[3]]), torch.tensor([0]), 1)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        cached.feed(torch.tensor([[3]]), torch.tensor([8]), 9)  # beyond the capacity
    assert model.config._attn_implementation == "sdpa"
