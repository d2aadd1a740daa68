"""Who writes and what: hand-computed decisions, the shared field, the laws of the draws."""

import math

import pytest
import torch
from switchkd_kernels import InvalidLogits, sample, switch_select
from test_reference_noise import chi_square

P, Q = (0.7, 0.2, 0.1), (0.1, 0.3, 0.6)
M = tuple((a + b) / 2 for a, b in zip(P, Q, strict=True))


def kl(x, y):
    return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))


JSD_BITS = (kl(P, M) + kl(Q, M)) / 2 / math.log(2)  # 0.33275


def logits(law, n=1, dtype=torch.float64):
    return torch.tensor([law], dtype=dtype).log().expand(n, -1)


def select(teacher, student, threshold, **options):
    n = teacher.shape[0]
    where = {"seed": 2, "sequence_ids": torch.arange(n), "positions": torch.arange(n) % 7}
    return switch_select(teacher, student, threshold, **(where | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, JSD_BITS),
        ({"base": "e"}, JSD_BITS * math.log(2)),
        ({"metric": "kl"}, kl(P, Q)),  # 1.1019; KL(q||p) is 1.0021
        ({"metric": "rank", "student_token": torch.tensor([0])}, 0),
        ({"metric": "rank", "student_token": torch.tensor([2])}, 2),
    ],
)
def test_divergence_by_hand(options, expected):
    assert float(select(logits(P), logits(Q), 0.0, **options).divergence) == pytest.approx(expected)


def test_the_teacher_writes_above_the_threshold_and_equality_is_the_students():
    teacher, student = logits(P, 5), logits(Q, 5)
    d = float(select(teacher, student, 0.0).divergence[0])
    taus = [d, math.nextafter(d, 0), math.nextafter(d, 9), -math.inf, math.inf]
    got = select(teacher, student, torch.tensor(taus, dtype=torch.float64))
    assert got.from_teacher.tolist() == [False, True, False, True, False]


def test_log_probabilities_are_of_the_chosen_token_at_temperature_one():
    tokens = torch.tensor([2])
    for tau, token in ((math.inf, 2), (-math.inf, 0)):
        got = select(
            logits(P), logits(Q), tau, teacher_temperature=0, student_temperature=0.3,
            student_token=tokens,
        )  # fmt: skip
        assert int(got.token) == token
        assert float(got.teacher_logprob) == pytest.approx(math.log(P[token]))
        assert float(got.student_logprob) == pytest.approx(math.log(Q[token]))
        assert float(got.divergence) == pytest.approx(JSD_BITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_each_writer_alone_is_its_own_sample_on_the_shared_field(dtype):
    teacher, student = torch.randn(40, 30).to(dtype), torch.randn(40, 30).to(dtype)
    warm = {"teacher_temperature": 1.7, "student_temperature": 0.6}
    where = {"seed": 2, "sequence_ids": torch.arange(40), "positions": torch.arange(40) % 7}
    got = select(teacher, student, math.inf, **warm)
    assert torch.equal(got.token, sample(student, temperature=0.6, **where))
    got = select(teacher, student, -math.inf, **warm)
    assert torch.equal(got.token, sample(teacher, temperature=1.7, **where))
    assert got.divergence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.token.dtype == torch.int64 and bool(got.from_teacher.all())


def test_equal_models_write_the_same_token_whoever_writes():
    z = torch.randn(60, 40)
    a, b = select(z, z, -math.inf), select(z, z.clone(), math.inf)
    assert torch.equal(a.token, b.token) and not bool(a.divergence.any())


def test_marginals_of_both_writers():
    n = 20000
    for tau, law in ((math.inf, Q), (-math.inf, P)):
        counts = torch.bincount(select(logits(P, n), logits(Q, n), tau).token, minlength=3).tolist()
        assert chi_square(counts, law)
        assert not chi_square(counts, P if law is Q else Q)


def test_law_of_the_rank_rule_needs_a_stream_of_its_own():
    """SKD with K = 1: y ~ q stands if it is the teacher's best, else a y ~ p of its own."""
    n, k = 20000, 1
    law = [Q[v] * (v == 0) + (1 - Q[0]) * P[v] for v in range(3)]
    teacher, student = logits(P, n), logits(Q, n)
    got = select(teacher, student, k - 1, metric="rank")
    assert chi_square(torch.bincount(got.token, minlength=3).tolist(), law)
    where = {"seed": 2, "sequence_ids": torch.arange(n), "positions": torch.arange(n) % 7}
    shared = sample(teacher, **where)  # the same G for both draws: a different law
    got = select(teacher, student, k - 1, metric="rank", teacher_token=shared)
    assert not chi_square(torch.bincount(got.token, minlength=3).tolist(), law)


def test_rank_counts_strictly_better_tokens_only():
    teacher = torch.tensor([[3.0, 1.0, 3.0, -math.inf, 1.0]]).expand(5, -1)
    got = select(teacher, torch.zeros(5, 5), 9, metric="rank", student_token=torch.arange(5))
    assert got.divergence.tolist() == [0, 2, 0, 4, 2]


def test_kl_is_cut_at_fifty_nats():
    teacher, student = torch.zeros(2, 3), torch.zeros(2, 3)
    student[0, 0], student[1, 0] = -math.inf, -1000.0
    assert select(teacher, student, 50, metric="kl").divergence.tolist() == [50.0, 50.0]


def test_disjoint_rows_are_one_bit_apart_and_never_over_a_threshold_of_one():
    for width in (2, 30, 1001):
        teacher, student = torch.randn(50, width), torch.randn(50, width)
        cut = torch.arange(width) < width // 2
        teacher[:, cut], student[:, ~cut] = -math.inf, -math.inf
        got = select(teacher, student, 1.0)
        torch.testing.assert_close(got.divergence, torch.ones(50), rtol=3e-7, atol=0)
        assert not bool(got.from_teacher.any())
        assert bool((got.teacher_logprob == -math.inf).all())  # the student's token, honestly


def test_rows_do_not_depend_on_their_batch():
    teacher, student, tau = torch.randn(9, 21), torch.randn(9, 21), torch.rand(9)
    ids, positions = torch.randint(0, 2**50, (9,)), torch.randint(0, 2**31, (9,))

    def part(i):
        where = {"seed": 8, "sequence_ids": ids[i], "positions": positions[i]}
        return switch_select(teacher[i], student[i], tau[i], **where)

    whole = part(torch.arange(9))
    for i in torch.randperm(9).split(4):
        got = part(i)
        assert torch.equal(got.token, whole.token[i])
        assert torch.equal(got.from_teacher, whole.from_teacher[i])
    assert whole.from_teacher.unique().numel() == 2


@pytest.mark.parametrize("metric", ["jsd", "kl", "rank"])
def test_padded_vocabularies_are_cut(metric):
    teacher, student = torch.randn(30, 10), torch.randn(30, 10)
    wide_teacher = torch.cat([teacher, torch.full((30, 6), 99.0)], -1)
    wide_student = torch.cat([student, torch.full((30, 2), math.nan)], -1)
    tau = 1.0 if metric == "rank" else 0.2
    want = select(teacher, student, tau, metric=metric)
    got = select(wide_teacher, wide_student, tau, metric=metric, vocab_size=10)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="16 and 12 logits a row: pass vocab_size"):
        select(wide_teacher, wide_student, tau)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_are_refused_by_name(side, value):
    rows = {"teacher": torch.zeros(4, 6), "student": torch.zeros(4, 6)}
    rows[side][2, :] = value
    with pytest.raises(InvalidLogits, match=f"{side} logits, row 2") as caught:
        select(rows["teacher"], rows["student"], 0.5)
    assert (caught.value.model, caught.value.row) == (side, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "tv"}, "metric must be one of jsd, kl, rank, got 'tv'"),
        ({"base": 10}, "base"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": torch.zeros(3)}, r"threshold must be a number or \(2,\), got \(3,\)"),
        ({"teacher_temperature": -1}, "teacher_temperature"),
        ({"student_token": torch.tensor([0, 3])}, "student_token"),
        ({"vocab_size": 4}, "vocab_size"),
    ],
)
def test_refused_arguments(options, message):
    arguments = {"threshold": 0.0} | options
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


def test_no_rows():
    got = select(torch.zeros(0, 3), torch.zeros(0, 3), 0.5)
    assert [x.shape for x in got] == [(0,)] * 5
