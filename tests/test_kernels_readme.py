"""The code in kernels/README.md runs as it stands, in loops that know nothing of this project."""

import re
from pathlib import Path

import torch
from conftest import VOCAB, tiny_model
from switchkd_kernels import divergence_loss

README = (Path(__file__).resolve().parents[1] / "kernels" / "README.md").read_text()
LOSS, SELECT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_in_a_foreign_training_loop():
    teacher, student = tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=1)
    ids, mask = torch.randint(2, VOCAB, (2, 9)), torch.arange(9).expand(2, 9) > 3
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    given = {"torch": torch, "teacher": teacher, "student": student, "ids": ids, "mask": mask}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        exec(LOSS, given)
        losses.append(float(given["loss"].detach()))
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > 0
    assert len(LOSS.strip().splitlines()) <= 9  # an import, a blank line, and the use

    with torch.no_grad():
        want = divergence_loss(teacher(ids).logits, student(ids).logits, mask=mask)
        exec(LOSS.replace("loss.backward()", ""), given)
    torch.testing.assert_close(given["loss"], want)


def test_the_selection_in_a_foreign_decoding_loop():
    teacher_logits, student_logits = torch.randn(4, 30), torch.randn(4, 30)
    given = {"teacher_logits": teacher_logits, "student_logits": student_logits}
    for threshold, teacher_writes in ((1.0, False), (0.0, True)):
        out = given | {"threshold": threshold, "rows": torch.arange(4), "step": 0}
        exec(SELECT, out)
        assert out["written_by_teacher"].tolist() == [teacher_writes] * 4
        assert out["next_ids"].shape == (4,)
