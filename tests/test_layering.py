"""The kernels stand alone: nothing but torch, and none of the rest of the project. What needs no
model does not wait for what loads one."""

import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
SCRIPT = """
import sys
for name in ("switchkd", "transformers", "triton", "datasets", "accelerate"):
    sys.modules[name] = None  # any import of it now fails
import switchkd_kernels, torch
for name in switchkd_kernels.__all__:
    assert callable(getattr(switchkd_kernels, name)), name
z = torch.randn(2, 5)
got = switchkd_kernels.switch_select(z, z, 0.5, seed=0, sequence_ids=[0, 1], positions=0)
assert got.from_teacher.tolist() == [False, False]
assert float(switchkd_kernels.linear_divergence_loss(z, z, z, z)) == 0.0
"""


def test_kernels_import_and_run_without_the_rest():
    command = [sys.executable, "-c", SCRIPT]
    path = {"PYTHONPATH": str(KERNELS), "PATH": ""}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["switchkd", "switchkd.__main__", "switchkd.report.__main__"])
def test_what_needs_no_model_does_not_wait_for_torch(module):
    script = f"import sys, {module}\nassert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_logging_is_the_programs_own():
    """Of two calls of basicConfig the second does nothing, and that would be the user's."""
    script = "import logging, switchkd.metrics\nassert not logging.root.handlers"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
