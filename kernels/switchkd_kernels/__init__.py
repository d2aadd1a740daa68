"""Kernels for distilling one language model into another.

They need torch, and for speed Triton (GPU) or a C++ compiler (CPU). Teacher first, everywhere.
`reference` holds the definitions.
"""

from switchkd_kernels._checks import InvalidLogits
from switchkd_kernels.divergence_loss import divergence_loss, jsd
from switchkd_kernels.few_row_linear import few_row_linear
from switchkd_kernels.linear_divergence_loss import linear_divergence_loss
from switchkd_kernels.noise import uniform
from switchkd_kernels.reference import SwitchSelection
from switchkd_kernels.sample import sample
from switchkd_kernels.switch_select import switch_select

__all__ = [
    "InvalidLogits",
    "SwitchSelection",
    "divergence_loss",
    "few_row_linear",
    "jsd",
    "linear_divergence_loss",
    "sample",
    "switch_select",
    "uniform",
]
