"""benchmarks/history_drafts.py on a few rows: epochs as promised, the same tokens with history."""

import json

import pytest

from benchmarks import history_drafts

SMALL = ["--rows", "8", "--epochs", "2", "--batch", "4", "--max_new_tokens", "48"]


@pytest.mark.slow
def test_a_row_for_each_epoch_and_arm(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert history_drafts.main([*SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["arm"], row["epoch"]) for row in rows] == [
        (arm, epoch) for arm in history_drafts.ARMS for epoch in (1, 2)
    ]
    for row in rows:
        assert 1 <= row["tokens_per_round"] <= 48 and row["tokens_per_second"] > 0
    assert "history: the same" in capsys.readouterr().out


def test_other_tokens_are_an_error(monkeypatch):
    one = ([dict.fromkeys(history_drafts.MEASURES, 1.0)], [(1, 1, [2])])
    other = (one[0], [(1, 1, [3])])
    parts = iter([one, one, other])
    monkeypatch.setattr(history_drafts, "train", lambda *_: next(parts))
    assert history_drafts.main(["--epochs", "1"]) == 1
