"""Free slots wait for each other as long as that is cheaper than a pass over prompts for each."""

import random
from types import SimpleNamespace

import pytest
from conftest import EOS
from test_decoder import COMMON, assert_same, pair, passes

from switchkd import engine
from switchkd.decoder import rollout
from switchkd.metrics import engine_for
from switchkd.planner import Planner
from switchkd.policies import Switch
from switchkd.rollout import rollout_naive
from switchkd.slots import Queue

COUNT, PROMPTS = 32, 512


class Fixed(Queue):
    """Waits for a fixed number of free slots."""

    def __init__(self, wanted: int):
        super().__init__(PROMPTS, COUNT)
        self.wanted = wanted

    def take(self, free, round_cost, pass_cost):
        enough = len(free) >= min(self.wanted, len(self.waiting))
        return super().take(free, round_cost, pass_cost=0.0 if enough else float("inf"))


def cost_of_all(queue: Queue, lengths: list[int], pass_cost: float) -> float:
    """What it costs to write rows of these lengths, a token and 1 a round."""
    cost, left, started = 0.0, {}, []
    while queue.waiting or left:
        jobs = queue.take([s for s in range(COUNT) if s not in left], 1.0, pass_cost)
        left |= {slot: lengths[job] for slot, job in jobs}
        started += [job for _, job in jobs]
        cost += 1 + pass_cost * bool(jobs)
        left = {slot: n - 1 for slot, n in left.items() if n > 1}
    assert started == list(range(PROMPTS))
    return cost


@pytest.mark.parametrize("pass_cost", [0.0, 0.2, 1.0, 3.0, 10.0])
def test_no_fixed_number_of_slots_is_much_cheaper(pass_cost):
    rng = random.Random(0)
    lengths = [rng.randint(5, 50) for _ in range(PROMPTS)]
    fixed = [cost_of_all(Fixed(n), lengths, pass_cost) for n in range(1, COUNT + 1)]
    got = cost_of_all(Queue(PROMPTS, COUNT), lengths, pass_cost)
    assert got <= 1.03 * min(fixed)
    at_once, none_left = fixed[0], fixed[-1]
    if pass_cost == 0:
        assert got == at_once
    if pass_cost == 3:  # dear enough for either extreme to be far off
        assert got < 0.55 * at_once and got < 0.85 * none_left


def test_fewer_passes_write_the_same(monkeypatch):
    teacher, student = pair()
    asked, policy = [[3, 4, 5 + i % 40] for i in range(60)], Switch(max_new_tokens=24)
    given = COMMON | {"max_new_tokens": 24, "eos_token_ids": [EOS, 12]}
    want = rollout_naive(teacher, student, asked, policy, **given)
    given |= {"batch_size": 8, "costs": {"teacher": 1.0, "student": 0.5}}

    def both():
        count, got = passes(teacher, lambda: rollout(teacher, student, asked, policy, **given))
        assert_same(got, want)
        return count

    waiting = both()
    assert both() == waiting  # given costs, not measured times, decide
    monkeypatch.setattr(Planner, "prefill_cost", lambda self: 0.0)
    assert waiting < 0.9 * both()


def test_an_evaluation_takes_the_same_batches_whatever_the_clock_says(monkeypatch):
    _, student = pair()
    asked, taken = [[3, 4, 5 + i % 40] for i in range(60)], []
    original = Queue.take

    def take(self, *args):
        jobs = original(self, *args)
        taken[-1].append(jobs)
        return jobs

    monkeypatch.setattr(Queue, "take", take)
    for seed in range(3):
        clock = random.Random(seed).random
        monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=clock))
        taken.append([])
        rollout(None, student, asked, engine=engine_for(student), batch_size=8, **COMMON)
    assert taken[0] == taken[1] == taken[2]
