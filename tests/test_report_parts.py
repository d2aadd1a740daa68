"""The parts of the report: counts in bounded memory, choice of samples, text of tokens, charts."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import SWITCHED, Page, ids, record, write_run

from switchkd.report.__main__ import make
from switchkd.report.figures import thin
from switchkd.report.rollouts import METRICS, Rollouts, read_rollouts
from switchkd.report.samples import HALF, choose, pieces, visible
from switchkd.report.svg import Chart, linear_ticks, log_ticks


def test_aggregates_of_a_run_written_by_hand(tmp_path):
    folder = write_run(tmp_path / "run", SWITCHED)
    got = read_rollouts(folder / "completions.jsonl", METRICS["switch"])
    assert (got.tokens, got.teacher_tokens, got.compared, got.length) == (7, 3, 6, 4)
    assert got.shares() == [(1, 2 / 3), (4, 1 / 4)]
    b = got.buckets()
    assert b.start.tolist() == [0, 1, 2, 3] and b.stop.tolist() == [1, 2, 3, 4]
    assert b.tokens.tolist() == [2, 2, 2, 1]
    assert b.share.tolist() == [0, 0.5, 1, 0]
    np.testing.assert_allclose(b.tau, [1, 0.5, 0.25, 0.125], rtol=1e-9)
    width = 10 ** (1 / 50)  # a bin: what a quantile may be off by
    assert 0.5 / width < b.quantiles[0, 1] < 0.5 * width
    assert 1e-8 / width < b.quantiles[2, 0] < 1e-8 * width and b.quantiles[2, 2] > 0.8
    assert np.isnan(b.quantiles[3]).all()
    bars = {(low, high): (s, t) for low, high, s, t in got.histogram() if s + t}
    assert sum(s for s, _ in bars.values()) == 3 and sum(t for _, t in bars.values()) == 3
    assert all(
        low <= value < high or value == 1.0
        for (low, high), value in zip(bars, [1e-8, 0.25, 0.5, 1.0], strict=True)
    )
    wide = got.buckets(most=2)
    assert wide.share.tolist() == [0.25, 2 / 3] and wide.stop.tolist() == [2, 4]
    np.testing.assert_allclose(wide.tau[0], math.sqrt(0.5))


def test_a_completion_that_was_replayed_is_counted_once(tmp_path):
    nothing = dict.fromkeys(("teacher_logprob", "student_logprob"), [None] * 3)
    replayed = record(5, 0, [0, 1, 1], [None] * 3, [None] * 3, replay_of=1, **nothing)
    folder = write_run(tmp_path / "run", [*SWITCHED, replayed, {**replayed, "step": 6}])
    got = read_rollouts(folder / "completions.jsonl", METRICS["switch"])
    assert (got.tokens, got.teacher_tokens, got.compared, got.replayed) == (7, 3, 6, 2)
    assert got.shares() == [(1, 2 / 3), (4, 1 / 4)] and got.buckets().tokens[0] == 2
    assert choose(got) == ([0], [1])
    body = Page(make(folder).read_text(encoding="utf-8")).body()
    assert "rollout tokens 7" in body and "steps 6" in body
    assert "replayed completions 2, not counted again" in body
    assert "14.3 % of the tokens were written without a comparison" in body


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=60), st.sampled_from([0.1, 0.5, 0.9]))
def test_quantiles_are_within_a_bin(values, q):
    got = Rollouts(METRICS["switch"])
    n = len(values)
    got.add(record(1, 0, [0] * n, values, [None] * n), 0)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    (found,) = got.quantiles(got.by_writer.sum(0), at=(q,))
    assert exact / 1.048 <= found <= exact * 1.048


def test_ranks_are_counted_from_one_and_stay_whole():
    got = Rollouts(METRICS["skd"])
    got.add(record(1, 0, [0, 1, 0], [0, 25, 4], [24.0] * 3), 0)
    assert got.histogram()[0] == (1.0, 2.0, 1, 0)
    assert got.quantiles(got.by_writer.sum(0)) == [1, 5, 26]
    np.testing.assert_allclose(got.buckets().tau, 25)


def test_early_and_late_completions_of_the_same_prompt_stand_side_by_side():
    got = Rollouts(METRICS["switch"])
    for step in range(1, 31):
        for row in range(4):
            same = row == 0 and step in (2, 3, 15, 28, 29)
            got.add(record(step, 1000 if same else 10 * step + row, [0], [0.1], [1.0]), 0)
    early, late = choose(got, most=6)
    assert len(early) == len(late) == len(set(early) | set(late)) / 2 == 6
    pairs = [[(got.steps[i], got.rows[i]) for i in part] for part in (early, late)]
    assert (2, 1000) in pairs[0] and (29, 1000) in pairs[1]
    assert max(s for s, _ in pairs[0]) <= 11 and min(s for s, _ in pairs[1]) >= 20
    assert pairs[0] == sorted(pairs[0]) and pairs[0][0][0] == 1 and pairs[1][-1][0] == 30
    one = Rollouts(METRICS["switch"])
    one.add(record(3, 0, [0], [0.1], [1.0]), 0)
    assert choose(one) == ([0], []) and choose(Rollouts(METRICS["switch"])) == ([], [])


def test_pieces_join_to_the_text_whatever_the_split():
    tokenizer = byte_tokenizer()
    text = "naïve – 漢字 🙂\n"
    got = pieces(tokenizer, ids(text, tokenizer))
    assert len(got) == len(text.encode())
    assert "".join(got).replace(HALF, "") == text
    broken = [ids("é", tokenizer)[1]] * 9  # bytes that end characters and begin none
    assert "".join(pieces(tokenizer, broken)).replace(HALF, "") == "\ufffd" * 9
    assert pieces(None, [7, 8]) == ["[7]", "[8]"]
    assert visible("a\n\r\x7f b\u00a0c") == "a\n␍⟨U+007F⟩ b\u00a0c"


def test_a_large_file_is_streamed(tmp_path):
    n, path = 200, tmp_path / "completions.jsonl"
    line = json.dumps(record(1, 0, [0, 1] * (n // 2), [0.25] * n, [0.5] * n, text="x" * 40_000))
    with path.open("w") as file:
        for _ in range(250):
            file.write(line + "\n")
    size, seen = path.stat().st_size, []
    tracemalloc.start()
    got = read_rollouts(path, METRICS["switch"], seen.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (got.tokens, got.teacher_tokens) == (250 * n, 125 * n)
    assert sum(seen) == size > 10_000_000 and peak < size / 4
    with path.open("rb") as file:
        file.seek(got.offsets[177])
        assert json.loads(file.readline())["row"] == 0


def test_what_cannot_be_read_is_counted_or_named(tmp_path):
    path = tmp_path / "completions.jsonl"
    good = record(1, 0, [0], [0.25], [0.5])
    path.write_text("\n".join([json.dumps(good), "[" * 100_000, "1" * 5000, "\0" * 9]))
    assert read_rollouts(path, METRICS["switch"]).broken == 3
    path.write_text(json.dumps(good | {"row": 2**70}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: expected a rollout .*OverflowError"):
        read_rollouts(path, METRICS["switch"])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_and_inside(low, span):
    ticks = linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)


def test_charts_clip_break_and_scale():
    assert log_ticks(1e-8, 1.0) == [1e-8, 1e-6, 1e-4, 1e-2, 1.0]
    labels = Chart(
        (0.3, 0.6), (1e-8, 1.0), x_label="", y_label="", label="", log_x=True, log_y=True
    )
    assert ">10⁻⁸</text>" in labels.svg() and ">0.01</text>" in labels.svg()
    assert ">0.4</text>" in labels.svg()  # less than two decades: round numbers between them
    chart = Chart((0, 10), (1e-4, 1.0), x_label="x", y_label="y", label='a "<b>', log_y=True)
    chart.line([(0, 1.0), (5, float("nan")), (10, 1e-4)], "ink")
    chart.band([(0, 0.1, 1.0), (5, float("nan"), 1.0), (10, 0.1, 1.0)], "ink")
    page = Page(chart.svg())
    assert page.all("svg", "chart")[0]["aria-label"] == 'a "<b>'
    assert page.all("path")[0]["d"] == "M46.0,26.0M426.0,214.0"
    assert page.all("polygon")[0]["points"] == "46.0,26.0 426.0,26.0 426.0,73.0 46.0,73.0"


def test_long_logs_are_averaged():
    got = thin([(float(i), 2.0 * i) for i in range(1000)], most=10)
    assert len(got) == 10 and got[0] == (49.5, 99.0) and got[-1] == (949.5, 1899.0)
    assert thin([(1, 2.0)]) == [(1.0, 2.0)]
