"""What a pass of a model costs, without weights: memory, floating-point operations, bytes moved.

The model is built and run with fake tensors (shapes and types without contents), so forward,
backward, autocast, checkpointing and adapters are the real ones of any architecture, operation by
operation, and nothing is estimated from a formula of layers. What a kernel takes for itself is not
seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from switchkd.models import decoder_of

aten = torch.ops.aten


@dataclass
class Op:
    """One operation that computes or copies: its FLOPs, the bytes that it reads and writes."""

    flops: int
    moved: int
    dtype: torch.dtype


@dataclass
class Phase:
    """Live bytes at its end and at most, beyond the model's own, and its operations."""

    live: int = 0
    peak: int = 0
    ops: list[Op] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)


class Meter(TorchDispatchMode):
    """Within it, tensors are counted from creation to release; `phase(name)` begins another.

    own: modules whose parameters and buffers are not counted.
    """

    def __init__(self, *own: nn.Module):
        super().__init__()
        tensors = [t for m in own for t in (*m.parameters(), *m.buffers())]
        self.own = {_storage(t) for t in tensors}
        self.sizes: dict[int, int] = {}
        self.live, self.phases = 0, {}

    def phase(self, name: str) -> None:
        self.now = self.phases[name] = Phase(self.live, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        for tensor in made:
            self.watch(tensor)
        before = {_storage(x) for x in given}
        view = not function._schema.is_mutable and all(_storage(x) in before for x in made)
        if made and not view:
            self.now.ops.append(_cost(function, args, kwargs, out, given, made))
        self.now.live = self.live
        self.now.peak = max(self.now.peak, self.live)
        return out

    def watch(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key in self.own or key in self.sizes:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _cost(function, args, kwargs, out, given: list[Tensor], made: list[Tensor]) -> Op:
    moved = sum(x.nbytes for x in (*given, *made))
    packet, flops = function.overloadpacket, 0
    if packet is aten.embedding:  # reads the rows that it returns, not the table
        moved = 2 * out.nbytes
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
        flops = sdpa_flop_count(*(x.shape for x in args[:3]))
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flops = sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    return Op(flops, moved, made[0].dtype)


# ------------------------------------------------------------------------------- passes


def head_weight(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight


@dataclass(frozen=True)
class Shape:
    """A micro-batch with every row at its limits."""

    rows: int
    prompt: int
    response: int

    def batch(self) -> dict[str, Tensor]:
        ids = torch.zeros(self.rows, self.prompt + self.response, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def hidden(self, model: nn.Module) -> Tensor:
        """As `losses.response_hidden`: (rows * response, H)."""
        states = decoder_of(model)(**self.batch(), use_cache=False)[0]
        part = states[:, self.prompt - 1 : self.prompt + self.response - 1]
        return part.reshape(-1, part.shape[-1])


@dataclass(frozen=True)
class Loss:
    """How `linear_divergence_loss` will work: rows in a chunk, shared vocabulary, the type that
    autocast multiplies in (None: none), and whether it runs in plain torch."""

    chunk: int
    vocab_size: int
    cast: torch.dtype | None
    plain: bool


class _LossBuffers(torch.autograd.Function):
    """The allocations and products of `linear_divergence_loss`, in its order."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, loss: Loss):
        ctx.dtypes = hidden.dtype, weight.dtype
        pairs = [(hidden, weight)]
        if teacher_hidden is not None:
            pairs.append((teacher_hidden, teacher_weight))
        pairs = [[x.detach().to(loss.cast or x.dtype) for x in pair] for pair in pairs]
        mine, head = pairs[0][0], pairs[0][1][: loss.vocab_size]
        wide = torch.promote_types(head.dtype, torch.float32)
        grads = [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = torch.zeros_like(mine)
        if ctx.needs_input_grad[1]:
            grads[1] = torch.zeros_like(weight, dtype=wide)
        for at in range(0, len(mine), loss.chunk):
            part = slice(at, at + loss.chunk)
            logits = [h[part] @ w[: loss.vocab_size].t() for h, w in pairs]
            work = logits[0]
            if loss.plain:  # softmaxes, their mixture and the terms, in float32
                work = torch.stack([logits[0].to(wide)] * 10)[0].to(work.dtype)
            work.add_(logits[-1])
            if grads[0] is not None:
                torch.mm(work, head, out=grads[0][part])
            if grads[1] is not None and head.dtype == wide:
                whole = grads[1][: loss.vocab_size]
                torch.addmm(whole, work.t(), mine[part], out=whole)
            elif grads[1] is not None:
                grads[1][: loss.vocab_size].add_(work.t() @ mine[part])
            del logits, work
        ctx.save_for_backward(*grads)
        return mine.new_zeros((), dtype=wide)

    @staticmethod
    def backward(ctx, upstream):
        grads = [
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None


def training_steps(
    student: nn.Module, teacher: nn.Module | None, shape: Shape, loss: Loss, *,
    count: int, teacher_runs: bool, extra_text: bool, keep_gradients: bool = True,
) -> list[dict[str, Phase]]:  # fmt: skip
    """The phases of `count` micro-steps, each with the gradients of those before it.

    teacher_runs: its hidden states are not all known from a rollout. extra_text: another row of
    text for each is trained on. keep_gradients: otherwise each goes as soon as it is complete, as
    those of sharded weights do. Call it with fake models, in their mode.
    """
    meter = Meter(*(m for m in (student, teacher) if m is not None))
    head, teacher_head = head_weight(student), None
    if teacher is not None:
        teacher_head = head_weight(teacher)
    steps, hooks = [], []
    if not keep_gradients:
        trained = [p for p in student.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    with meter:
        for _ in range(count):
            meter.phases = {}
            meter.phase("student forward")
            with torch.autocast("cpu", dtype=loss.cast, enabled=loss.cast is not None):
                hidden, known = shape.hidden(student), None
                meter.phase("teacher forward")
                if teacher is not None:
                    width = shape.rows * shape.response, teacher_head.shape[1]
                    known = torch.empty(*width, dtype=teacher.dtype)
                    if teacher_runs:
                        with torch.no_grad():
                            known.copy_(shape.hidden(teacher))
                meter.phase("loss")
                total = _LossBuffers.apply(hidden, head, known, teacher_head, loss)
                if extra_text:
                    text = Shape(shape.rows, 1, shape.prompt + shape.response - 1)
                    total = total + _LossBuffers.apply(text.hidden(student), head, None, None, loss)
            del hidden, known
            meter.phase("student backward")
            total.backward()
            del total
            steps.append(meter.phases)
    for hook in hooks:
        hook.remove()
    for parameter in student.parameters():
        parameter.grad = None
    return steps


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def decoding_pass(model: nn.Module, rows: int, count: int, *, logits: bool) -> Phase:
    """A pass of a decoder over `count` tokens of each row; with logits, or hidden states alone.
    Cached keys and values are not read. Call it with a fake model, in its mode."""
    meter = Meter(model)
    with meter:
        meter.phase("pass")
        hidden = decoder_of(model)(**Shape(rows, 0, count).batch(), use_cache=False)[0]
        if logits:
            model.get_output_embeddings()(hidden)
    return meter.phases["pass"]
