"""Names and choice of the devices of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU if there is one; ValueError if it is not here."""
    gpus = torch.cuda.device_count()
    here = ["cpu", *["cuda"] * (gpus > 0), *(f"cuda:{i}" for i in range(gpus))]
    name = name or here[min(1, len(here) - 1)]
    if name not in here:
        raise ValueError(f"device must be one of {', '.join(here)}, got {name!r}")
    return torch.device(name)
