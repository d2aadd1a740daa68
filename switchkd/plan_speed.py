"""How long a step takes: counted operations over what a device can do.

Each operation takes the longer of its FLOPs over the rate of matrix products and its bytes over the
copy bandwidth (the roofline model), one after another. Both are measured here by a short probe, and
passes of the models by some of few layers (`plan_probe`). For a device that is not here they are
data-sheet numbers, which no program reaches, so that the times are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from switchkd import plan_probe
from switchkd.devices import find_device
from switchkd.doctor import copy_bandwidth, median_seconds
from switchkd.engine import free_bytes
from switchkd.plan_memory import Memory
from switchkd.plan_meter import Op, decoding_pass
from switchkd.plan_probe import BLOCK, Passes
from switchkd.planner import GUESS

GIB = 2**30
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """memory in bytes, copy bandwidth in bytes a second, dense matrix products in FLOP/s."""

    name: str
    memory: int
    bandwidth: float
    full: float  # float32
    half: float  # bfloat16 and float16
    measured: bool = False

    def seconds(self, ops: list[Op]) -> float:
        return sum(
            max(
                op.flops / (self.half if op.dtype in HALF else self.full), op.moved / self.bandwidth
            )
            for op in ops
        )


# Data-sheet numbers, nothing of it measured: memory, bandwidth in GB/s, dense TFLOP/s of float32
# (without TF32) and of bfloat16. SXM and OAM versions where there are several.
DATA_SHEETS = {
    "A100-40GB": Device("A100-40GB", 40 * GIB, 1555e9, 19.5e12, 312e12),
    "A100-80GB": Device("A100-80GB", 80 * GIB, 2039e9, 19.5e12, 312e12),
    "H100-80GB": Device("H100-80GB", 80 * GIB, 3350e9, 67e12, 989e12),
    "H200-141GB": Device("H200-141GB", 141 * GIB, 4800e9, 67e12, 989e12),
    "L40S-48GB": Device("L40S-48GB", 48 * GIB, 864e9, 91.6e12, 362e12),
    "MI300X-192GB": Device("MI300X-192GB", 192 * GIB, 5300e9, 163.4e12, 1307e12),
}


def probe(name: str | None = None) -> Device:
    """The CPU or a GPU of this machine, measured for a second or two."""
    device = find_device(name)
    gpu, memory = device.type == "cuda", free_bytes(device)
    rows, width = (4096, 4096) if gpu else (128, 1024)  # 1 GFLOP/s of bfloat16 without AVX-512
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(n, width, device=device, dtype=dtype) for n in (rows, width))
        seconds = median_seconds(lambda a=a, b=b: a @ b, device, repeats=5)
        rates.append(2 * rows * width**2 / seconds)
    return Device(str(device), memory, copy_bandwidth(device), *rates, measured=True)


def find(name: str | None) -> Device:
    """A device of this machine, or of the table."""
    known = {key.lower(): device for key, device in DATA_SHEETS.items()}
    if name is not None and name.lower() in known:
        return known[name.lower()]
    try:
        return probe(name)
    except ValueError as error:
        raise ValueError(f"{error}; or of data sheets: {', '.join(DATA_SHEETS)}") from None


def rollout_seconds(memory: Memory, device: Device) -> float:
    """All rows at once as far as there are slots. Drafter and block length are the cheapest if a
    draft is right as often as the planner guesses before it has seen any; one token at a time where
    one model writes all."""
    config, sizes = memory.config, memory.asked
    rows, slots = config.lmbda * sizes.rows * sizes.accumulation, sizes.slots
    if rows == 0:
        return 0.0
    passes, prefill = {}, 0.0
    for role in memory.decoders:
        times = _probed(memory, role, device) or _reckoned(memory, role, device)
        each = (times.block - times.one) / (BLOCK - 1)
        passes[role] = {k: times.one + each * (k - 1) for k in range(1, BLOCK + 1)}
        prefill += times.prefill
    alone = "teacher" if config.rollout_policy == "teacher" else "student"
    if len(passes) == 1 or alone == "teacher":
        token = passes[alone][1]
    else:
        blocks = [k for k in memory.blocks if k in passes[alone]]
        token = min(_round_seconds(passes, d, k) for d in passes for k in blocks or [1])
    turns = max(rows / slots, 1.0)
    refresh = 0.0
    if memory.pair.copied:
        refresh = 2 * memory.fixed["student's copy for decoding"] / device.bandwidth
    return turns * (prefill + config.max_new_tokens * token) + refresh


def _probed(memory: Memory, role: str, device: Device) -> Passes | None:
    if not device.measured or not plan_probe.fits(memory, role, device.memory):
        return None
    return plan_probe.decoding(memory, role, torch.device(device.name))


def _reckoned(memory: Memory, role: str, device: Device) -> Passes:
    model, slots = memory.decoders[role], memory.asked.slots
    reach = memory.config.max_prompt_length + memory.config.max_new_tokens / 2
    cached = slots * reach * memory.position_bytes[role] / device.bandwidth
    with memory.pair.mode:
        one, block = (
            cached + device.seconds(decoding_pass(model, slots, k, logits=True).ops)
            for k in (1, BLOCK)
        )
    return Passes(one, block, device.seconds(memory.prefill[role].ops))


def _slowdown(memory: Memory, device: Device) -> float:
    """How many times as long as the roofline says the student's passes of training take."""
    if not device.measured or not plan_probe.fits(memory, "student", device.memory):
        return 1.0
    phases = memory.micro_steps[0]
    reckoned = sum(device.seconds(phases[f"student {x}"].ops) for x in ("forward", "backward"))
    return plan_probe.training(memory, torch.device(device.name)) / reckoned


def _round_seconds(passes: dict[str, dict[int, float]], drafter: str, k: int) -> float:
    """Of one token: k drafts and a pass over them, of which 1 + a + ... + a^(k-1) stand."""
    (other,) = set(passes) - {drafter}
    right = 0.5 + 0.5 * GUESS
    return (k * passes[drafter][1] + passes[other][k]) / sum(right**i for i in range(k))


def step_seconds(memory: Memory, device: Device) -> dict[str, float]:
    """Seconds of an optimizer step by part, with the sizes asked, every row at its limits."""
    config, sizes, times = memory.config, memory.asked, {}
    times["rollout"] = rollout_seconds(memory, device)
    slowdown = _slowdown(memory, device)
    for name, phase in memory.micro_steps[0].items():
        factor = 1.0 if name == "loss" else slowdown
        times[name] = factor * sizes.accumulation * device.seconds(phase.ops)
    if memory.keeps_hidden:  # only rows that were not rolled out
        times["teacher forward"] *= 1 - config.lmbda
    fixed = memory.fixed
    trained = sum(p.nbytes for p in memory.pair.student.parameters() if p.requires_grad)
    share = memory.processes if memory.sharded else 1
    moved = 3 * trained / share + 2 * fixed["optimizer state"]  # gradient read, the rest read, too
    times["optimizer"] = moved / device.bandwidth
    return times
