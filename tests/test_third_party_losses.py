"""Other projects' formulas as oracles; skipped where the package is not installed."""

import pytest
import torch
from switchkd_kernels import divergence_loss


def test_agrees_with_trl():
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl not installed")
    theirs = module.GKDTrainer.generalized_jsd_loss
    teacher = torch.randn(3, 4, 30, dtype=torch.float64)
    student = torch.randn(3, 4, 30, dtype=torch.float64, requires_grad=True)
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        ours = divergence_loss(teacher, student, kind="generalized_jsd", beta=beta, reduction="sum")
        other = theirs(student, teacher, beta=beta, reduction="sum")
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=0)
        grads = [torch.autograd.grad(x, student)[0] for x in (ours, other)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "name", "beta"),
    [
        ("skew_reverse_kl", "skew_reverse", 0.1),
        ("skew_kl", "skew_forward", 0.9),
        ("kl_teacher_student", "forward", None),
        ("kl_student_teacher", "reverse", None),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agrees_with_orda_kernel(kind, name, beta, temperature):
    """Its teacher weight is 1 - kl_beta, and a temperature T multiplies its rows by T^2."""
    orda = pytest.importorskip("orda_kernel", reason="orda-kernel not installed")
    teacher = torch.randn(5, 12)
    student = torch.randn(5, 12, requires_grad=True)
    theirs = orda.distillation_loss(
        student, torch.eye(12), torch.zeros(5, dtype=torch.int64),
        orda.SeparateTeacher(teacher, torch.eye(12)),
        student_ce_weight=0.0, kl_weight=1.0, kl_temperature=temperature, kl_divergence=name,
        kl_beta=beta, reduction="sum", backend="torch",
    ).loss  # fmt: skip
    ours = temperature**2 * divergence_loss(
        teacher / temperature, student / temperature, kind=kind, alpha=0.1, reduction="sum"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
