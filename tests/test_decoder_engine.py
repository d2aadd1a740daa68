"""An engine from rollout to rollout, and what the block decoder refuses."""

import dataclasses

import pytest
import torch
from conftest import VOCAB, byte_tokenizer, tiny_model
from switchkd_kernels import InvalidLogits
from test_decoder import COMMON, T, assert_same, pair, prompts
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTBigCodeConfig,
    GPTNeoConfig,
    Phi3Config,
)
from transformers.activations import NewGELUActivation

from switchkd import decoder
from switchkd.cache import NotServed
from switchkd.data import Row
from switchkd.decoder import rollout
from switchkd.engine import Engine
from switchkd.layers import few_rows
from switchkd.metrics import generate
from switchkd.policies import AdaSwitch, Student, Switch, Teacher
from switchkd.rollout import Sampling, rollout_naive
from switchkd.vocabulary import Vocabulary

POLICY = Switch(max_new_tokens=T)


def test_nan_in_a_cache_does_not_outlive_its_rollout():
    teacher, student = pair()
    kept, weights = (
        Engine(teacher, student),
        {k: v.clone() for k, v in student.state_dict().items()},
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(InvalidLogits):
        rollout(teacher, student, [list(range(3, 11))] * 2, POLICY, engine=kept, **COMMON)
    student.load_state_dict(weights)
    texts = [[3], list(range(7, 15))]
    got = rollout(teacher, student, texts, POLICY, engine=kept, **COMMON)
    assert_same(got, rollout_naive(teacher, student, texts, POLICY, **COMMON))


def test_a_flagged_token_is_named(monkeypatch):
    """Kernels on a GPU flag a row and do not raise: here the third of the response."""
    model, _ = pair()
    select = decoder.switch_select

    def flag(*args, **kwargs):
        chosen = select(*args, **kwargs)
        bad = (kwargs["positions"] == 2) & (kwargs["sequence_ids"] == 1)
        return chosen._replace(token=chosen.token.masked_fill(bad, -1))

    monkeypatch.setattr(decoder, "switch_select", flag)
    for block in (1, 3, 4):
        with pytest.raises(InvalidLogits, match="token 2 of sequence 1:") as error:
            rollout(model, model, prompts(3), POLICY, block=block, **COMMON)
        assert error.value.row == 1


def test_an_engine_serves_its_own_models_alone():
    teacher, student = pair()
    kept = Engine(teacher, student)
    for models in ((teacher, teacher), (None, student)):
        with pytest.raises(ValueError, match="engine: got one of other models"):
            rollout(*models, prompts(), Student(), engine=kept, **COMMON)
    with pytest.raises(ValueError, match="got an engine and block, drafter or costs"):
        rollout(teacher, student, prompts(), POLICY, engine=kept, block=2, **COMMON)


def test_an_engine_follows_its_models_to_another_dtype_and_mode():
    teacher, student = pair()
    kept = Engine(teacher, student)
    with torch.inference_mode():
        rollout(teacher, student, prompts(), POLICY, engine=kept, **COMMON)
    want = rollout_naive(teacher, student, prompts(), POLICY, **COMMON)
    assert_same(rollout(teacher, student, prompts(), POLICY, engine=kept, **COMMON), want)
    teacher.float(), student.float()
    out = rollout(teacher, student, prompts(), POLICY, engine=kept, **COMMON)
    assert out.divergence.dtype == torch.float32


def test_models_of_two_dtypes():
    teacher, student = pair()
    for policy in (Teacher(), AdaSwitch(K=1e-6, L=1)):
        got = rollout(teacher.float(), student, prompts(), policy, **COMMON)
        assert got.tokens.equal(rollout_naive(teacher, student, prompts(), policy, **COMMON).tokens)


def test_an_interrupt_while_caches_are_made_leaves_an_engine_that_works(monkeypatch):
    teacher, student = pair()
    kept = Engine(teacher, student)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("switchkd.engine.CachedModel", stop)
        rollout(teacher, student, prompts(), POLICY, engine=kept, **COMMON)
    want = rollout_naive(teacher, student, prompts(), POLICY, **COMMON)
    assert_same(rollout(teacher, student, prompts(), POLICY, engine=kept, **COMMON), want)


def test_room_is_made_once():
    teacher, student = pair()
    kept = Engine(teacher, student)
    kept.room = 5, 64
    rollout(teacher, student, [[3]], POLICY, engine=kept, **COMMON)
    caches = kept.models
    rollout(teacher, student, [list(range(2, 32))] * 5, POLICY, engine=kept, **COMMON)
    assert kept.models is caches and (kept.slots, kept.capacity) == (5, 64)


def test_history_drafts_without_a_history():
    teacher, student = pair()
    want = rollout_naive(teacher, student, prompts(), POLICY, **COMMON)
    for history in (None, [None] * 7):
        got = rollout(
            teacher, student, prompts(), POLICY, drafter="history", history=history, **COMMON
        )
        assert_same(got, want)


def build(config_type, **options):
    config = config_type(
        vocab_size=VOCAB, hidden_size=32, eos_token_id=1, pad_token_id=0, **options
    )
    return AutoModelForCausalLM.from_config(config).double()


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (GPTNeoConfig, dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
         "GPTNeoForCausalLM has global, local"),
        (BloomConfig, dict(n_layer=1, n_head=2), "expected position_ids"),
    ],
)  # fmt: skip
def test_architectures_that_a_row_cache_cannot_serve(config, options, reason):
    model = build(config, **options)
    with pytest.raises(ValueError, match=reason):
        Engine(None, model)


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_configuration_may_not_tell_how_many_heads_the_keys_have(multi_query):
    torch.manual_seed(0)
    options = dict(n_layer=2, n_head=4, n_positions=128, multi_query=multi_query)
    models = [build(GPTBigCodeConfig, **options) for _ in range(2)]
    want, got = (f(*models, prompts(), POLICY, **COMMON) for f in (rollout_naive, rollout))
    assert_same(got, want)


def test_long_rope_is_refused_where_it_looks_at_the_batch():
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    model = build(
        Phi3Config, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=128, original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", **factors},
    )  # fmt: skip
    options = dict(COMMON, vocab_size=None)
    for length in (6, 64 - T):  # as far as 64 positions all is well
        rollout(None, model, [[5] * length], Student(), **options)
    with pytest.raises(NotServed, match=r"rows of 65 positions, expected at most 64"):
        rollout(None, model, [[5] * (65 - T)], Student(), **options)
    with pytest.raises(NotServed, match="expected at most 64"):  # a draft may reach beyond
        rollout(model, model, [[5] * (64 - T)], Switch(max_new_tokens=T), **options)
    # An evaluation goes on with the naive loop.
    tokenizer, sampling = byte_tokenizer(), Sampling(seed=1)
    example = dataclasses.make_dataclass("Example", ["line"])(0)
    rows = [Row([5] * (65 - T), [], example)]
    vocabulary = Vocabulary(VOCAB, (1,), 0)
    want = rollout_naive(None, model, [[5] * (65 - T)], sampling=sampling, **options)
    text = generate(model, rows, tokenizer, vocabulary, sampling, max_new_tokens=T)
    assert text == [tokenizer.decode(want.completions()[0], skip_special_tokens=True).strip()]


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama", seed=1), config)
    with pytest.raises(ValueError, match="PROMPT_TUNING, expected one in the layers"):
        rollout(None, model, prompts(), Student(), **COMMON)


def test_requests_that_nothing_could_write():
    teacher, student = pair()
    for change, reason in (
        (dict(prompts=[]), "prompts: got none"),
        (dict(max_new_tokens=0), "max_new_tokens: got 0"),
        (dict(sequence_ids=[3]), "sequence_ids: got 1, expected 7"),
    ):
        asked = dict(COMMON, prompts=prompts()) | change
        for write in (rollout, rollout_naive):
            with pytest.raises(ValueError, match=reason):
                write(teacher, student, policy=POLICY, **asked)


def test_layers_that_others_have_replaced_stay_so(monkeypatch):
    def theirs(self, x):
        return x

    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", theirs)
            with few_rows(torch.device(device)), few_rows(torch.device(device)):
                assert torch.nn.Linear.forward is theirs
            assert torch.nn.Linear.forward is theirs
    before = torch.nn.Linear.forward
    with few_rows(torch.device("cpu")):
        with few_rows(torch.device("cpu")):
            inner = torch.nn.Linear.forward
        assert torch.nn.Linear.forward is inner
    assert torch.nn.Linear.forward is before


def test_the_activation_of_gpt2_is_one_operation(monkeypatch):
    x, before = torch.randn(8, 50, dtype=torch.float64), NewGELUActivation.forward
    want = NewGELUActivation()(x)
    with few_rows(torch.device("cpu")), torch.profiler.profile() as profile:
        got = NewGELUActivation()(x)
    assert NewGELUActivation.forward is before
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert [event.name for event in profile.events() if event.name.startswith("aten::")] == [
        "aten::gelu"
    ]
