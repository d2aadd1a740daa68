"""benchmarks/architectures.py on a few of them: what is served, what is not, and what is wrong."""

import csv

import pytest

from benchmarks import architectures
from switchkd import models


def table(tmp_path, *names):
    path = tmp_path / "rows.csv"
    assert architectures.main(["--csv", str(path), "--only", *names]) == 0
    with path.open(encoding="utf-8") as file:
        return {row["model_type"]: row for row in csv.DictReader(file)}


def test_what_is_served_and_what_is_not(tmp_path):
    rows = table(
        tmp_path, "gpt2", "gpt_bigcode", "cohere", "gemma3", "llama4_text", "bloom", "bert"
    )
    served = [name for name, row in rows.items() if row["decoder"] == "block"]
    assert served == ["cohere", "gemma3", "gpt2", "gpt_bigcode", "llama4_text"]
    assert all(rows[name]["equal"] == "True" for name in served)
    assert rows["bloom"]["decoder"] == "naive" and "ALiBi" in rows["bloom"]["why"]
    assert rows["bert"]["decoder"] == "" and "output without cache" in rows["bert"]["why"]
    for row in rows.values():
        if row["decoder"]:
            assert float(row["logprob"]) < 1e-6 and row["dtype"] == "float64"
            assert float(row["loss"]) < 1e-9 and float(row["gradient"]) < 1e-6


def test_a_head_that_is_not_understood_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FACTORS", ())  # Cohere has one
    row = table(tmp_path, "cohere")["cohere"]
    assert row["decoder"] == "naive" and "other logits of its hidden states" in row["why"]
    assert float(row["logprob"]) < 1e-6 and float(row["loss"]) > 0.1


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        architectures.main(["--only", "gpt5"])
    assert "only: got gpt5, expected model types" in capsys.readouterr().err
