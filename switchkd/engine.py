"""What outlives a rollout: both caches, the graphs over them, and what was learnt about speed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import psutil
import torch
from torch import nn

from switchkd.cache import CachedModel, NotServed, check_architecture, position_bytes, row_bytes
from switchkd.graphs import Graphs
from switchkd.models import knows_head
from switchkd.planner import Planner

log = logging.getLogger(__name__)

MARGIN = 0.9  # share of the free memory that caches may take


class Engine:
    """Decodes with two models; give the same one to several rollouts to keep its memory and graphs.

    block, drafter: how many tokens are drafted a round, by "student", "teacher" or "history"; None:
    what is fastest by measured times and acceptance, or by the relative `costs` of a pass of
    either, {"teacher": ..., "student": ...}; then nothing is carried from one rollout to the next,
    and a rollout that is repeated takes the same rounds.
    Raises ValueError for architectures that a row cache cannot serve.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        block: int | None = None,
        drafter: str | None = None,
        costs: dict[str, float] | None = None,
    ):
        given = {"teacher": teacher, "student": student}
        self.given = {role: model for role, model in given.items() if model is not None}
        for model in self.given.values():
            check_architecture(model)
            if not knows_head(model):
                raise NotServed(
                    f"{type(model).__name__} makes other logits of its hidden states than its "
                    "output head alone does; the naive loop decodes it"
                )
        self.device = student.device
        self.plan = (block, drafter, costs, self.device.type)
        self.planner = Planner(*self.plan)
        self.room = 0, 0  # rows and positions to begin with, if later rollouts will need them
        self.asked = self.slots = self.capacity = 0
        self.kind = None  # of what the caches hold
        self.position_bytes: dict[str, int] = {}  # of keys and values in each
        self.row_bytes: dict[str, int] = {}  # of other state
        self.models: dict[str, CachedModel] = {}
        self.graphs = Graphs(self.device, student.dtype)
        self.stream, self.spans = None, []

    def prepare(self, rows: int, capacity: int) -> int:
        """Make room for `rows` rows of `capacity` positions; returns how many fit, at most `rows`.

        Raises ValueError with the numbers if not even one row fits.
        """
        if not self.planner.measures:
            self.planner = Planner(*self.plan)
        self.spans.clear()  # of a round that an error ended
        if self.device.type == "cuda":  # to ask at every event costs as much as to record it
            self.stream = torch.cuda.current_stream(self.device)
        given, block = self.given.items(), max(self.planner.blocks)
        kind = [(model.dtype, torch.is_inference_mode_enabled()) for _, model in given]
        if kind != self.kind:
            self.position_bytes = {role: position_bytes(model) for role, model in given}
            self.row_bytes = {role: row_bytes(model, block) for role, model in given}
        if rows > self.asked or capacity > self.capacity or kind != self.kind:
            asked = max(rows, self.asked, self.room[0])
            capacity = max(capacity, self.capacity, self.room[1])
            self.release()
            slots = self.fitting(asked, capacity)
            self.models = {
                role: CachedModel(model, slots, capacity, block) for role, model in given
            }
            self.asked, self.slots, self.capacity, self.kind = asked, slots, capacity, kind
        return min(rows, self.slots)

    def fitting(self, rows: int, capacity: int) -> int:
        """How many rows fit into the memory that is free; says so if they are fewer."""
        each = {
            role: capacity * size + self.row_bytes[role]
            for role, size in self.position_bytes.items()
        }
        empty = [type(self.given[role]).__name__ for role, size in each.items() if size == 0]
        if empty:
            raise NotServed(
                f"{empty[0]}: got a model that leaves nothing in the cache that it is given, "
                "expected keys and values; the naive loop may decode it"
            )
        needed, free = sum(each.values()), free_bytes(self.device)
        fit = int(MARGIN * free / needed)
        numbers = (
            f"{capacity} positions a row take "
            + ", ".join(f"{size / 2**20:.1f} MiB of the {role}" for role, size in each.items())
            + f"; {free / 2**30:.2f} GiB are free on {self.device}"
        )
        if fit < 1:
            raise ValueError(f"not one row fits into the caches: {numbers}")
        if fit < rows:
            log.warning("decoding %d rows at once instead of %d: %s", fit, rows, numbers)
        return min(fit, rows)

    def release(self) -> None:
        """Give back the memory of caches and graphs; the next rollout takes it again."""
        self.models, self.graphs = {}, Graphs(self.device, self.given["student"].dtype)
        self.asked = self.slots = self.capacity = 0

    @contextlib.contextmanager
    def timed(self, what: str, count: int, times: float = 1.0) -> Iterator[None]:
        """The planner will be told how long this took, divided by `times`."""
        start = self._now()
        yield
        self.spans.append((what, count, times, start, self._now()))

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def tell(self, start: float) -> None:
        """Tell the planner all times of the round that began at `start`, once the device is known
        to be through with it."""
        rest, gpu = time.perf_counter() - start, self.device.type == "cuda"
        for what, count, times, begin, end in self.spans:
            seconds = begin.elapsed_time(end) / 1e3 if gpu else end - begin
            self.planner.took(what, count, seconds / times)
            rest -= seconds
        self.planner.took("rest", 1, max(rest, 0.0))
        self.spans.clear()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
