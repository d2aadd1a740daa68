"""The doctor's report, and that it sees an op that computes wrongly."""

import dataclasses
import json
import math

import pytest
import switchkd_kernels as kernels
import torch
from switchkd_kernels import _backend as backend
from switchkd_kernels import _native

from switchkd import doctor
from switchkd.devices import find_device

CPU = torch.device("cpu")
USABLE = ["reference", *["cpu"] * (_native.unavailable() is None)]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """As for a user: the tests of the kernels run Triton's interpreter, which is slow."""
    monkeypatch.setattr(backend, "interpreting", lambda: False)


def examine(*arguments):
    return doctor.main(["--device", "cpu", *arguments])


def test_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert examine("--json", str(path)) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["ok"] is True and out.endswith("all well")
    assert report["versions"]["torch"] == torch.__version__ and torch.__version__ in out
    assert set(report["versions"]) == {"python", *doctor.PACKAGES}
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["gib"] > 0

    assert report["backends"]["reference"] == "yes"
    assert report["backends"]["triton"].startswith("no: ")
    assert "TRITON_INTERPRET=1 was not set" in out or "cannot be imported" in out

    checked = [(check["op"], check["backend"]) for check in report["checks"]]
    assert checked == [(op, impl) for op in doctor.CHECKS for impl in USABLE]
    for check in report["checks"]:
        assert check["ok"] and check["error"] is None
        draws = check["op"] in ("switch_select", "sample")
        assert check["tokens_equal"] is (True if draws else None)
        assert check["op"] == "sample" or 0 < check["max_error"] < 1e-3
    assert set(report["speed"]["share"]) == {"switch_select", "divergence_loss"}
    assert all(0 < share < math.inf for share in report["speed"]["share"].values())
    assert report["speed"]["copy_gbps"] > 0 and "GB/s" in out


def test_a_device_that_is_not_here_is_refused(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--device", "cuda:99"])
    assert "device must be one of cpu" in capsys.readouterr().err
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def broken(op):
    right = getattr(kernels, op)

    def wrong(*args, **options):
        out = right(*args, **options)
        if op == "switch_select":
            return out._replace(from_teacher=~out.from_teacher)
        return (out + 1) % 300 if op == "sample" else 1.01 * out

    return wrong


@pytest.mark.parametrize("op", doctor.CHECKS)
def test_a_wrong_op_fails(op, monkeypatch, capsys):
    monkeypatch.setattr(kernels, op, broken(op))
    monkeypatch.setattr(doctor, "speed", lambda device: {
        "copy_gbps": 1.0, "backend": "", "shape": "", "share": {},
    })  # fmt: skip
    assert examine() == 1
    out = capsys.readouterr().out
    failed = len(USABLE)
    assert f"{failed} of {5 * failed} checks failed" in out
    assert [op in line for line in out.splitlines() if "FAIL" in line] == [True] * failed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_no_number_fails(value, monkeypatch):
    right = kernels.jsd
    monkeypatch.setattr(kernels, "jsd", lambda *args, **options: right(*args, **options) * value)
    checks = {check.op: check for check in doctor.run_checks(CPU, ["reference"])}
    assert not checks.pop("jsd").ok
    assert all(check.ok for check in checks.values())


def test_an_op_that_raises_fails_and_the_others_go_on(monkeypatch, capsys):
    def refuses(*args, **options):
        raise RuntimeError("no [such] kernel")

    monkeypatch.setattr(kernels, "sample", refuses)
    checks = list(doctor.run_checks(CPU, ["reference"]))
    assert [check.ok for check in checks] == [check.op != "sample" for check in checks]
    doctor.show(
        {
            "device": "cpu", "versions": {}, "devices": [], "backends": {},
            "checks": [dataclasses.asdict(check) for check in checks],
            "speed": {"copy_gbps": 1.0, "backend": "", "shape": "", "share": {}},
        },
        doctor.Console(),
    )  # fmt: skip
    assert "sample, reference, float32: RuntimeError: no [such] kernel" in capsys.readouterr().out


def test_the_rows_that_are_compared_are_the_hard_ones():
    teacher, student = doctor.make_logits(CPU, torch.float64)
    assert teacher.shape != student.shape
    for rows in (teacher, student):
        assert rows[:, doctor.VOCAB :].isnan().all() and not rows[:, : doctor.VOCAB].isnan().any()
    bits = kernels.jsd(teacher, student, vocab_size=doctor.VOCAB)
    assert (teacher == -math.inf).any(1).tolist() == [False, False, True, True, False, False]
    assert bits[:4].min() > 0.1 and 1e-8 < bits[4:].min() <= bits[4:].max() < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, at -inf - -inf
def test_triton_is_usable_in_its_interpreter(monkeypatch):
    monkeypatch.undo()
    if not backend.interpreting():
        pytest.skip("Triton's interpreter is off")
    found = doctor.backends(CPU)
    assert found["reference"] == "yes" and found["triton"] == "interpreter: right and slow"
    monkeypatch.setattr(doctor, "CHECKS", {"jsd": doctor.check_jsd})
    (check,) = doctor.run_checks(CPU, ["triton"])
    assert check.ok and 0 < check.max_error < 1e-4
