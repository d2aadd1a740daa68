"""benchmarks/rollout_speed.py on a toy: rows as promised, pairs as described, bytes counted."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from benchmarks import rollout_pairs as pairs
from benchmarks import rollout_speed
from benchmarks.rollout_meter import Meter, weight_bytes
from switchkd import decoder, rollout
from switchkd.cache import position_bytes

CPU = torch.device("cpu")
KEYS = {
    "pair", "policy", "decoder", "batch", "dtype", "tokens_per_s", "ms_per_token", "teacher_share",
    "accepted_per_round", "speedup_vs_naive", "equal_tokens", "device",
}  # fmt: skip
T, B = 24, 3
OPTIONS = ["--pair", "tiny-gpt2", "--batch", str(B), "--max_new_tokens", str(T), "--device", "cpu",
           "--repeats", "1", "--dtype", "float64"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = [str(tmp_path_factory.mktemp("rows") / name) for name in ("rows.json", "rows.csv")]
    assert rollout_speed.main([*OPTIONS, "--json", paths[0], "--csv", paths[1]]) == 0
    return paths


@pytest.fixture(scope="module")
def rows(files):
    with open(files[0], encoding="utf-8") as file:
        found = json.load(file)
    return {row["decoder"]: row for row in found}


def test_a_row_for_each_decoder_with_the_promised_columns(files, rows):
    assert tuple(rows) == rollout_speed.DECODERS
    for row in rows.values():
        assert row.keys() >= KEYS and row.keys() == rows["naive"].keys()
        assert row["pair"] == "tiny-gpt2" and row["batch"] == B and row["dtype"] == "float64"
        assert row["tokens_per_s"] == pytest.approx(1e3 * B / row["ms_per_token"])
        assert row["knobs"] == pairs.KNOBS["tiny-gpt2"]._asdict()
    with open(files[1], encoding="utf-8") as file:
        assert [row["decoder"] for row in csv.DictReader(file)] == list(rows)


def test_every_decoder_writes_the_tokens_of_the_naive_loop(rows):
    for name, row in rows.items():
        if name.startswith("hf"):
            assert row["equal_tokens"] is None and row["teacher_share"] is None
            continue
        assert row["equal_tokens"] == 1 and row["rows_parting"] == 0, name
        assert row["first_parting"] is None
        assert row["teacher_share"] == rows["naive"]["teacher_share"] > 0


def test_accepted_tokens_and_phases(rows):
    for name in ("naive", "naive, no cache", "block k=1 student"):
        assert rows[name]["accepted_per_round"] == rows[name]["accepted_per_teacher_pass"] == 1
    student, teacher = rows["block k=4 student"], rows["block k=4 teacher"]
    assert 1 < student["accepted_per_round"] == student["accepted_per_teacher_pass"] <= 4
    assert 1 < teacher["accepted_per_round"] <= 4 and teacher["accepted_per_teacher_pass"] <= 1
    for name, row in rows.items():
        if name in rollout_speed.PLANS:
            unused = {"draft"} if row["block"] == 1 else set()
            assert set(row["phases"]) == set(rollout_speed.PHASES) - unused
            assert sum(row["plans"].values()) >= T / 8
        if row["phases"]:
            assert all(share >= 0 for share in row["phases"].values())
            assert sum(row["phases"].values()) <= 1 + 1e-9
    assert set(rows["naive"]["phases"]) == {"forward", "decide", "other"}


def test_the_bytes_of_a_pass_by_hand(rows):
    # GPT-2, width H: a layer has 12 H^2 + 13 H parameters, the last norm 2 H, the head 512 H.
    teacher_weights = 2 * (12 * 128**2 + 13 * 128) + 2 * 128 + 512 * 128
    student_weights = 12 * 96**2 + 13 * 96 + 2 * 96 + 512 * 96
    teacher_bytes, student_bytes = 3_698_688, 1_289_472  # in float64
    pair = pairs.load_pair("tiny-gpt2", B, torch.float64, CPU)
    assert weight_bytes(pair.teacher) == 8 * teacher_weights == teacher_bytes
    assert weight_bytes(pair.student) == 8 * student_weights == student_bytes
    assert (
        position_bytes(pair.teacher) == 2 * 2 * 128 * 8
        and position_bytes(pair.student) == 2 * 96 * 8
    )
    length = sum(len(p) for p in pair.prompts[:B]) / B + (T - 1) / 2
    weights = (teacher_bytes + student_bytes) / B
    lengths = [len(p) - 1 for p in pair.prompts[:B]]
    prefills = len(decoder.by_length(lengths, decoder.PASS_COST))
    want = {
        "naive": weights + (4096 + 1536) * length,
        "block k=1 student": weights * (T + prefills) / T + (4096 + 1536) * length,
        "naive, no cache": weights,
        "hf student": student_bytes / B + 1536 * length,
    }
    for name, needed in want.items():
        assert rows[name]["mb_per_token"] == pytest.approx(needed / 1e6)
    for row in rows.values():
        bound = 1e9 * row["copy_gbps"] / (1e6 * row["mb_per_token"])
        assert row["roofline_tokens_per_s"] == pytest.approx(bound)


def test_a_tied_head_is_read_and_grouped_heads_are_counted():
    # Llama of conftest: width 32, 4 heads of 8, 2 of them with keys and values, 2 layers.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    for tied in (False, True):
        model = tiny_model("llama", dtype=torch.float32, tie_word_embeddings=tied)
        assert weight_bytes(model) == 4 * (2 * layer + 32 + 60 * 32)
        assert position_bytes(model) == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("took", "want"),
    [([9, 1, 3, 2], 2), ([30, 4], 4), ([9, 8, 5], 6.5), ([601], 601)],
    ids=["repeats", "cold run over the patience", "patience", "endless"],
)
def test_a_cold_run_is_not_counted(monkeypatch, took, want):
    now, left = [0.0], list(took)
    monkeypatch.setattr(rollout_speed.time, "perf_counter", lambda: now[0])
    bench = SimpleNamespace(
        args=SimpleNamespace(repeats=3), timer=SimpleNamespace(synchronize=lambda: None)
    )

    def run():
        now[0] += left.pop(0)

    assert rollout_speed.Bench.seconds(bench, run) == want and not left


def test_a_meter_leaves_nothing_behind():
    names = [(owner, name, getattr(owner, name)) for owner, name, _ in Meter.WATCHED]
    with pytest.raises(RuntimeError), Meter(lambda: None):
        assert decoder._Decoder.draft is not names[1][2] and rollout._select is not names[-1][2]
        raise RuntimeError
    for owner, name, original in names:
        assert getattr(owner, name) is original


def test_the_toy_is_in_the_regime_it_stands_for():
    pair = pairs.load_pair("tiny-gpt2", 1, torch.float32, CPU)
    got = pairs.trial(pair)
    assert pairs.typical(got) and 0.4 < got.confidence < 0.7
    assert not pairs.typical(got._replace(agreement=None))


def test_tuning_finds_the_regime_from_elsewhere():
    pair = pairs.shaped_pair("tiny-gpt2", 1, torch.float32, CPU)
    pairs.turn(pair, pairs.Knobs(7.0, 0.6))
    assert not pairs.typical(pairs.trial(pair))
    assert pairs.typical(pairs.tune(pair)) and not pair.notes


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [pairs.gpt2(2, 64, 4, 200, 64), pairs.opt(2, 64, 4), pairs.qwen2(2, 64, 4, 2, 96, 200)],
    ids=lambda config: config.model_type,
)
def test_without_noise_either_model_is_the_table(config):
    """Of whatever architecture and width: that is what makes two random models agree."""
    config.vocab_size = 200
    teacher, student = (pairs.random_model(config, seed, torch.float32, CPU) for seed in (0, 1))
    pair = pairs.Pair("", "", teacher, student, [], 0, 190)
    pairs.turn(pair, pairs.Knobs(1e-6, 0.5))
    table, class_of = pairs.bigrams(pair, 0.5)
    tokens = torch.arange(190)[:48]
    for model in (teacher, student):
        assert len(pairs.layer_outputs(model)) == 4
        for name, weight in model.named_parameters():
            if "wpe" in name or "embed_positions" in name:
                weight.zero_()  # random and small, added to the vectors
        logits = model(tokens[None]).logits[0]
        assert torch.equal(logits[:, 190:], torch.zeros(48, 10))  # padding
        want = table[class_of[tokens]]
        torch.testing.assert_close(logits[:, :190], want, rtol=1e-3, atol=1e-3)
    certain = class_of[tokens] < round(0.5 * len(table))
    top = want.double().softmax(-1).amax(-1)
    assert certain.any() and (~certain).any()
    assert (top[certain] > 1 - 1e-9).all() and top[~certain].mean() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pair", "gpt5"], "pair: got 'gpt5', expected one of embedded, smollm2, gpt2-xl"),
        (["--pair", "smollm2"], "got no folder, expected --models DIR"),
        (["--teacher", "embedded"], "expected both or neither"),
        (["--device", "tpu"], "got 'tpu'"),
    ],
)
def test_refusals_say_what_was_got_and_expected(options, message, capsys):
    with pytest.raises(SystemExit):
        rollout_speed.main(options)
    assert message in capsys.readouterr().err


def test_a_folder_without_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got .*, expected SmolLM2-135M\*\.gguf in it"):
        pairs.load_pair("smollm2", 1, torch.float32, CPU, str(tmp_path))


def test_paper_shapes_are_those_of_the_models():
    """Parameters without the head, which is one with the embedding in the tied originals."""
    millions = {"gpt2-xl": (1558, 124), "opt-2.7b": (2652, 125), "qwen2.5-7b": (7616 - 545, 494),
                "qwen2.5-1.5b": (1544, 494)}  # fmt: skip
    for name, want in millions.items():
        *configs, vocab = pairs.SHAPES[name]()
        for config, size in zip(configs, want, strict=True):
            config.tie_word_embeddings = True
            with torch.device("meta"):
                model = pairs.AutoModelForCausalLM.from_config(config)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6) == size, name
            assert vocab <= config.vocab_size
