"""Thresholds of every policy, by hand."""

import math

import pytest
import torch

from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher

T = torch.tensor


def thresholds(policy, positions, sequence_ids=None):
    positions = T(positions)
    ids = torch.zeros_like(positions) if sequence_ids is None else T(sequence_ids)
    return policy.threshold(policy.start(len(positions), positions.device), 0, ids, positions)


def test_exponential_schedule_matches_the_table_of_the_paper():
    tau = thresholds(Switch(), [0, 1, 5, 10, 23, 69, 256])
    expected = [1.0, 0.905, 0.607, 0.368, 0.100, 1.0e-3, 7.6e-12]
    for got, want in zip(tau.tolist(), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-2)


def test_a_late_threshold_keeps_its_digits():
    assert thresholds(Switch(), [2000]).item() == pytest.approx(math.exp(-200), rel=1e-9)


def test_linear_constant_and_growth_schedules():
    linear = thresholds(Switch(schedule="linear", max_new_tokens=10), [0, 5, 10])
    assert linear.tolist() == pytest.approx([1.0, 0.5, 0.0])
    constant = thresholds(Switch(schedule="constant", tau0=0.2), [0, 99])
    assert constant.tolist() == [0.2, 0.2]
    growth = thresholds(Switch(schedule="growth", max_new_tokens=20), [0, 10, 20])
    assert growth.tolist() == pytest.approx([math.exp(-2), math.exp(-1), 1.0])


def test_threshold_floor():
    assert thresholds(Switch(tau_min=0.05), [0, 500]).tolist() == [1.0, 0.05]


@pytest.mark.parametrize("schedule, rate", [("random", 0.5), ("mix-in", 0.2)])
def test_coin_schedules_toss_at_their_rate_and_repeat(schedule, rate):
    policy = Switch(schedule=schedule, rate=rate)
    positions = list(range(200)) * 20
    ids = [i // 200 for i in range(4000)]
    tau = thresholds(policy, positions, ids)
    assert set(tau.tolist()) == {math.inf, -math.inf}
    share = (tau == -math.inf).double().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000)
    assert torch.equal(tau, thresholds(policy, positions, ids))


def test_the_sequence_schedule_tosses_once_for_a_response():
    policy = Switch(schedule="sequence", rate=0.3)
    ids = [i // 5 for i in range(5 * 2000)]
    tau = thresholds(policy, list(range(5)) * 2000, ids).view(2000, 5)
    assert torch.equal(tau, tau[:, :1].expand(-1, 5))
    assert (tau[:, 0] == -math.inf).double().mean().item() == pytest.approx(0.3, abs=0.04)


def test_student_never_and_teacher_always_yield():
    assert thresholds(Student(), [0]).item() == math.inf
    assert thresholds(Teacher(), [0]).item() == -math.inf
    assert thresholds(SKD(top_k=25), [0]).item() == 24


def test_adaswitch_hands_over_once_and_for_good():
    policy = AdaSwitch(K=2.0, L=3)
    state = policy.start(1, torch.device("cpu"))
    seen = []
    for t, divergence in enumerate([1.0, 2.0, 3.0, 3.9, 6.0, 0.0]):
        tau = policy.threshold(state, 0, T([0]), T([t]))
        seen.append(tau.item())
        policy.observe(state, tau, T([divergence], dtype=torch.float64))
    # Warm-up of L tokens; then 2 * mean of the three before: 2*2, 2*(2+3+3.9)/3 = 5.93 < 6.0.
    assert seen[:3] == [math.inf] * 3
    assert seen[3] == pytest.approx(4.0)
    assert seen[4] == pytest.approx(2 * 8.9 / 3)
    assert seen[5] == -math.inf  # handed over, though the divergence is back at 0


def test_adaswitch_floor_keeps_rounding_noise_from_handing_over():
    policy = AdaSwitch(K=2.0, L=2, floor=1e-4)
    state = policy.start(1, torch.device("cpu"))
    for t, divergence in enumerate([1e-9, 1e-9, 1e-7]):
        tau = policy.threshold(state, 0, T([0]), T([t]))
        policy.observe(state, tau, T([divergence], dtype=torch.float64))
    assert not state["handed_over"].item()


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Switch(schedule="cosine"), "switch_schedule"),
        (lambda: Switch(tau0=0), "switch_tau0"),
        (lambda: Switch(decay=-1), "switch_lambda"),
        (lambda: Switch(rate=1.5), "switch_rate"),
        (lambda: Switch(base=10), "jsd_base"),
        (lambda: AdaSwitch(K=None, L=4), "adaswitch_k"),
        (lambda: AdaSwitch(K=2.0, L=0), "adaswitch_window"),
        (lambda: SKD(top_k=0), "skd_top_k"),
    ],
)
def test_impossible_values_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=rf"{name}: got .*expected"):
        make()
