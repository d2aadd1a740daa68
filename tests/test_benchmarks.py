"""benchmarks/rollout_speed.py runs as a file, without a pair being named."""

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
        [sys.executable, ROOT / "benchmarks/rollout_speed.py", "--quick", "--device", "cpu",
         "--json", out],
        check=True, cwd=ROOT,
    )  # fmt: skip
    rows = {row["decoder"]: row for row in json.loads(out.read_text())}
    assert {row["pair"] for row in rows.values()} == {"embedded"}
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and row["speedup_vs_naive"] > 0 and row["commit"]
    assert rows["naive"]["equal_tokens"] == 1 and 0 < rows["naive"]["teacher_share"] < 1
    for name in ("naive, no cache", "block k=4 student", "block"):
        assert rows[name]["equal_tokens"] > 0.5  # the same rollout up to rounding
