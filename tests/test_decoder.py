"""The block decoder writes what the naive loop writes: every policy, block, drafter and batch."""

import random

import pytest
import torch
from conftest import ARCHITECTURES, EOS, PAD, VOCAB, tiny_model
from switchkd_kernels import InvalidLogits

from switchkd.cache import CachedModel
from switchkd.decoder import rollout
from switchkd.planner import Planner
from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher
from switchkd.rollout import Rollout, Sampling, rollout_naive

T = 14
COMMON = dict(max_new_tokens=T, eos_token_ids=[EOS, 12, 28, 40], pad_token_id=PAD, vocab_size=VOCAB)
POLICIES = [
    Student(),
    Teacher(),
    Switch(max_new_tokens=T),
    Switch(schedule="growth", max_new_tokens=T, decay=0.3),
    Switch(schedule="linear", max_new_tokens=T),
    Switch(schedule="constant", tau0=0.3, max_new_tokens=T),
    Switch(schedule="random", max_new_tokens=T),
    Switch(schedule="mix-in", rate=0.2, max_new_tokens=T),
    AdaSwitch(K=1.2, L=3),
    SKD(top_k=3),
]
# (block, drafter, batch_size): every block from 1 to 8, either drafter, batches down to one row
PLANS = [
    (1, "student", None), (1, "teacher", 3), (2, "student", 4), (3, "teacher", 5),
    (4, "student", 1), (5, "teacher", 2), (6, "student", 9), (7, "teacher", 1), (8, "student", 3),
    (None, None, 4), (None, "teacher", None), (20, "student", 2),
]  # fmt: skip


def pair(name="llama", **options):
    """A teacher, and a student near enough for drafts to be right often, and wrong often."""
    teacher, student = (tiny_model(name, seed=1, **options) for _ in range(2))
    with torch.no_grad():
        for a, b in zip(student.parameters(), tiny_model(name, seed=2).parameters(), strict=True):
            a.mul_(0.85).add_(b, alpha=0.15)
    return teacher, student


def prompts(count=7, seed=0):
    rng = random.Random(seed)
    return [
        [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 2, 5, 9, 17]))] for _ in range(count)
    ]


def assert_same(got: Rollout, want: Rollout):
    for name in ("tokens", "lengths", "from_teacher"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("divergence", "threshold", "teacher_logprob", "student_logprob"):
        a, b = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: getattr(p, "schedule", type(p).__name__))
def test_every_plan_writes_what_the_naive_loop_writes(policy):
    teacher, student = pair()
    want = rollout_naive(teacher, student, prompts(), policy, **COMMON)
    assert len(set(want.lengths.tolist())) > 1  # rows end at different times
    for block, drafter, size in PLANS:
        got = rollout(
            teacher, student, prompts(), policy,
            block=block, drafter=drafter, batch_size=size, **COMMON,
        )  # fmt: skip
        assert_same(got, want)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    teacher, student = pair(name)
    for policy in (Switch(max_new_tokens=T), AdaSwitch(K=1.2, L=3)):
        want = rollout_naive(teacher, student, prompts(), policy, **COMMON)
        for block, drafter, size in ((4, "student", 3), (3, "teacher", 7)):
            got = rollout(
                teacher, student, prompts(), policy,
                block=block, drafter=drafter, batch_size=size, **COMMON,
            )  # fmt: skip
            assert_same(got, want)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3, teacher_temperature=1.4, student_temperature=0.6),
        Sampling(teacher_temperature=0, student_temperature=0),
        Sampling(seed=2**63 + 1, top_k=12, top_p=0.8),
        Sampling(min_p=0.05, student_temperature=0),
    ],
)
@pytest.mark.parametrize("policy", [Switch(max_new_tokens=T), SKD(2), AdaSwitch(K=1.2, L=3)])
def test_warped_and_greedy_draws(sampling, policy):
    teacher, student = pair()
    given = dict(sampling=sampling, sequence_ids=[2**40 + 3 * i for i in range(7)])
    want = rollout_naive(teacher, student, prompts(), policy, **given, **COMMON)
    for block, drafter in ((4, "student"), (3, "teacher")):
        got = rollout(
            teacher, student, prompts(), policy,
            block=block, drafter=drafter, batch_size=3, **given, **COMMON,
        )  # fmt: skip
        assert_same(got, want)


def test_order_of_prompts_and_slots_do_not_matter():
    teacher, student = pair()
    policy, asked = Switch(max_new_tokens=T), prompts(11, seed=5)
    want = rollout_naive(teacher, student, asked, policy, sequence_ids=range(11), **COMMON)
    order = random.Random(1).sample(range(11), 11)
    got = rollout(
        teacher, student, [asked[i] for i in order], policy,
        sequence_ids=order, batch_size=4, block=3, **COMMON,
    )  # fmt: skip
    inverse = sorted(range(11), key=order.__getitem__)
    assert torch.equal(got.tokens[inverse], want.tokens)


def test_student_alone_needs_no_teacher():
    _, student = pair()
    want = rollout_naive(None, student, prompts(), Student(), **COMMON)
    assert_same(rollout(None, student, prompts(), Student(), batch_size=3, **COMMON), want)


def test_padded_vocabularies_and_eos_from_a_set():
    teacher, student = pair()
    wide = tiny_model(seed=1, vocab_size=VOCAB + 9)
    given = COMMON | {"eos_token_ids": [EOS, 7, 30]}
    want = rollout_naive(wide, student, prompts(), Switch(max_new_tokens=T), **given)
    got = rollout(wide, student, prompts(), Switch(max_new_tokens=T), block=4, **given)
    assert_same(got, want)
    assert teacher.vocab_size < wide.vocab_size


def test_hidden_states_are_those_of_a_fresh_forward_pass():
    teacher, student = pair()
    for block, drafter in ((3, "student"), (4, "teacher")):
        got = rollout(
            teacher, student, prompts(), Switch(max_new_tokens=T),
            block=block, drafter=drafter, batch_size=3, keep_hidden=True, **COMMON,
        )  # fmt: skip
        fresh = []
        for prompt, completion in zip(prompts(), got.completions(), strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                hidden = teacher.model(ids).last_hidden_state[0]
            fresh.append(hidden[len(prompt) - 1 : -1])
        torch.testing.assert_close(got.teacher_hidden, torch.cat(fresh), rtol=1e-9, atol=1e-9)


def test_drafts_save_passes_of_the_verifier():
    """Equal models: every draft is right, so 14 tokens take the verifier ceil(14 / 4) passes."""
    teacher, _ = pair()
    calls = []
    hook = teacher.register_forward_pre_hook(lambda *_: calls.append("whole model"))
    layer = teacher.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("pass"))
    student, given = tiny_model(seed=1), COMMON | {"eos_token_ids": []}
    got = rollout(
        teacher, student, [[5, 6]], Switch(max_new_tokens=T), block=4, drafter="student", **given
    )
    hook.remove(), layer.remove()
    assert got.lengths.tolist() == [T]
    assert calls.count("pass") == 1 + 4 and "whole model" not in calls  # prompt, 4 + 4 + 4 + 2


def test_nan_logits_are_refused_with_the_prompt_and_the_place():
    teacher, student = pair()
    with torch.no_grad():  # the token is fed, and the next position is undefined
        student.get_input_embeddings().weight[9] = float("nan")
    asked = [[3, 4], [5], [6, 7, 9]]
    with pytest.raises(InvalidLogits, match="token 0 of sequence 12: student") as caught:
        rollout(
            teacher, student, asked, Switch(max_new_tokens=T),
            batch_size=1, sequence_ids=[10, 11, 12], block=2, **(COMMON | {"vocab_size": 9}),
        )  # fmt: skip
    assert caught.value.row == 2


def test_refusals_say_what_was_got():
    teacher, student = pair()
    for options, message in (
        ({"block": 0}, "block: got 0"),
        ({"drafter": "me"}, "drafter: got 'me'"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout(teacher, student, [[3]], Switch(max_new_tokens=T), **options, **COMMON)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        rollout(teacher, student, [[3], []], Switch(max_new_tokens=T), **COMMON)
    with pytest.raises(ValueError, match="needs a teacher, got None"):
        rollout(None, student, [[3]], Switch(max_new_tokens=T), **COMMON)
    with pytest.raises(ValueError, match="128"):
        rollout(teacher, student, [[3] * 120], Switch(max_new_tokens=T), **COMMON)


def test_sliding_windows_are_refused():
    windowed = tiny_model("qwen2")
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding_attention.*naive loop"):
        CachedModel(windowed, 1, 8)
    flash = tiny_model()
    flash.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        CachedModel(flash, 1, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cache_agrees_with_a_full_forward_pass(name, attention):
    """Unequal lengths, rows out of order, blocks of several sizes, a rollback and what follows."""
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    ids = torch.randint(2, VOCAB, (3, 20))
    full = model(ids).logits
    cached = CachedModel(model, slots=4, capacity=24)
    order, prompt = torch.tensor([1, 2, 0]), torch.tensor([9, 6, 4])
    cached.feed(ids[order, :9], torch.zeros_like(prompt), 9, rows=torch.tensor([0, 1, 2]))
    lengths = prompt.clone()
    for count, back in ((1, 0), (3, 2), (4, 1), (1, 0)):
        tokens = torch.stack([ids[i, n : n + count] for i, n in zip(order, lengths, strict=True)])
        logits = cached.logits(cached.feed(tokens, lengths, int(lengths.max()) + count))
        want = torch.stack([full[i, n : n + count] for i, n in zip(order, lengths, strict=True)])
        exact = attention == "sdpa"  # the eager one takes its softmax in float32
        tolerance = dict(rtol=1e-9, atol=1e-9) if exact else dict(rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(logits, want, **tolerance)
        lengths += count - back


def test_the_planner_picks_what_is_cheapest():
    dear_teacher = Planner()
    for role, one, four in (("teacher", 10.0, 11.0), ("student", 1.0, 1.2)):
        dear_teacher.took(role, 1, one)
        dear_teacher.took(role, 4, four)
    dear_teacher.saw("student", 0, right=90, total=100)
    assert dear_teacher.choose(0, 8) == ("student", 8)
    assert dear_teacher.choose(0, 3) == ("student", 3)  # no more than there is to write
    dear_teacher.saw("student", 20, right=0, total=10**6)  # drafts turned useless
    assert dear_teacher.choose(20, 8)[1] == 1
    even = Planner()
    for role in ("teacher", "student"):
        even.took(role, 1, 1.0)
        even.took(role, 8, 1.1)
    even.saw("student", 0, right=1, total=100)
    even.saw("teacher", 0, right=99, total=100)
    assert even.choose(0, 8) == ("teacher", 8)
    assert Planner(block=4, drafter="teacher").choose(0, 8) == ("teacher", 4)
