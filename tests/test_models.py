"""Shared tokenizers, padded vocabularies, cut layers, heads; refusals with the reason."""

import warnings

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, EOS, PAD, VOCAB, byte_tokenizer, tiny_model
from torch import nn

from switchkd.decoder import rollout
from switchkd.losses import collate, distillation_loss, response_hidden, response_labels
from switchkd.models import (
    cache_name,
    check_head,
    check_weights,
    cut_layers,
    decoder_of,
    disable_dropout,
    head_of,
    layers_in,
    load_model,
    load_tokenizer,
    parse_layers,
)
from switchkd.rollout import rollout_naive
from switchkd.vocabulary import share_vocabulary

SIZE = 258  # of the byte tokenizer


def pair(**kwargs):
    return tiny_model(vocab_size=SIZE, seed=1, **kwargs), tiny_model(vocab_size=SIZE, seed=2)


def test_equal_tokenizers_are_shared(tokenizer):
    teacher, student = pair()
    shared = share_vocabulary(teacher, student, byte_tokenizer(), tokenizer)
    assert (shared.size, shared.eos_token_ids, shared.pad_token_id) == (SIZE, (1,), 0)
    assert shared.notes == ()


def test_different_tokenizers_are_refused_with_the_first_difference(tokenizer):
    teacher, student = pair()
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"do not share a tokenizer: token '<new>' has id 258 for"):
        share_vocabulary(teacher, student, other, tokenizer)


def test_what_differs_is_reported(tokenizer):
    teacher = tiny_model(vocab_size=SIZE + 6, seed=1, num_hidden_layers=1)
    student = tiny_model(vocab_size=SIZE, seed=2)
    teacher.generation_config.eos_token_id = [1, 7]
    theirs = byte_tokenizer()
    theirs.chat_template = "{{ messages }}"
    shared = share_vocabulary(teacher, student, theirs, tokenizer)
    assert shared.eos_token_ids == (1, 7)
    text = " | ".join(shared.notes)
    assert "EOS differs: teacher [1, 7], student [1]" in text
    assert "chat templates differ" in text
    assert "teacher: 6 padded vocabulary rows" in text
    assert "smaller than the student" in text


def test_a_head_too_small_for_the_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"student: got a head of 100 rows, expected at least 258"):
        share_vocabulary(None, tiny_model(vocab_size=100), None, tokenizer)


@pytest.mark.parametrize("text", ["", "2,1", "0,0", "0-9", "a", "1-"])
def test_impossible_layers(text):
    with pytest.raises(ValueError, match="student_layers: got"):
        parse_layers(text, 6)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "qwen3"])
def test_cut_layers_runs_as_the_layers_that_are_left(architecture, tmp_path):
    model = tiny_model(architecture, num_hidden_layers=2)
    ids = torch.tensor([[5, 6, 7]])
    layers = getattr(decoder_of(model), "h", None) or decoder_of(model).layers
    kept = layers[1]
    assert len(layers_in(model)) == 2
    cut_layers(model, "1")
    assert len(layers_in(model)) == 1
    assert (getattr(decoder_of(model), "h", None) or decoder_of(model).layers)[0] is kept
    whole = model(ids, use_cache=True).logits
    name = cache_name(model)
    cache = getattr(model(ids[:, :2], use_cache=True), name)
    step = model(ids[:, 2:], use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(whole[:, 2:], step)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_go_by_the_name_that_the_model_has_for_them(architecture):
    model, bare = tiny_model(architecture), torch.nn.Linear(1, 1)
    options = dict(max_new_tokens=3, eos_token_ids=[1], pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a name that will not be there for long
        block, naive = (f(None, model, [[3, 4]], **options) for f in (rollout, rollout_naive))
    assert torch.equal(block.tokens, naive.tokens)
    assert cache_name(bare) == "past_key_values"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_and_hidden_states_rebuild_the_logits(architecture):
    model = tiny_model(architecture)
    batch = collate([[3, 4], [5]], [[6, 7, 1], [8, 9]], pad=0)
    hidden = response_hidden(model, decoder_of(model), batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # response tokens 6 7 1 are predicted at positions 1 2 3, and 8 9 at positions 0 1
    want = torch.cat([logits[0, 1:4], logits[1, 0:2]])
    torch.testing.assert_close(
        head_of(model).logits(hidden, 60).double(), want, rtol=1e-5, atol=1e-5
    )
    assert response_labels(batch).tolist() == [6, 7, 1, 8, 9]


def test_no_loss_on_the_prompt_and_none_missed_on_the_response():
    """The loss is the sum over the response positions, and over no other."""
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    prompts, completions = [[3, 4, 5]], [[6, 7, 1]]
    batch = collate(prompts, completions, pad=0)
    assert batch["completion_mask"].tolist() == [[False, False, False, True, True, True]]
    options = dict(vocab_size=60, kind="cross_entropy")
    loss = distillation_loss(None, student, student, batch, **options)
    log_q = student(batch["input_ids"]).logits[0].log_softmax(-1)
    want = -sum(log_q[i, t] for i, t in ((2, 6), (3, 7), (4, 1)))
    torch.testing.assert_close(loss, want)
    both = distillation_loss(teacher, student, student, batch, vocab_size=60, kind="tvd")
    p, q = (m(batch["input_ids"]).logits[0, 2:5].softmax(-1) for m in (teacher, student))
    torch.testing.assert_close(both, (p - q).abs().sum() / 2)


def test_softcap_and_scale_are_read_from_the_configuration():
    model = tiny_model()
    model.config.final_logit_softcapping, model.config.logit_scale = 30.0, 0.5
    head = head_of(model)
    hidden = torch.randn(3, 32, dtype=torch.float64)
    want = 30 * torch.tanh(0.5 * (hidden @ model.lm_head.weight.T) / 30)
    torch.testing.assert_close(head.logits(hidden, 60).double(), want, rtol=1e-5, atol=1e-5)


# Between hidden states and logits: a factor, a divisor, a cap, a decoder with an unusual name, and
# for the last something that is no head of ours.
HEADS = {
    "HyperCLOVAXConfig": dict(logits_scaling=3.0),
    "GraniteConfig": dict(logits_scaling=3.0),
    "CohereConfig": dict(),
    "FalconH1Config": dict(
        lm_head_multiplier=0.2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "Gemma2Config": dict(),
    "Llama4TextConfig": dict(intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "ModernBertDecoderConfig": dict(bos_token_id=0, cls_token_id=0, sep_token_id=0),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_that_of_the_models_own_logits(name):
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers has none")
    options = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options | HEADS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    if name == "ModernBertDecoderConfig":
        with pytest.raises(ValueError, match="student: got ModernBertDecoderForCausalLM, which"):
            check_head(model, "student")
        return
    check_head(model, "student")
    assert model.training
    batch = collate([[3, 4, 5]], [[6, 7, 1]], pad=PAD)
    loss = distillation_loss(None, model, model, batch, vocab_size=VOCAB, kind="cross_entropy")
    log_q = model(batch["input_ids"]).logits[0].log_softmax(-1)
    want = -sum(log_q[i, t] for i, t in ((2, 6), (3, 7), (4, 1)))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)


def test_the_text_of_a_model_that_sees_is_distilled():
    """Gemma 3 from 4B on: its decoder's output is unpacked by name."""
    text = tiny_model("gemma3").config.to_dict()
    sight = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sight |= dict(image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=sight)
    torch.manual_seed(0)
    seeing = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    check_head(seeing, "teacher")
    options = dict(max_new_tokens=8, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB)
    student, prompts = tiny_model("gemma3", seed=1), [[3, 4, 5, 6, 7, 8], [9]]
    block, naive = (f(seeing, student, prompts, **options) for f in (rollout, rollout_naive))
    assert torch.equal(block.tokens, naive.tokens)
    assert torch.equal(block.from_teacher, naive.from_teacher)
    batch = collate(prompts, block.completions(), pad=PAD)
    given = dict(vocab_size=VOCAB, kind="skew_reverse_kl", alpha=0.1)
    assert distillation_loss(seeing, student, student, batch, **given) > 0


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="teacher: got T5ForConditionalGeneration, an encoder-"):
        check_head(transformers.T5ForConditionalGeneration(config), "teacher")


def test_compiled_models_are_refused():
    with pytest.raises(
        ValueError, match="got OptimizedModule, from torch.compile, .* torch_compile"
    ):
        check_head(torch.compile(tiny_model(), backend="eager"), "student")


@pytest.mark.parametrize("decode", [rollout, rollout_naive])
def test_models_that_return_tuples_are_refused(decode):
    model = tiny_model()
    model.config.return_dict = False
    check_head(model, "student")  # an output without names is no other head
    with pytest.raises(ValueError, match="LlamaConfig.return_dict: got False, expected True"):
        decode(None, model, [[5]], max_new_tokens=2, eos_token_ids=[EOS], pad_token_id=PAD)


def test_broken_weights_are_refused_before_any_work():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(
        ValueError, match=r"teacher: got NaN or infinite weights in lm_head\.weight"
    ):
        check_weights(model, "teacher")


def test_missing_and_corrupt_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot load the model .*absent"):
        load_model(str(tmp_path / "absent"))
    for name in ("./absent", "~/absent", "runs/absent/model"):
        with pytest.raises(
            ValueError, match="cannot load the tokenizer .* there is no such folder"
        ):
            load_tokenizer(name)
    with pytest.raises(ValueError, match="cannot load the tokenizer .*absent"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "a.gguf").write_bytes(b"")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"got no gguf_file \(--gguf_file\), and .* a\.gguf;"):
            load(str(tmp_path))
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load the model .*expected a Hub id or a folder"):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        load_model(str(tmp_path))


def test_dropout_is_switched_off_wherever_it_is_kept():
    model = tiny_model("gpt2")
    disable_dropout(model)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates and not any(rates)
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_loss_goes_through_the_wrapper_of_the_student():
    """What wraps a model (DDP) must see the forward, or gradients are not reduced over ranks."""

    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    wrapper = Wrapper(student)
    batch = collate([[3, 4, 5]], [[6, 7, 1]], pad=0)
    loss = distillation_loss(teacher, wrapper, student, batch, vocab_size=60, kind="tvd")
    loss.backward()
    assert wrapper.calls == 1
    assert all(p.grad is not None for p in student.parameters())


def test_offline_a_missing_model_says_that_it_is_looked_for_on_disk_only(monkeypatch):
    monkeypatch.setattr("switchkd.models.HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 sets it
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"absent/model'.*HF_HUB_OFFLINE is set, .* cache"):
            load("absent/model")
    assert load_tokenizer("embedded").eos_token_id is not None
