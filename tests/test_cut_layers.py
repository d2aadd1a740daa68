"""A student that is cut from a teacher is the one that its checkpoint will be."""

import pytest
import torch
import transformers
from conftest import EOS, PAD, VOCAB

from switchkd.models import cut_layers, load_model

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, bos_token_id=None, eos_token_id=EOS,
    pad_token_id=PAD, max_position_embeddings=64,
)  # fmt: skip
BART = dict(
    d_model=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48, bos_token_id=3,
    encoder_layers=4,
)  # fmt: skip
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    n_group=1, topk_group=1, num_key_value_heads=4, n_shared_experts=1,
)  # fmt: skip


def model_of(name, **changes):
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip("this version of transformers has none")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize(
    "name, changes",
    [
        ("Llama", {}),
        ("SmolLM3", dict(no_rope_layers=[1, 0, 0, 1])),
        ("Gemma3Text", dict(head_dim=8, sliding_window=4)),  # three windows, then all
        ("Qwen3Moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=2)),
        ("Bart", BART),
        ("Mamba", dict(state_size=4, expand=2)),
    ],
)
def test_a_cut_student_is_what_its_checkpoint_is(name, changes, tmp_path):
    model = model_of(name, **changes)
    if name == "Gemma3Text":
        model.config.layer_types[0] = "full_attention"
        model = type(model)(model.config).eval()
    cut_layers(model, "0,2-3")
    ids = torch.arange(2, 30)[None]
    want = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=torch.float32).eval()
    assert again.num_parameters() == model.num_parameters()
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, want)


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("DeepseekV3", LATENT | EXPERTS | dict(first_k_dense_replace=1), r"0\.mlp\..* and would"),
        ("DiffLlama", {}, r"lambda_init is 0\.\d+ and would be 0\.\d+"),
        ("Jamba", dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2), "and would be"),
        ("Gemma4Text", dict(head_dim=8, vocab_size_per_layer_input=VOCAB,
                            layer_types=["sliding_attention", "full_attention"] * 2),
         "per_layer_config"),
    ],
)  # fmt: skip
def test_layers_that_differ_by_their_place_are_refused(name, changes, reason):
    """When the run is over, its checkpoint would be read as another model, or not at all."""
    model = model_of(name, **changes)
    with pytest.raises(ValueError, match=f"student_layers: got 1,3 of .*{reason}"):
        cut_layers(model, "1,3")
