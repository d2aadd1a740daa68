"""Who drafts, and how many tokens: the cheapest choice by measured times and measured acceptance.

A round of k drafts costs k passes of the drafter (none if they come from an earlier completion) and
one pass over k positions of each other model that is needed, the decision and the rest of a round,
and is expected to yield 1 + a + ... + a^(k-1) tokens, a being the share of drafts that turn out
right. One draft is the naive step, so the planner never does worse than that on what it has
measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection

BLOCKS = (1, 2, 3, 4, 6, 8)
BUCKET = 8  # positions that share an acceptance rate: it changes as the threshold falls
MEMORY = 0.9  # weight of what was seen before, each time something is seen
GUESS = 0.5  # how often a draft is right where the other model writes, before any was seen
WEIGHT = 4.0  # of that guess, in drafts
SLOPE = {"cpu": 0.5}  # what a further position adds to a pass, before it was measured; else 0.1
OUTLIER = 4.0  # times what was measured before: no more is believed at once
DRAFTERS = ("student", "teacher", "history")


class Planner:
    """block, drafter: fixed, or None for the best by what was measured.

    costs: what a pass of "teacher" and of "student" costs, in any unit, instead of measured times.
    Plans then depend on the tokens alone, and a run that is repeated rounds alike.
    """

    def __init__(
        self,
        block: int | None = None,
        drafter: str | None = None,
        costs: dict[str, float] | None = None,
        device: str = "cpu",
    ):
        if block is not None and block < 1:
            raise ValueError(f"block: got {block}, expected at least 1, or None to adapt it")
        if drafter not in (None, *DRAFTERS):
            raise ValueError(f"drafter: got {drafter!r}, expected one of {DRAFTERS}, or None")
        self.blocks = BLOCKS if block is None else (block,)
        self.drafters = DRAFTERS if drafter is None else (drafter,)
        # By count: seconds, and how often that was measured.
        timed = ("teacher", "student", "decide", "rest", "prefill")
        self.seconds: dict[str, dict] = {what: {} for what in timed}
        self.measures, self.slope = costs is None, SLOPE.get(device, 0.1)
        for role, cost in (costs or {}).items():
            self.seconds[role][1] = cost, 2  # as if it had been measured twice
        # By bucket: how many drafts were right of how many, and whose tokens were written.
        self.accepted = {role: defaultdict(lambda: [0.0, 0.0]) for role in DRAFTERS}
        self.writers = defaultdict(lambda: [0.0, 0.0])

    def took(self, what: str, count: int, seconds: float) -> None:
        """A pass of a model, or a decision, over `count` positions of each row was timed, or, with
        count 1, both models' passes over prompts beside their tokens, or the rest of a round."""
        if not self.measures:
            return
        known, times = self.seconds[what].get(count, (seconds, 0))
        # A first pass may have captured a graph or compiled a kernel: a hundred times the work.
        if 0 < known <= 2 * seconds:
            seconds = MEMORY * known + (1 - MEMORY) * min(seconds, OUTLIER * known)
        self.seconds[what][count] = seconds, times + 1

    def saw(self, drafter: str, position: float, right: int, total: int) -> None:
        """Of `total` drafts around `position` whose prefix stood, `right` were right."""
        self._add(self.accepted[drafter], position, right, total)

    def wrote(self, position: float, teacher: int, total: int) -> None:
        """Of `total` tokens around `position` the teacher wrote so many."""
        self._add(self.writers, position, teacher, total)

    def _add(self, seen: dict, position: float, part: int, total: int) -> None:
        bucket = seen[int(position) // BUCKET]
        bucket[0] = MEMORY * bucket[0] + part
        bucket[1] = MEMORY * bucket[1] + total

    def acceptance(self, drafter: str, position: float) -> float:
        """The share of right drafts here, or in the nearest bucket before it.

        Where few drafts were seen, who writes tells most: one's own tokens are drafted right.
        """
        bucket = int(position) // BUCKET
        teacher, total = self._nearest(self.writers, bucket)
        own = teacher / total if total else 0.5
        own = {"teacher": own, "student": 1 - own, "history": 0.5}[drafter]
        right, total = self._nearest(self.accepted[drafter], bucket)
        return (right + WEIGHT * (own + (1 - own) * GUESS)) / (total + WEIGHT)

    def _nearest(self, seen: dict, bucket: int) -> tuple[float, float]:
        for b in range(bucket, -1, -1):
            if b in seen and seen[b][1] > 0:
                return tuple(seen[b])
        return 0.0, 0.0

    def cost(self, what: str, count: int) -> float:
        """Seconds of a pass over `count` positions: as measured more than once, or along the line
        through the two nearest counts that were, if one measurement does not say less."""
        known = self.seconds[what]
        if not known:
            return 0.0
        once, times = known.get(count, (math.inf, 0))
        if times > 1:
            return once
        sure = {c: seconds for c, (seconds, times) in known.items() if times > 1}
        sure = sure or {c: seconds for c, (seconds, _) in known.items()}
        a, *rest = sorted(sure, key=lambda other: abs(other - count))
        slope = self.slope * sure[a] / a
        if rest:
            slope = max((sure[rest[0]] - sure[a]) / (rest[0] - a), 0.0)
        return min(once, max(sure[a] + slope * (count - a), 0.1 * sure[a]))

    def round_cost(self, drafter: str, k: int, needed: Collection[str]) -> float:
        """Seconds of a round in which the models `needed` score k drafts."""
        seconds = sum(self.cost(role, k) for role in needed if role != drafter)
        seconds += k * self.cost(drafter, 1) if drafter != "history" else 0.0
        return seconds + self.cost("rest", 1) + (self.cost("decide", k) if len(needed) > 1 else 0.0)

    def prefill_cost(self) -> float:
        """Seconds that prompts take in passes of their own, beside those that their tokens take."""
        return self.cost("prefill", 1) or self.cost("teacher", 1) + self.cost("student", 1)

    def choose(
        self,
        position: float,
        limit: int,
        *,
        settled: bool = False,
        student_follows: bool = True,
        along: float | None = None,
    ) -> tuple[str, int]:
        """(drafter, k <= limit) with the most expected tokens a second around `position`.

        settled: the teacher writes all rows, the student is needed as a drafter only, and only if
        student_follows, that is, its cache holds all rows. along: share of rows that have so far
        followed their earlier completion, if there are any.
        """
        needed = ("teacher",) if settled else ("teacher", "student")

        def tokens_per_second(choice: tuple[str, int]) -> float:
            drafter, k = choice
            seconds = self.round_cost(drafter, k, needed)
            rate = 1.0 if needed == (drafter,) else self.acceptance(drafter, position)
            expected = sum(rate**i for i in range(k))
            if drafter == "history":  # a row that has left it still gains a token
                expected = along * expected + 1 - along
            return expected / seconds if seconds else k == 1

        usable = {
            "teacher": True,
            "student": student_follows,
            "history": along is not None and (along > 0 or self.drafters == ("history",)),
        }
        drafters = [d for d in self.drafters if usable[d]] or ["teacher"]
        blocks = sorted({min(k, limit) for k in self.blocks})
        return max(((d, k) for d in drafters for k in blocks), key=tokens_per_second)
