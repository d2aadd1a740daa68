"""Which rows share a pass: least padding, but no pass that costs more than it saves."""

import itertools

import pytest
import torch
from conftest import tiny_model

from switchkd import losses
from switchkd.models import decoder_of
from switchkd.padding import by_length


def cost(lengths, groups, pass_cost):
    return sum(len(g) * max(lengths[i] for i in g) + pass_cost for g in groups)


def partitions(items):
    """All ways to cut a list into runs."""
    for cuts in itertools.product((False, True), repeat=len(items) - 1):
        groups = [[items[0]]]
        for item, cut in zip(items[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(item)
        yield groups


@pytest.mark.parametrize("pass_cost", [0, 1, 5, 30, 1000])
def test_no_other_grouping_costs_less(pass_cost):
    lengths = [12, 3, 0, 40, 12, 38, 5, 21]
    groups = by_length(lengths, pass_cost)
    assert sorted(itertools.chain(*groups)) == [0, 1, 3, 4, 5, 6, 7]
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    least = min(cost(lengths, other, pass_cost) for other in partitions(order))
    assert cost(lengths, groups, pass_cost) == least
    longest = [lengths[g[0]] for g in groups]
    assert longest == sorted(longest, reverse=True)
    assert all(lengths[g[0]] == max(lengths[i] for i in g) for g in groups)


def test_free_passes_are_not_padded_and_infinite_ones_are_one():
    assert [len(g) for g in by_length([4, 7, 4, 9], 0)] == [1, 1, 2]
    assert by_length([4, 7, 4, 9], float("inf")) == [[3, 1, 0, 2]]
    assert by_length([0, 0], 3) == by_length([], 3) == []


def test_states_and_gradients_do_not_depend_on_the_grouping(monkeypatch):
    """Prompts of very unequal length: fewer tokens are fed, and nothing else changes."""
    model = tiny_model("llama")
    prompts = [[5] * n for n in (3, 50, 4, 47, 2)]
    batch = losses.collate(prompts, [[7, 8, 9], [4], [3, 3], [6, 2, 5], [9]], pad=0)
    fed, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: fed.append(given["input_ids"].numel()) or forward(**given)
    )
    results = []
    for pass_cost in (losses.PASS_COST, float("inf")):
        monkeypatch.setattr(losses, "PASS_COST", pass_cost)
        hidden = losses.response_hidden(model, decoder_of(model), batch)
        model.zero_grad()
        hidden.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach(), gradients))
    assert fed == [2 * 51, 3 * 6, 5 * 51]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_sequence_without_a_prompt_has_one_state_less():
    """Its first token is predicted by nothing, as in the extra language-model text."""
    model, mask = tiny_model("llama"), torch.ones(3, 5, dtype=torch.int64)
    batch = {"input_ids": mask + 4, "attention_mask": mask, "completion_mask": mask.bool()}
    assert losses.response_hidden(model, decoder_of(model), batch).shape == (3 * 4, 32)
