"""Which implementation runs an op, and why another cannot."""

import contextlib
import functools

import torch
from torch import Tensor

from switchkd_kernels import _checks as check
from switchkd_kernels import _cuda, _native, _tl

IMPLS = ("reference", "triton", "cpu", "cuda")
MOST_SPLITS = 128  # programs a row


def triton_refuses(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors; None if they can."""
    if _tl.UNAVAILABLE:
        return _tl.UNAVAILABLE
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its kernels take float32, float16 and bfloat16, got {tensor.dtype}"
        if tensor.device.type == "cpu" and not interpreting():
            return "the tensors are on a CPU, and TRITON_INTERPRET=1 was not set at import"
        if tensor.device.type not in ("cpu", "cuda", "xpu"):
            return f"the tensors are on {tensor.device}"
    return None


@torch.compiler.assume_constant_result
def _native_refuses() -> str | None:
    """As torch.compile sees it: a fact of the machine, and nothing to trace."""
    return _native.unavailable()


def cpu_refuses(*tensors: Tensor | None) -> str | None:
    """Why the native CPU kernels cannot take these tensors; None if they can. May compile them."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"its kernels take float32 and bfloat16, got {tensor.dtype}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
    return _native_refuses()


def refuses(impl: str, *tensors: Tensor | None) -> str | None:
    """Why an implementation other than the reference cannot take these tensors; None if it can."""
    which = {"triton": triton_refuses, "cpu": cpu_refuses, "cuda": _cuda.refuses}
    return which[impl](*tensors)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they were defined."""
    return not _tl.UNAVAILABLE and type(_tl.log1p).__name__ == "InterpretedFunction"


def choose(impl: str | None, *tensors: Tensor | None, cuda: bool = False) -> str:
    """The implementation for these tensors: the one asked for, or the fastest that can run.

    cuda: whether the op has a kernel in CUDA C++, which runs only where it is asked for.
    Raises ValueError for tensors on several devices, TypeError for one that is not floating point,
    RuntimeError for an explicit choice that cannot run, with the reason.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    check.compute_dtype(*given)
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(map(str, devices))}")
    check.one_of("impl", impl, (None, *IMPLS))
    if impl == "reference":
        return impl
    if impl is None:
        fastest = "cpu" if any(device.type == "cpu" for device in devices) else "triton"
        return "reference" if refuses(fastest, *tensors) else fastest
    if impl == "cuda" and not cuda:
        raise RuntimeError("impl 'cuda' cannot run: only switch_select has it; use impl 'triton'")
    if reason := refuses(impl, *tensors):
        raise RuntimeError(f"impl {impl!r} cannot run: {reason}")
    return impl


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel the device runs side by side, at the least."""
    if device.type == "cpu":  # the interpreter
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 64)


def splits(rows: int, vocab_size: int, block: int, programs: int, device: torch.device) -> int:
    """Programs a row: enough for `programs` on every multiprocessor, at most one a block."""
    wanted = programs * multiprocessors(device) // max(rows, 1)
    return max(1, min(wanted, -(-vocab_size // block), MOST_SPLITS))


def slices(vocab_size: int, block: int, splits: int) -> tuple[int, int]:
    """(columns, number) of slices of a row: whole blocks, at most `splits` slices, none empty."""
    size = -(-vocab_size // (block * splits)) * block
    return size, -(-vocab_size // size)


def on(device: torch.device):
    """Makes `device` the current one for a launch, which Triton does not do by itself."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def layout(vocab_size: int, block: int, *logits: Tensor) -> dict:
    """How kernels read blocks of rows of logits. ROWS: "aligned" where all begin at multiples of 16
    entries (as Triton sees it), so that a thread loads 16 bytes in one piece, "even" where none
    ends within a piece either, else "ragged". GROUP: the neighbouring logits that a thread has."""
    if any(z.data_ptr() % 16 or z.stride(0) % 16 for z in logits):
        return {"GROUP": min(block, 4), "ROWS": "ragged"}
    group = min(block, 16 // max(z.element_size() for z in logits))
    even = vocab_size % 16 == 0 and block >= 16
    return {"GROUP": group, "ROWS": "even" if even else "aligned"}


def options(warps: int, device: torch.device, registers: int | None = None) -> dict:
    """Launch options: the number of warps, and the most registers a thread may take.

    AMD's warps are twice as wide, so half as many: a thread then still has 16 bytes to load in one
    piece. Only NVIDIA's compiler knows a cap. A product and a sum become one instruction, which
    Triton after 3.9 only does where it is asked to.
    """
    found = {"num_warps": max(1, warps // 2) if torch.version.hip else warps}
    found["enable_fp_fusion"] = True
    if registers and not torch.version.hip and device.type != "xpu":
        found["maxnreg"] = registers
    return found
