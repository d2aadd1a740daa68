"""The benchmarks run and write rows of the promised form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_rollout_speed_quick(tmp_path):
    out = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/rollout_speed.py", "--quick", "--json", out],
        check=True, cwd=ROOT,
    )  # fmt: skip
    rows = json.loads(out.read_text())
    decoders = [row["decoder"] for row in rows]
    assert decoders == ["naive", "naive, no cache", "hf student", "hf teacher"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["speedup_vs_naive"] > 0 and row["commit"]
    assert rows[0]["equal_tokens"] == 1 and 0 < rows[0]["teacher_share"] < 1
    assert rows[1]["equal_tokens"] > 0.5  # the same rollout up to rounding
