"""Memory of a run on one device, part by part and phase by phase, every row at its limits."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property

import torch
from switchkd_kernels import _backend as backend
from switchkd_kernels.linear_divergence_loss import CHUNK_BYTES
from torch import nn

from switchkd.cache import capacity_for, position_bytes, row_bytes
from switchkd.config import SwitchConfig
from switchkd.models import layers_in
from switchkd.plan_meter import (
    Loss,
    Phase,
    Shape,
    decoding_pass,
    head_weight,
    training_steps,
)
from switchkd.plan_models import Pair
from switchkd.planner import BLOCKS

# Freed blocks that glibc's malloc keeps on a CPU, unless it was told to return them: 0 to 289 MiB,
# 126 in the median, in 13 short trainings of models of 8 to 540 MB, and other in each repetition
# (benchmarks/LOG.md).
KEPT_BY_MALLOC = 128 * 2**20
RETURNS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")

# Bytes of optimizer state a parameter, None: two of the parameter's own size (AdamW).
STATE_BYTES = {
    "adamw_torch": None, "adamw_torch_fused": None, "adamw_torch_xla": None,
    "adamw_torch_npu_fused": None, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4,
    "lion_8bit": 1, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1, "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1,
    "ademamix": 12, "ademamix_8bit": 3,
}  # fmt: skip


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, tied ones once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def optimizer_bytes(model: nn.Module, optim: str, notes: list[str]) -> int:
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim == "adafactor":  # a row and a column for each matrix, in float32
        return sum(4 * (sum(p.shape) if p.dim() > 1 else p.numel()) for p in trained)
    if optim not in STATE_BYTES:
        notes.append(f"the state of --optim {optim} is not known here and counted as AdamW's")
    each = STATE_BYTES.get(optim)
    return sum(p.numel() * (2 * p.element_size() if each is None else each) for p in trained)


def returns_memory() -> bool:
    """Whether this process runs without glibc's malloc as it is by default."""
    return not sys.platform.startswith("linux") or any(name in os.environ for name in RETURNS)


@dataclass(frozen=True)
class Sizes:
    """What a plan may choose: rows of a micro-batch, micro-batches a step, rows decoded at once."""

    rows: int
    accumulation: int
    slots: int


class Memory:
    """Bytes of a run on each of `processes` devices; `gpu`: as its kernels work there.

    response: tokens of a data row's response at most; default: max_new_tokens.
    """

    def __init__(
        self,
        pair: Pair,
        config: SwitchConfig,
        processes: int = 1,
        gpu: bool = False,
        response: int | None = None,
    ):
        self.pair, self.config, self.processes, self.gpu = pair, config, processes, gpu
        data = response if response is not None and config.lmbda < 1 else 0
        self.response = max(config.max_new_tokens, data)
        self.sharded = bool(config.fsdp) and processes > 1
        self.notes = list(pair.notes)
        rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
        slots = min(config.rollout_batch_size, rows * steps) if config.rolls_out else 0
        self.asked = Sizes(rows, steps, slots)

    # -------------------------------------------------------------------- what is always there

    @cached_property
    def implementation(self) -> str:
        """Of the loss: the chunks that it works in depend on it."""
        if self.gpu:
            return "triton"
        return backend.choose(None, torch.empty(0, dtype=self.product_dtype))

    @property
    def cast(self) -> torch.dtype | None:
        """What autocast multiplies in."""
        config = self.config
        return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None

    @property
    def product_dtype(self) -> torch.dtype:
        return self.cast or head_weight(self.pair.student).dtype

    @cached_property
    def loss(self) -> Loss:
        heads = [m for m in (self.pair.student, self.pair.teacher) if m is not None]
        vocab = min(head_weight(m).shape[0] for m in heads)
        plain = self.implementation == "reference"
        width = 4 if plain else self.product_dtype.itemsize
        chunk = max(16, CHUNK_BYTES[self.implementation] // (width * vocab))
        return Loss(chunk, vocab, self.cast, plain)

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Weights, gradients and optimizer state on each device."""
        pair, config = self.pair, self.config
        part = self.processes if self.sharded else 1
        trained = sum(p.nbytes for p in pair.student.parameters() if p.requires_grad)
        student = weight_bytes(pair.student)
        decodes = config.rolls_out or config.eval_strategy != "no"
        copied = weight_bytes(pair.decoding) if pair.copied else student if self.sharded else 0
        teacher = 0 if pair.teacher is None or pair.shared_base else weight_bytes(pair.teacher)
        bucket = trained if self.processes > 1 and not self.sharded else 0  # DDP's copy
        return {
            "teacher weights": teacher,
            "student weights": student // part,
            "student's copy for decoding": copied if decodes else 0,
            "gradients": trained // part + bucket,
            "optimizer state": optimizer_bytes(pair.student, config.optim, self.notes) // part,
            "freed and kept by malloc": 0 if self.gpu or returns_memory() else KEPT_BY_MALLOC,
        }

    @property
    def decoders(self) -> dict[str, nn.Module]:
        models = {"teacher": self.pair.teacher, "student": self.pair.decoding}
        return {role: model for role, model in models.items() if model is not None}

    @cached_property
    def position_bytes(self) -> dict[str, int]:
        """Keys and values of one position, by each model."""
        return {role: position_bytes(model) for role, model in self.decoders.items()}

    @cached_property
    def row_bytes(self) -> dict[str, int]:
        """What layers without attention keep of a row, by each model."""
        return {role: row_bytes(model, max(self.blocks)) for role, model in self.decoders.items()}

    def caches(self, slots: int) -> dict[str, int]:
        config = self.config
        block = max(self.blocks)
        capacity = capacity_for(config.max_prompt_length, config.max_new_tokens, block)
        return {
            f"{role}'s cache": slots * (capacity * size + self.row_bytes[role])
            for role, size in self.position_bytes.items()
        }

    @property
    def blocks(self) -> tuple[int, ...]:
        block = self.config.rollout_block
        if self.config.decoder == "naive":
            return (1,)
        return BLOCKS if block is None else (block,)

    # -------------------------------------------------------------------- a training step

    @property
    def keeps_hidden(self) -> bool:
        config = self.config
        distils = config.loss_type != "cross_entropy"
        return distils and config.rolls_out and config.decoder == "block"

    def kept_hidden(self, rows: int) -> int:
        """The teacher's hidden states that rollouts of so many rows keep."""
        if not self.keeps_hidden or self.pair.teacher is None:
            return 0
        teacher = self.pair.teacher
        width = head_weight(teacher).shape[1] * teacher.dtype.itemsize
        return rows * self.config.max_new_tokens * width

    def measure(self, rows: int, count: int) -> list[dict[str, Phase]]:
        config, pair = self.config, self.pair
        distils = config.loss_type != "cross_entropy"
        with pair.mode:
            return training_steps(
                pair.student, pair.teacher if distils else None,
                Shape(rows, config.max_prompt_length, self.response), self.loss,
                count=count,
                teacher_runs=not (self.keeps_hidden and config.lmbda == 1),
                extra_text=config.lm_file is not None and config.lm_coef > 0,
                keep_gradients=not self.sharded,
            )  # fmt: skip

    @cached_property
    def micro_steps(self) -> list[dict[str, Phase]]:
        """Phases of a micro-batch as asked, and of one that follows it in a step."""
        return self.measure(self.asked.rows, count=2)

    @cached_property
    def other(self) -> tuple[int, dict[str, Phase]]:
        """Another number of rows, and the phases of such a micro-batch."""
        rows = 1 if self.asked.rows > 1 else 2
        return rows, self.measure(rows, count=1)[0]

    def training_peak(self, rows: int, accumulation: int) -> int:
        """Activations, loss buffers and gradients at most. Two numbers of rows are measured, others
        lie on the line through them, phase by phase."""
        (first, second), peaks = self.micro_steps, []
        for name, phase in first.items():
            peak = phase.peak
            if rows != self.asked.rows:
                at, other = self.other
                slope = (phase.peak - other[name].peak) / (self.asked.rows - at)
                peak += slope * (rows - self.asked.rows)
            if accumulation > 1:  # the gradients of the earlier ones are there
                peak += second[name].peak - phase.peak
            peaks.append(int(peak))
        return max(peaks)

    @cached_property
    def gathered_layers(self) -> int:
        """FSDP: the layer at work and the next are whole."""
        if not self.sharded:
            return 0
        return 2 * max(map(weight_bytes, layers_in(self.pair.student)), default=0)

    # -------------------------------------------------------------------- decoding

    def decoder_logits(self, slots: int) -> int:
        """Of both models for a whole block, and what plain torch makes of them."""
        each = slots * max(self.blocks) * self.loss.vocab_size
        bytes_each = sum(model.dtype.itemsize for model in self.decoders.values())
        return each * (bytes_each + (40 if self.implementation == "reference" else 0))

    @cached_property
    def prefill(self) -> dict[str, Phase]:
        """A pass of each model over the prompts of all slots, as asked."""
        rows, width = max(self.asked.slots, 1), self.config.max_prompt_length
        with self.pair.mode:
            return {
                role: decoding_pass(model, rows, width, logits=False)
                for role, model in self.decoders.items()
            }

    @property
    def prefill_row(self) -> int:
        return max(phase.peak for phase in self.prefill.values()) // max(self.asked.slots, 1)

    # -------------------------------------------------------------------- together

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for, with the sizes asked; they are not all alive at once."""
        first, sizes = self.micro_steps[0], self.asked
        window = sizes.rows * sizes.accumulation
        return {
            **self.fixed,
            **self.caches(sizes.slots),
            "logits in the decoder": self.decoder_logits(sizes.slots),
            "teacher's kept hidden states": self.kept_hidden(window),
            "activations of the student": first["student forward"].live,
            "loss buffers": first["loss"].peak - first["teacher forward"].live,
        }

    def phases(self, sizes: Sizes) -> dict[str, int]:
        """Bytes at most in each phase of a step, with all that outlives the phase. Validation takes
        less, or decodes fewer rows at once if memory is short."""
        fixed, config = self.fixed, self.config
        weights = sum(fixed[x] for x in fixed if x != "gradients")
        caches = sum(self.caches(sizes.slots).values())
        window = sizes.rows * sizes.accumulation
        held = caches if config.decoder == "block" else 0
        found = {}
        if config.rolls_out:
            work = max(sizes.slots * self.prefill_row, self.decoder_logits(sizes.slots))
            found["rollout"] = weights + caches + work + 2 * self.kept_hidden(window)
        own = sum(p.nbytes for p in self.pair.student.parameters() if p.requires_grad)
        training = self.training_peak(sizes.rows, sizes.accumulation) + self.kept_hidden(window)
        # The measured peak holds the gradients, but neither a rank's shards nor DDP's copy.
        training += fixed["gradients"] - (0 if self.sharded else own) + self.gathered_layers
        found["forward and backward"] = weights + held + training
        spare = own if config.optim == "adamw_torch" and self.gpu else 0  # for_each's temporaries
        found["optimizer"] = weights + held + fixed["gradients"] + spare
        return found

    def peak(self, sizes: Sizes) -> int:
        return max(self.phases(sizes).values())

    def suggest(self, limit: int) -> Sizes | None:
        """The largest micro-batch, and the most rows decoded at once, with which a step of as many
        rows as asked fits into `limit` bytes; None if not even one row does."""
        window = self.asked.rows * self.asked.accumulation
        halves = [window >> i for i in range(window.bit_length())]
        for rows in (n for n in range(window, 0, -1) if window % n == 0):
            for slots in halves if self.config.rolls_out else [0]:
                sizes = Sizes(rows, window // rows, slots)
                if self.peak(sizes) <= limit:
                    return sizes
        return None
