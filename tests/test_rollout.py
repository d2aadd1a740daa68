"""The naive rollout: batching, padding, positions, EOS and the record, in float64."""

import copy
import math

import pytest
import torch
from conftest import ARCHITECTURES, EOS, PAD, VOCAB, tiny_model
from switchkd_kernels import InvalidLogits, jsd, switch_select
from transformers import AutoModelForCausalLM, BartConfig, FalconMambaConfig, MambaConfig

from switchkd.decoder import rollout
from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher
from switchkd.rollout import Rollout, Sampling, rollout_in_batches, rollout_naive
from switchkd.stream import padding_matters

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [33, 34, 35, 36]]
POLICIES = {
    "switch": Switch(tau0=0.9),
    "linear": Switch(schedule="linear", max_new_tokens=12),
    "constant": Switch(schedule="constant", tau0=0.4),
    "growth": Switch(schedule="growth", max_new_tokens=12),
    "random": Switch(schedule="random"),
    "mix-in": Switch(schedule="mix-in", rate=0.2),
    "adaswitch": AdaSwitch(K=1.2, L=2),
    "skd": SKD(top_k=4),
    "student": Student(),
    "teacher": Teacher(),
}


def roll(teacher, student, prompts=PROMPTS, policy=None, ids=None, **kwargs):
    options = dict(max_new_tokens=12, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB)
    options.update(kwargs)
    ids = list(range(len(prompts))) if ids is None else ids
    return rollout_naive(
        teacher, student, prompts, policy or POLICIES["switch"], sequence_ids=ids, **options
    )


def assert_same_row(batch: Rollout, row: int, alone: Rollout):
    n = int(alone.lengths[0])
    assert batch.completions()[row] == alone.completions()[0]
    assert torch.equal(batch.from_teacher[row, :n], alone.from_teacher[0, :n])
    for name in Rollout.RECORDS[1:]:
        torch.testing.assert_close(
            getattr(batch, name)[row, :n].double(),
            getattr(alone, name)[0, :n].double(),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_writes_what_each_row_writes_alone(architecture):
    teacher = tiny_model(architecture, seed=1)
    student = tiny_model(architecture, seed=2)
    batch = roll(teacher, student)
    assert batch.from_teacher.any() and not batch.from_teacher.all()
    for row, prompt in enumerate(PROMPTS):
        assert_same_row(batch, row, roll(teacher, student, [prompt], ids=[row]))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_independent_of_batch_and_order(name):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    batch = roll(teacher, student, policy=POLICIES[name])
    backwards = roll(
        teacher, student, PROMPTS[::-1], POLICIES[name], ids=list(range(len(PROMPTS)))[::-1]
    )
    for row in range(len(PROMPTS)):
        n = int(batch.lengths[row])
        mirror = len(PROMPTS) - 1 - row
        assert batch.completions()[row] == backwards.completions()[mirror]
        assert torch.equal(batch.from_teacher[row, :n], backwards.from_teacher[mirror, :n])


def test_cached_steps_agree_with_a_full_forward_and_the_definition():
    """Every token recomputed from scratch: no cache, no padding, one row."""
    teacher, student = tiny_model("qwen2", seed=1), tiny_model("gpt2", seed=2)
    policy = POLICIES["switch"]
    out = roll(teacher, student, policy=policy)
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t, token in enumerate(out.completions()[row]):
            ids = torch.tensor([text])
            with torch.no_grad():
                p, q = teacher(ids).logits[:, -1], student(ids).logits[:, -1]
            tau = math.exp(math.log(0.9) - 0.1 * t)
            want = switch_select(p, q, tau, seed=0, sequence_ids=[row], positions=[t])
            assert int(want.token) == token
            assert bool(want.from_teacher) == bool(out.from_teacher[row, t])
            assert out.divergence[row, t].item() == pytest.approx(jsd(p, q).item(), abs=1e-12)
            assert bool(out.from_teacher[row, t]) == (jsd(p, q).item() > tau)
            log_p = p.log_softmax(-1)[0, token].item()
            assert out.teacher_logprob[row, t].item() == pytest.approx(log_p, abs=1e-10)
            text.append(token)


@pytest.mark.parametrize("kind", [MambaConfig, FalconMambaConfig])
def test_models_without_attention_write_what_full_passes_say(kind):
    """Rows padded on the left; each token's logits recomputed from the text alone."""
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ids = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
        config = kind(hidden_size=32, num_hidden_layers=2, state_size=8, **ids)
        pair.append(AutoModelForCausalLM.from_config(config).double().eval())
        with torch.no_grad():
            for parameter in pair[-1].parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
    out = roll(*pair, policy=POLICIES["constant"], eos_token_ids=[])
    assert out.from_teacher.any() and not out.from_teacher.all()
    for row, prompt in enumerate(PROMPTS):
        tokens = out.completions()[row]
        for model, said in zip(pair, (out.teacher_logprob, out.student_logprob), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
            full = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            want = full.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            # Its scan is in float32 whatever the weights are.
            torch.testing.assert_close(said[row].double(), want, rtol=1e-5, atol=1e-5)


def test_rows_end_at_eos_and_stay_ended():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    ended = roll(teacher, student, eos_token_ids=list(range(0, VOCAB, 4)))
    assert len(set(ended.lengths.tolist())) > 1, "rows should end at different places"
    for row, tokens in enumerate(ended.completions()):
        n = len(tokens)
        assert all(t % 4 for t in tokens[:-1])
        assert tokens[-1] % 4 == 0 or n == 12
        assert (ended.tokens[row, n:] == PAD).all()
        assert ended.divergence[row, n:].isnan().all()
        assert not ended.from_teacher[row, n:].any()
    free = roll(teacher, student, eos_token_ids=[])
    for row, tokens in enumerate(ended.completions()):  # EOS of one row disturbs no other
        assert free.completions()[row][: len(tokens)] == tokens


def test_pad_equal_to_eos_changes_nothing():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    eos = list(range(0, VOCAB, 4))
    apart = roll(teacher, student, eos_token_ids=eos, pad_token_id=3)
    same = roll(teacher, student, eos_token_ids=eos, pad_token_id=4)
    assert apart.completions() == same.completions()
    assert apart.lengths.tolist() == same.lengths.tolist()


def test_differently_padded_vocabularies_are_cut_not_padded():
    teacher, student = tiny_model(seed=1, vocab_size=VOCAB + 4), tiny_model(seed=2)
    with torch.no_grad():  # the padded rows would win every draw
        teacher.lm_head.weight[VOCAB:] = 50 * teacher.lm_head.weight[:4].abs()
    out = roll(teacher, student)
    assert max(max(c) for c in out.completions()) < VOCAB
    clean = tiny_model(seed=1, vocab_size=VOCAB + 4)
    with torch.no_grad():
        clean.lm_head.weight[VOCAB:] = 0
    again = roll(clean, student)
    assert out.completions() == again.completions()
    torch.testing.assert_close(out.divergence, again.divergence, equal_nan=True)


def test_student_only_needs_no_teacher_and_writes_the_same():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    alone = roll(None, student, policy=Student())
    assert alone.completions() == roll(teacher, student, policy=Student()).completions()
    assert alone.divergence.isnan().all()
    with pytest.raises(ValueError, match="needs a teacher"):
        roll(None, student, policy=Switch())


def test_skd_keeps_tokens_of_the_teachers_top_k():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    out = roll(teacher, student, policy=SKD(top_k=4))
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t, token in enumerate(out.completions()[row]):
            with torch.no_grad():
                p = teacher(torch.tensor([text])).logits[0, -1]
            if not out.from_teacher[row, t]:
                assert token in p.topk(4).indices.tolist()
            text.append(token)
    assert out.from_teacher.any() and not out.from_teacher.all()


def test_filters_and_greedy():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    greedy = Sampling(student_temperature=0, teacher_temperature=0)
    a = roll(teacher, student, sampling=greedy)
    b = roll(teacher, student, sampling=Sampling(seed=9, top_k=1))
    assert a.completions() == b.completions()
    nucleus = roll(teacher, student, sampling=Sampling(top_p=0.5, min_p=0.01))
    assert nucleus.completions() != roll(teacher, student).completions()


def test_join_restores_the_order_and_the_padding():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    eos = list(range(0, VOCAB, 4))
    whole = roll(teacher, student, eos_token_ids=eos)
    parts = [
        roll(teacher, student, [PROMPTS[i] for i in part], ids=part, eos_token_ids=eos)
        for part in ([2, 0], [3, 1])
    ]
    joined = Rollout.join(parts, [1, 3, 0, 2], PAD)
    assert joined.completions() == whole.completions()
    assert joined.record(1) == whole.record(1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eager_attention_in_float64_writes_the_same(name):
    """Its masks become NaN in padded rows, so there are none."""
    teacher, student = tiny_model(name, seed=1), tiny_model(seed=2)
    options = dict(max_new_tokens=12, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB)
    prompts = [*PROMPTS, [40, 41, 42]]
    ids = list(range(len(prompts)))
    wanted = rollout_in_batches(
        teacher, student, prompts, Switch(tau0=0.9), batch_size=3, sequence_ids=ids, **options
    )
    student.set_attn_implementation("eager")
    out = rollout_in_batches(
        teacher, student, prompts, Switch(tau0=0.9), batch_size=3, sequence_ids=ids, **options
    )
    assert out.completions() == wanted.completions()
    torch.testing.assert_close(
        out.divergence, wanted.divergence, rtol=1e-3, atol=1e-5, equal_nan=True
    )


def test_a_queue_of_batches_leaves_every_module_in_its_mode():
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    given = dict(max_new_tokens=2, eos_token_ids=[EOS], pad_token_id=PAD)
    rollout_in_batches(None, model, PROMPTS, batch_size=2, sequence_ids=range(4), **given)
    assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_does_not_matter_where_positions_are_told(name, dtype):
    model = tiny_model(name, dtype=dtype).train()
    assert not padding_matters(model) and model.training


def test_positions_that_count_padding_write_the_same():
    """BART's count all that was read, so no row is padded."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.5, eos_token_id=EOS,
        pad_token_id=PAD, is_encoder_decoder=False, is_decoder=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    options = dict(max_new_tokens=12, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB)
    assert padding_matters(model) and padding_matters(copy.deepcopy(model).bfloat16())
    together, alone = (
        rollout_in_batches(
            None, model, PROMPTS, batch_size=n, sequence_ids=range(len(PROMPTS)), **options
        )
        for n in (4, 1)
    )
    assert together.completions() == alone.completions()


def test_bad_input_is_refused_with_the_reason():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    given = dict(max_new_tokens=4, eos_token_ids=[EOS], pad_token_id=PAD)
    for decode in (rollout, rollout_naive):
        with pytest.raises(ValueError, match="prompt 1: got token -100, expected ids >= 0"):
            decode(None, student, [[3], [4, -100]], **given)
    with pytest.raises(ValueError, match="prompt 1: got token -100"):
        ids = range(2)
        rollout_in_batches(None, student, [[3], [-100]], batch_size=1, sequence_ids=ids, **given)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        roll(teacher, student, [[3], []])
    with pytest.raises(ValueError, match="need 130 positions, expected at most 128"):
        roll(teacher, student, [[3]], max_new_tokens=129)
    with pytest.raises(ValueError, match=r"top_p: got 0, expected"):
        Sampling(top_p=0)


def test_nan_logits_name_token_and_sequence():
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    with torch.no_grad():
        student.model.embed_tokens.weight[20] = float("nan")
    with pytest.raises(InvalidLogits, match="token 0 of sequence 72: .*student"):
        roll(teacher, student, [[5], [20]], ids=[71, 72])
