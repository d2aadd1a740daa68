"""Several processes: what FSDP2 keeps in parts is whole where it decodes, and on disk.

A rollout reads every weight once per forward pass. If each pass gathered them, a rollout of 256
tokens would move the model 256 times; so each rank decodes with a whole copy of the student,
filled once per optimizer window, one parameter after the other. The teacher is whole on every
rank, or (`Shards`) in parts between rollouts. Forward passes of a rollout then communicate
nothing, so ranks need not agree about how many rows or tokens they decode.

Checkpoints are those of one process, whoever wrote them: any number of processes resumes them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from switchkd.models import load_model


def check_launch(*, deepspeed: object = None, fsdp: dict | None = None) -> None:
    """Refuse, before anything is loaded, what a run was launched with and cannot work here.

    deepspeed: the configuration in TrainingArguments; fsdp: its arguments for accelerate's plugin.
    `accelerate launch` tells by the environment.
    """

    def launched(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1")

    if deepspeed or launched("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "got DeepSpeed, expected DDP or FSDP2: ZeRO owns the weights and hands them out layer "
            "by layer, rollouts need them whole; examples/accelerate/fsdp2.yaml shards as much"
        )
    if fsdp is None and not launched("ACCELERATE_USE_FSDP"):
        return
    version = int(os.environ.get("FSDP_VERSION", 1) if fsdp is None else fsdp["fsdp_version"])
    if version != 2:
        raise ValueError(
            f"fsdp_version: got {version}, expected 2: FSDP1 flattens the parameters of a layer "
            "into one, so they cannot be gathered one by one for a rollout"
        )
    if launched("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # TrainingArguments sets it, too
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: got true, expected false: with it only the first "
            "process loads models, and the others would decode with a teacher of empty weights"
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if each rank has a part of it: then every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_cpu(value, keep: bool):
    """A tensor, `whole`, on the CPU, or None if it is not to be kept; another value as it is."""
    if not isinstance(value, Tensor):
        return value
    value = whole(value.detach())
    return value.cpu() if keep else None


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank keeps of `like`, if that is in parts."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device_mesh.device_type)  # each rank has it: nothing is sent
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def written(parameter: nn.Parameter) -> tuple | None:
    """What changes when a parameter is written to; None: it is trained, or does not tell.

    All ranks say the same of what they hold in parts, for they gather it together.
    """
    if parameter.requires_grad or parameter.is_inference():
        return None
    return isinstance(parameter, DTensor) or parameter.data_ptr(), parameter._version


@torch.inference_mode(False)  # what is made within could not be updated outside of it
@torch.no_grad()
def decoding_copy(model: nn.Module, dtype: torch.dtype, twin: nn.Module | None = None) -> nn.Module:
    """A copy of `model` with parameters of `dtype`, without the autocast that training wraps it in;
    or twin, an earlier copy, with the present weights: what is trained, or was written to since. A
    model in parts is gathered one parameter after the other, in the type of the copy.

    Buffers keep their type: rotary frequencies in bfloat16 would blur the positions.
    """
    if twin is None:
        twin = copy.deepcopy(model).requires_grad_(False)
        for wrapper in ("forward", "_original_forward"):  # would still call the original model
            twin.__dict__.pop(wrapper, None)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(dtype)
        twin.copied = [written(parameter) for parameter in model.parameters()]
        return twin
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    for i, (mine, current) in enumerate(pairs):
        now = written(current)
        if now is None or now != twin.copied[i]:
            mine.copy_(whole(current.detach().to(mine.dtype)))
        twin.copied[i] = now
    return twin


def quantized(model: nn.Module) -> bool:
    """Whether its weights are in fewer bits: they are more than their numbers, and have a type of
    their own to compute in, so nothing here copies or casts them."""
    return getattr(model, "hf_quantizer", None) is not None


def hold(layer: nn.Module, states: Tensor) -> None:
    """Keep the weights of `layer` whole while a loss uses them outside its forward pass.

    The layer that makes logits is called with one position only. FSDP2 gathers its weights for
    that, and reduces whatever gradient they have when backward has passed the layer; but it does
    not see that backward comes from `states`, the layer's input, and would find them freed by the
    backward pass of another batch.
    """
    if isinstance(layer, FSDPModule):
        layer.unshard()
        if states.requires_grad:
            states.register_hook(lambda _gradient: layer.unshard())


class Shards:
    """The weights of a frozen model, a part on each rank of a machine; whole within `with`.

    They are spread over the ranks of one machine, which have a fast way to each other. Outside of
    `with` the parameters have their shape and hold NaN. `keep`: parameters that stay whole.
    """

    def __init__(self, model: nn.Module, device: torch.device, keep: list[nn.Parameter]):
        size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        self.group, _ = dist.new_subgroups(size)
        rank, self.size = dist.get_rank(self.group), size
        self.parts: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            if any(parameter is kept for kept in keep):
                continue
            flat = parameter.data.reshape(-1)
            length = -(-flat.numel() // size)
            part = flat.new_zeros(length)
            mine = flat[rank * length : (rank + 1) * length]
            part[: len(mine)] = mine
            self.parts.append((parameter, part.to(device)))
            self._drop(*self.parts[-1])
        model.to(device)  # what is left: buffers, and what is kept

    @staticmethod
    def _drop(parameter: nn.Parameter, part: Tensor) -> None:
        """One number on the device, seen in the parameter's shape."""
        parameter.data = part.new_full((), float("nan")).expand(parameter.shape)

    def __enter__(self) -> None:
        for parameter, part in self.parts:
            full = part.new_empty(self.size * len(part))
            dist.all_gather_into_tensor(
                full.view(torch.uint8), part.view(torch.uint8), group=self.group
            )
            parameter.data = full[: parameter.numel()].view(parameter.shape)

    def __exit__(self, *_error) -> None:
        for parameter, part in self.parts:
            self._drop(parameter, part)


def with_whole_weights(method):
    """A trainer's method that decodes: called on all ranks at once, with the weights gathered."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with self.whole_weights():
            return method(self, *args, **kwargs)

    return wrapper


class ShardedTrainer(Trainer):
    """`transformers.Trainer` under FSDP2 with gathered weights and checkpoints of whole tensors.

    Without FSDP2 it does what its base does.
    """

    teacher_shards: Shards | None = None
    _decoding_copy: nn.Module | None = None
    _engine = None
    _missing = False  # whether Trainer has not found all weights in the checkpoint loaded last

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state, asked = self.accelerator.state, os.environ.get("ACCELERATE_USE_FSDP", "false")
        if asked.lower() == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate has FSDP on accelerators only; PyTorch has it on CPUs, too.
            given = self.args.fsdp_plugin_args or {}
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**given)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            # Else the gradients of a window stay whole on every rank: 4 bytes for each parameter.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if self.is_fsdp_enabled and state.fsdp_plugin.mixed_precision_policy is not None:
            # Accelerate would add up gradients in the low precision.
            dtype = state.fsdp_plugin.mixed_precision_policy.param_dtype
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy

    def place(self, teacher: nn.Module | None, student: nn.Module) -> nn.Module | None:
        """The teacher, frozen, where it decodes; a student that will be in parts gets a copy."""
        device, args = self.args.device, self.args
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.activation_checkpointing and hasattr(student, "peft_config"):
                raise ValueError(
                    "fsdp_activation_checkpointing: got true with an adapter, which peft would not "
                    "find in the wrapped layers when it saves; expected --gradient_checkpointing"
                )
            if quantized(student):
                raise ValueError("student: got quantised weights with FSDP, expected one of them")
            dtype = args.decoding_dtype() or next(student.parameters()).dtype
            self._decoding_copy = decoding_copy(student, dtype).to(device)
        if teacher is None:
            return None
        teacher.eval().requires_grad_(False)
        if args.shard_teacher and quantized(teacher):
            raise ValueError(
                "shard_teacher: got a quantised teacher, expected one of the two; a quantised "
                "teacher is the smaller one"
            )
        if args.shard_teacher and args.world_size > 1:
            head = list(teacher.get_output_embeddings().parameters())
            self.teacher_shards = Shards(teacher, device, keep=head)
        elif not hasattr(teacher, "hf_device_map"):  # else it was loaded where it belongs
            teacher.to(device)
        return teacher

    @contextlib.contextmanager
    def whole_weights(self):
        """Whole weights to decode with; every rank enters, whether it will decode or not."""
        if self.is_fsdp_enabled:
            decoding_copy(self.model, None, self._decoding_copy)
        with self.teacher_shards or contextlib.nullcontext():
            yield
        if self.teacher_shards is not None and self._engine is not None:
            self._engine.release()  # its graphs read memory that the teacher has given back

    def _student_for_decoding(self) -> nn.Module:
        """The student itself, or its copy in `rollout_dtype`, refreshed.

        Decoding float32 weights under autocast would cast every weight again for every token.
        """
        if self.is_fsdp_enabled:
            return self._decoding_copy  # refreshed by `whole_weights`, on all ranks at once
        student, dtype = self.accelerator.unwrap_model(self.model), self.args.decoding_dtype()
        if dtype is None or dtype == next(student.parameters()).dtype or quantized(student):
            return student
        self._decoding_copy = decoding_copy(student, dtype, self._decoding_copy)
        return self._decoding_copy

    # ------------------------------------------------------------------ checkpoints

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=whole_state(self.model, self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state, keep = self.optimizer.state_dict(), self.args.should_save
        state["state"] = {
            index: {name: on_cpu(value, keep) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        if keep:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.is_fsdp_enabled or self._missing:
            load_whole(self.model, resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        """A tied head is not in the checkpoint; what else is missing must not begin anew."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [k for k in load_result.missing_keys if k not in tied]
        known = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        self._missing = bool(set(load_result.missing_keys) - known)
        if not self._missing:
            super()._issue_warnings_after_load(load_result)

    def _load_best_model(self):
        if not self.is_fsdp_enabled:
            super()._load_best_model()
        if self.is_fsdp_enabled or self._missing:
            load_whole(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        options = dict(map_location="cpu", weights_only=True)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, **options)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = part_of(value, parameters[index])
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, **options))


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """What a checkpoint holds of a model in parts, on the CPU: an adapter alone where there is one.

    Every rank must call it; those that do not `keep` the tensors get none.
    """
    adapter, state, seen = hasattr(model, "peft_config"), {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        if adapter and not value.requires_grad:
            continue
        if id(value) not in seen:  # tied weights stay tied
            seen[id(value)] = on_cpu(value, keep)
        state[name] = seen[id(value)]
    return state if keep else {}


@torch.no_grad()
def load_whole(model: nn.Module, folder: str | Path) -> None:
    """Fill a model, in parts or whole, from the safetensors of a checkpoint; each rank reads its
    parts.

    Raises ValueError for a tensor that is missing, or of another shape.
    """
    adapter, state, read = hasattr(model, "peft_config"), model.state_dict(keep_vars=True), set()
    wanted = {name: value for name, value in state.items() if value.requires_grad or not adapter}
    if adapter:  # files leave the adapter's name out
        wanted = {name.replace(f".{model.active_adapter}", ""): v for name, v in wanted.items()}

    def fill(name: str, value: Tensor) -> None:
        target = wanted[name]
        if value.shape != target.shape:
            raise ValueError(
                f"checkpoint {folder}: got {name} of shape {tuple(value.shape)}, expected "
                f"{tuple(target.shape)}"
            )
        target.copy_(part_of(value, target))
        read.add(id(target))

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                fill(name, tensors.get_tensor(name))
    missing = [name for name, value in wanted.items() if id(value) not in read]
    if missing and not adapter:  # experts are one tensor in memory, and each by itself in files
        dtype = str(wanted[missing[0]].dtype).removeprefix("torch.")
        converted, info = load_model(str(folder), dtype=dtype, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        for name, value in converted.state_dict().items():
            if name in wanted:
                fill(name, value)
    if missing:
        raise ValueError(f"checkpoint {folder}: got no {missing[0]}, expected all weights")
