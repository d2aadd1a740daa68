"""What is installed: a wheel that works outside the repository, and few rooms inside it."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in isolation: no torch in the build environment, nothing compiled."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", out, source], check=True
    )
    return next(out.glob("*.whl"))


def test_the_wheel_is_pure_and_carries_both_packages_and_the_teacher(wheel):
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "switchkd/train.py",
        "switchkd_kernels/reference.py",
        "switchkd/embedded/demo.yaml",
        "switchkd/embedded/teacher/model.safetensors",
        "switchkd/embedded/data/train.jsonl",
        "switchkd/embedded/NOTICE.md",
        "switchkd/report/page.html",
        "switchkd_kernels/csrc/ops.cpp",
        "switchkd_kernels/csrc/rowwise.h",
        "switchkd_kernels/csrc/cpu/kernels.cpp",
    ):
        assert name in names
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "benchmarks/"))]


def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    parents = [p for p in sys.path if p.endswith("site-packages")]
    script = (
        "import sys\n"
        f"sys.path += {parents!r}\n"  # torch and the rest, after this environment's own packages
        "import switchkd, switchkd_kernels, switchkd.train, switchkd.evaluate\n"
        "from switchkd.models import load_model, load_tokenizer\n"
        "model = load_model('embedded')\n"
        "ids = load_tokenizer('embedded')('Hello', return_tensors='pt')['input_ids']\n"
        "print(switchkd.__file__, switchkd_kernels.__file__, model(ids).logits.shape[-1])\n"
    )
    out = subprocess.run(
        [python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second, width = out.stdout.split()
    assert str(tmp_path / "env") in first and str(tmp_path / "env") in second
    assert int(width) >= 256


def test_the_embedded_teacher_is_small():
    weights = ROOT / "switchkd/embedded/teacher/model.safetensors"
    assert weights.stat().st_size <= 8_000_000


def test_no_file_is_a_maze():
    for folder in ("switchkd", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines, expected <= 400"
