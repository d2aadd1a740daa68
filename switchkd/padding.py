"""Rows of unequal length in one pass are padded; on a CPU a padded token costs what any costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def by_length(lengths: Sequence[int], pass_cost: float) -> list[list[int]]:
    """Indices of the rows that had best share a pass, longest first; none of length 0.

    The groups with the least sum of rows * longest row + pass_cost. pass_cost: what a further pass
    costs, in tokens, because it reads all weights once more; infinite: one group.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    if pass_cost == float("inf"):
        return [order] if order else []
    cost, start = [0.0], [0]  # of the best groups of the first rows; where the last of them begins
    for end in range(1, len(order) + 1):
        least, first = min(
            (cost[first] + (end - first) * lengths[order[first]] + pass_cost, first)
            for first in range(end)
        )
        cost.append(least)
        start.append(first)
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def pad_history(earlier: list[list[int]], width: int, device: torch.device) -> Tensor | None:
    """(P, width) tokens, -1 after the end of each; None if there are none."""
    if not any(earlier):
        return None
    padded = [tokens + [-1] * (width - len(tokens)) for tokens in earlier]
    return torch.tensor(padded, device=device)


def batches(lengths: Sequence[int], size: int, equal: bool = False) -> list[list[int]]:
    """Indices of all rows, `size` together at most, the shortest first; equal: none is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order]
    if equal:
        groups = [list(rows) for _, rows in itertools.groupby(order, lengths.__getitem__)]
    return [rows[at : at + size] for rows in groups for at in range(0, len(rows), size)]
