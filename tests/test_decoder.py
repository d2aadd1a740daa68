"""The block decoder writes what the naive loop writes: every policy, block, drafter and batch."""

import contextlib
import random
import threading

import pytest
import torch
from conftest import ARCHITECTURES, EOS, OTHERS, PAD, VOCAB, tiny_model
from switchkd_kernels import InvalidLogits

from switchkd import engine
from switchkd.cache import capacity_for
from switchkd.decoder import rollout
from switchkd.engine import Engine
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
    Switch(schedule="sequence", max_new_tokens=T, base="e"),
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
        a, b = getattr(got, name), getattr(want, name)
        rtol, atol = (1e-9, 1e-10) if a.dtype == b.dtype == torch.float64 else (1e-6, 1e-7)
        a, b = a.double(), b.double()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("second", [rollout, rollout_naive])
def test_two_threads_may_share_a_teacher(second):
    """What a pass changes in it for its own sake is seen by nobody else."""
    (teacher, student), other = pair(), tiny_model(seed=2)
    wanted = [rollout_naive(teacher, s, prompts(), Switch(), **COMMON) for s in (student, other)]
    begun, results = threading.Event(), []

    def run():
        results.append(second(teacher, other, prompts(), Switch(), **COMMON, on_step=tell))

    def tell(_done, _left):
        begun.set()

    thread = threading.Thread(target=run)

    def start(_written, _left):
        if thread.ident is None:
            thread.start()
            assert not begun.wait(0.5)

    results.append(rollout(teacher, student, prompts(), Switch(), **COMMON, on_step=start))
    thread.join()
    assert begun.is_set()
    for got, want in zip(results, wanted, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("decode", [rollout, rollout_naive])
@pytest.mark.parametrize("broken", [False, True])
def test_modules_end_in_the_mode_that_they_had(decode, broken):
    """A training loop around a rollout would miss its dropout."""
    models = tiny_model(seed=1).train(), tiny_model(seed=2).train()
    models[1].model.layers[0].eval()
    modes = [[m.training for m in model.modules()] for model in models]

    def step(*_):
        assert not any(m.training for model in models for m in model.modules())
        if broken:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if broken else contextlib.nullcontext():
        decode(*models, prompts(), Switch(), **COMMON, on_step=step)
    assert modes == [[m.training for m in model.modules()] for model in models]


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


@pytest.mark.parametrize("name", ["llama", *OTHERS[-1:]])  # and layers with a state
@pytest.mark.parametrize("policy", [Teacher(), Switch(max_new_tokens=T), AdaSwitch(1.2, 3), SKD(3)])
def test_any_change_of_plans_between_rounds(exact_rule, policy, name, monkeypatch):
    """Drafter and block drawn anew each round, earlier completions among them, some of them off."""
    teacher, student = pair(name)
    given = dict(COMMON, sequence_ids=range(7))
    want = rollout_naive(teacher, student, prompts(), policy, **given)
    rng, plans = random.Random(3), set()

    def choose(self, position, limit, *, settled, student_follows, along):
        drafters = ["teacher", "history"] + ["student"] * student_follows
        plan = rng.choice(drafters), rng.randint(1, min(8, limit))
        plans.add((plan[0], settled))
        return plan

    monkeypatch.setattr(Planner, "choose", choose)
    history = want.completions()
    history[1], history[2], history[3] = None, [], history[3][:2]
    history[4] = [*history[4][:1], 5, *history[4][2:]]
    for size in (1, 3, 7):
        got = rollout(
            teacher, student, prompts(), policy, batch_size=size, history=history, **given
        )
        assert_same(got, want)
    settles = isinstance(policy, Teacher | AdaSwitch)
    assert plans >= {(d, s) for d in ("teacher", "history") for s in (False, settles)}


@pytest.mark.parametrize("name", ARCHITECTURES + OTHERS)
def test_every_architecture(exact_rule, name):
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
    # One token (what a position takes in the cache), the prompt, 4 + 4 + 4 + 2.
    assert calls.count("pass") == 1 + 1 + 4 and "whole model" not in calls


EVEN = [[i + 2, i + 3, i + 4] for i in range(7)]  # prompts that are prefilled in one pass


def passes(model, call):
    """How many forward passes `call` makes of the layers of `model`, and what it returns; without
    the one of a new engine that tells what a position takes in the cache."""
    calls = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    out = call()
    hook.remove()
    return len(calls) - 1, out


def test_the_student_rests_once_the_teacher_writes_all():
    """AdaSwitch after its hand-over, and teacher-written sequences: one pass more and no other."""
    teacher, student = pair()
    given = COMMON | {"eos_token_ids": []}
    for policy in (AdaSwitch(K=1e-3, L=2), Teacher()):
        count, got = passes(
            student,
            lambda policy=policy: rollout(
                teacher, student, EVEN, policy, block=1, drafter="teacher", **given
            ),
        )
        settled = got.threshold.isneginf()
        last = int((~settled).sum(1).max())  # rounds in which some row was compared
        assert count == 1 + max(last, 1) < T
        assert got.from_teacher[settled].all() and got.divergence[settled].isnan().all()
        want = rollout_naive(teacher, student, EVEN, policy, **given)
        assert_same(got, want)


def test_an_earlier_completion_is_verified_in_blocks():
    teacher, student = pair()
    given = COMMON | {"eos_token_ids": [], "batch_size": 3}
    policy = Switch(max_new_tokens=T)
    plain = rollout(teacher, student, EVEN, policy, block=4, drafter="student", **given)
    count, again = passes(
        teacher,
        lambda: rollout(
            teacher, student, EVEN, policy, block=7, drafter="history",
            history=plain.completions(), **given,
        ),
    )  # fmt: skip
    assert_same(again, plain)
    assert count == 3 * (1 + T // 7)  # three batches: a prefill, two blocks each
    with pytest.raises(ValueError, match="history: got 1, expected one for each of 7"):
        rollout(teacher, student, EVEN, policy, history=[[3]], **given)


def test_an_engine_goes_on_with_its_memory():
    teacher, student = pair()
    kept, policy = Engine(teacher, student, block=3), Switch(max_new_tokens=T)
    shapes = []
    for asked, size in ((prompts(5), 5), (prompts(4, seed=2), 2), (prompts(9, seed=4), 9)):
        want = rollout_naive(teacher, student, asked, policy, **COMMON)
        got = rollout(teacher, student, asked, policy, batch_size=size, engine=kept, **COMMON)
        assert_same(got, want)
        shapes.append(kept.models["teacher"].cache)
    assert shapes[0] is shapes[1] and shapes[1] is not shapes[2]  # 9 rows need more
    kept.release()
    assert not kept.models


def test_what_does_not_fit_into_memory_is_split_or_refused(monkeypatch, caplog):
    teacher, student = pair()
    policy, asked = Switch(max_new_tokens=T), prompts()
    want = rollout_naive(teacher, student, asked, policy, **COMMON)
    # 2 layers, 2 key heads of width 8, keys and values, float64: 512 bytes a position and model.
    capacity = capacity_for(max(map(len, asked)), T, 4)
    monkeypatch.setattr(engine, "free_bytes", lambda device: int(2.5 * 1024 * capacity / 0.9))
    assert_same(rollout(teacher, student, asked, policy, block=4, **COMMON), want)
    assert "decoding 2 rows at once instead of 7" in caplog.text
    monkeypatch.setattr(engine, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"not one row fits.*positions a row take .* MiB of the t"):
        rollout(teacher, student, asked, policy, block=4, **COMMON)


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
