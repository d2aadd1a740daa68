"""The CUDA kernel of switch_select: whether it can run, and its launcher.

Its library is built on the first call that asks for it (`_native.built_for`), for the GPU at hand.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from switchkd_kernels import _native
from switchkd_kernels.noise import STREAM_REDRAW, STREAM_TOKEN

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REMEDY = "install the CUDA toolkit's nvcc, or name it in NVCC; or use impl 'triton'"


@functools.cache
def _unavailable(major: int, minor: int) -> str | None:
    """Why GPUs of a compute capability cannot be used; None once their library is loaded."""
    if reason := _native.unavailable():  # it has the schema of the op
        return reason
    target = f"{major}{minor}" + "a" * (major == 9)
    try:
        path = _native.built_for(target)
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            raise _native.BuildError(
                f"{path} cannot be used: {str(error).splitlines()[0]}"
            ) from error
    except _native.BuildError as error:
        return f"{error}; {REMEDY}"
    return None


@torch.compiler.assume_constant_result
def _gpu_refuses(index: int | None) -> str | None:
    """As torch.compile sees it: a fact of the machine, and nothing to trace."""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU; use impl 'triton' or 'cpu'"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        major, minor = capability
        return f"it needs compute capability 8.0, GPU {index} has {major}.{minor}"
    return _unavailable(*capability)


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the CUDA kernel cannot take these tensors; None if it can. May compile it."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype not in DTYPES:
            return f"its kernel takes float32, float16 and bfloat16, got {tensor.dtype}"
        if tensor.device.type != "cuda" or torch.version.hip:
            kind = "an AMD GPU" if tensor.device.type == "cuda" else tensor.device
            return f"it needs an NVIDIA GPU, the tensors are on {kind}; use impl 'triton'"
    return _gpu_refuses(given[0].device.index if given else None)


def switch_select(
    teacher, student, threshold, ids, positions, teacher_token, student_token,
    seed, teacher_temperature, student_temperature, metric, bits, vocab_size,
    cluster=0, splits=0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Arguments as the Triton launcher takes them. cluster: blocks for a pair of rows, 1, 2, 4 or
    8; splits: blocks for a pair that is streamed; both 0: as csrc/cuda/plan.h has it."""
    stream, on = 0, contextlib.nullcontext()  # emulated
    if teacher.is_cuda:
        stream = torch.cuda.current_stream(teacher.device).cuda_stream
        on = torch.cuda.device(teacher.device)
    with on:
        token, writer, values = torch.ops.switchkd_native.cuda_switch_select(
            teacher, student, threshold, ids, positions, teacher_token, student_token,
            seed, teacher_temperature, student_temperature,
            STREAM_REDRAW if metric == "rank" else STREAM_TOKEN, STREAM_TOKEN,
            metric, bits, vocab_size, stream, cluster, splits,
        )  # fmt: skip
    return token, writer, *values
