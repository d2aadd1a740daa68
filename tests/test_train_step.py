"""benchmarks/train_step.py on a toy: rows as promised, phases that add up, a gate that can fail."""

import csv
import json
import mmap

import pytest
import torch

from benchmarks import rollout_pairs as pairs
from benchmarks import train_step
from benchmarks import train_step_methods as methods

pytest.importorskip("trl")
CPU = torch.device("cpu")
KEYS = {"pair", "method", "implementation", "phase", "ms", "peak_mb", "ratio_to_gkd"}
WAYS = (("switch", "switchkd"), ("switch", "naive"), ("gkd", "switchkd"))
WAYS += (("distillation", "trl 1"), ("gkd", "trl 1"))
T, B = 24, 3


def options(*more):
    args = ["--pair", "tiny-gpt2", "--batch", str(B), "--max_new_tokens", str(T), "--device", "cpu"]
    return [*args, "--repeats", "2", *more]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = [str(tmp_path_factory.mktemp("rows") / name) for name in ("rows.json", "rows.csv")]
    more = ("--micro_batches", "2", "--json", paths[0], "--csv", paths[1])
    assert train_step.main(options(*more)) == 0
    return paths


@pytest.fixture(scope="module")
def rows(files):
    with open(files[0], encoding="utf-8") as file:
        return json.load(file)


def of(rows, method, implementation):
    return {
        row["phase"]: row
        for row in rows
        if row["method"] == method and row["implementation"].startswith(implementation)
    }


def test_a_row_for_each_phase_of_each_step(files, rows):
    phases = [*methods.PHASES, "step"]
    assert [row["phase"] for row in rows] == phases * len(WAYS)
    for way in WAYS:
        assert list(of(rows, *way)) == phases
    for row in rows:
        assert row.keys() >= KEYS and row.keys() == rows[0].keys()
        assert row["pair"] == "tiny-gpt2" and row["repeats"] == 2
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["ms_per_token"] == pytest.approx(row["ms"] / (2 * B * T))
    with open(files[1], encoding="utf-8") as file:
        assert [row["phase"] for row in csv.DictReader(file)] == phases * len(WAYS)


def test_phases_sum_to_the_step(rows):
    for way in WAYS:
        each = of(rows, *way)
        whole = each.pop("step")
        assert sum(row["ms"] for row in each.values()) == pytest.approx(whole["ms"])
        assert whole["peak_mb"] == max(row["peak_mb"] or 0 for row in each.values())
        for name, row in each.items():
            skipped = name == "teacher forward" and way[1] == "switchkd"
            assert row["ms"] == 0 if skipped else row["ms"] > 0
        assert whole["ratio_low"] <= whole["ratio_to_gkd"] <= whole["ratio_high"]
    assert of(rows, "gkd", "trl")["step"]["ratio_to_gkd"] == 1
    shares = [of(rows, *way)["step"]["teacher_share"] for way in WAYS]
    assert 0 < shares[0] == shares[1] < 1 and shares[2:] == [0, 0, 0]


@pytest.fixture
def bench(tmp_path):
    parsed = train_step.parse(options())
    pair = pairs.load_pair("tiny-gpt2", B, torch.float32, CPU)
    pair.prompts = pair.prompts[:B]
    return train_step.Bench(pair, parsed, str(tmp_path))


def test_the_gate_passes_and_sees_another_loss(bench):
    assert set(bench.gate()) == {"loss", "gradient"}
    bench.ours.args.skew_alpha = 0.2  # both steps have configurations of their own
    with pytest.raises(AssertionError, match=r"loss of switchkd: got .* away from the naive"):
        bench.gate()


def test_the_gate_sees_a_gradient_that_is_missing(bench):
    """The loss is right, but the output head learns nothing."""
    compute_loss = bench.ours.compute_loss

    def frozen_head(model, inputs, num_items_in_batch):
        head = model.get_output_embeddings().weight.requires_grad_(False)
        loss = compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        head.requires_grad_(True)
        return loss

    bench.ours.compute_loss = frozen_head
    with pytest.raises(AssertionError, match=r"gradient of switchkd: got"):
        bench.gate()


def test_gkd_written_out_is_trl_s(bench):
    """Same loss on the same sequences, and the same steps around it."""
    written, new = methods.WrittenGkd(bench.pair, T), []
    assert methods.trl_refuses(bench.pair) is None
    for trainer in (bench.gkd, written):
        torch.manual_seed(0)
        batch = methods.gkd_inputs(bench.pair, bench.pair.prompts)
        bench.phases.start("rollout")
        loss = trainer.training_step(bench.pair.student, batch, torch.tensor(B * T))
        gradient = {n: p.grad.clone() for n, p in bench.pair.student.named_parameters()}
        bench.pair.student.zero_grad()
        new.append((batch["input_ids"], batch["attention_mask"], batch["labels"], loss, gradient))
    torch.testing.assert_close(*new)
    assert (new[0][2] != -100).sum() == B * T


def test_distillation_trains_on_its_samples_with_the_loss_of_gkd(bench):
    bench.phases.start("rollout")
    bench.steps[-2].run()
    gradient = {n: p.grad.clone() for n, p in bench.pair.student.named_parameters()}
    bench.pair.student.zero_grad()
    (sampled,) = bench.distillation._buffered_inputs
    text = {
        "input_ids": torch.cat([sampled["prompt_ids"], sampled["completion_ids"]], 1),
        "attention_mask": torch.cat([sampled["prompt_mask"], sampled["completion_mask"]], 1),
    }
    ids, counts = text["input_ids"], torch.zeros_like(text["attention_mask"])
    counts[:, -T:] = sampled["completion_mask"]
    assert counts.sum() == B * T
    text["labels"] = torch.where(counts > 0, ids, -100)
    written = methods.WrittenGkd(bench.pair, T)
    written.compute_loss(bench.pair.student, text, torch.tensor(B * T)).backward()
    expected = {n: p.grad for n, p in bench.pair.student.named_parameters()}
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_differently_padded_vocabularies_are_written_out(bench):
    bench.pair.teacher.config.vocab_size += 8
    assert "padded to [520, 512]" in methods.trl_refuses(bench.pair)
    assert isinstance(methods.gkd_trainer(bench.pair, B, T, "unused"), methods.WrittenGkd)


def test_a_moment_counts_in_one_phase_only():
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    phases = methods.Phases(CPU, lambda: next(clock))
    teacher, student = torch.nn.Identity(), torch.nn.Identity()
    phases.watch(student, "student forward")
    phases.watch(teacher, "teacher forward")
    phases.start("rollout")
    student(1)  # in a rollout a pass is part of it
    phases.to("loss")
    student(1)
    phases.to("loss")  # goes on
    phases.to("backward")
    ms, _ = phases.stop()
    want = {"rollout": 1e3, "loss": 2e3 + 8e3, "student forward": 4e3, "backward": 16e3}
    assert ms == {**dict.fromkeys(methods.PHASES, 0.0), **want}


def test_peak_memory_is_that_since_the_last_call():
    if methods.peak_bytes(CPU) is None:
        pytest.skip("the system does not count it")
    before = methods.peak_bytes(CPU)  # since the line above
    with mmap.mmap(-1, 2**26) as block:  # not of the heap, which may have room that is resident
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        with_block = methods.peak_bytes(CPU)
    methods.peak_bytes(CPU)
    assert with_block - before > 60 * 2**20
    assert methods.peak_bytes(CPU) - before < 30 * 2**20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pair", "gpt5"], "pair: got 'gpt5', expected one of embedded, smollm2, gpt2-xl"),
        (["--pair", "smollm2"], "got no folder, expected --models DIR"),
        (["--batch", "0"], "batch: got 0, expected at least 1"),
        (["--device", "tpu"], "got 'tpu'"),
    ],
)
def test_refusals_say_what_was_got_and_expected(given, message, capsys):
    with pytest.raises(SystemExit):
        train_step.parse(given)
    assert message in capsys.readouterr().err
