"""The plan of a run: by hand where that can be done, against the real thing where it cannot."""

import json
import socket
from dataclasses import replace

import pytest
import torch
from conftest import _config, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from switchkd import plan, plan_probe
from switchkd.command_line import parse
from switchkd.models import checkpoint_activations
from switchkd.plan_memory import (
    KEPT_BY_MALLOC,
    RETURNS,
    Memory,
    Sizes,
    optimizer_bytes,
    weight_bytes,
)
from switchkd.plan_meter import Loss, Meter, Op, Shape, training_steps
from switchkd.plan_models import build, to_fake
from switchkd.plan_speed import DATA_SHEETS, Device, find, rollout_seconds, step_seconds

V, H, L, F, HEADS, SHARED = 60, 32, 2, 48, 4, 2  # the tiny Llama of conftest
WIDTH = H // HEADS
LAYER = 2 * H * H + 2 * H * SHARED * WIDTH + 3 * H * F + 2 * H  # q, o; k, v; gate, up, down; norms
DEVICE = Device("there", 2**30, 1e9, 1e10, 4e10)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a configuration and no weights."""
    _config("llama", V, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path


def arguments(folder, **changes):
    model = str(folder / "model")
    values = {
        "model_name_or_path": model, "teacher_model_name_or_path": model, "dataset_name": "none",
        "max_prompt_length": 16, "max_new_tokens": 8, "per_device_train_batch_size": 4,
        "output_dir": folder / "run", **changes,
    }  # fmt: skip
    return [str(x) for key, value in values.items() for x in (f"--{key}", value)]


def memory_of(folder, processes=1, gpu=False, **changes):
    script, config = parse(arguments(folder, **changes))
    return Memory(build(script, config), config, processes, gpu)


# ------------------------------------------------------------------------------- the meter


def test_operations_are_counted_by_hand():
    with FakeTensorMode():
        x, w = torch.empty(10, 20), torch.empty(20, 30)
        with Meter() as meter:
            meter.phase("all")
            y = x @ w
            z = y.view(300)[7:].t()  # views cost nothing
            z.add_(1.0)
            kept = y.clone()
            del y, z
        phase = meter.phases["all"]
    product, add, clone = phase.ops
    assert (product.flops, product.moved) == (2 * 10 * 20 * 30, 4 * (200 + 600 + 300))
    assert (add.flops, add.moved) == (0, 4 * (293 + 293))
    assert clone.moved == 2 * kept.nbytes and phase.flops == product.flops
    assert phase.peak == 2 * kept.nbytes == 2400 and meter.live == kept.nbytes


def test_what_a_backward_pass_needs_is_counted_by_hand():
    rows, wide = 6, 50
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, wide), nn.ReLU(), nn.Linear(wide, 3, bias=False))
        with Meter(model) as meter:
            meter.phase("forward")
            x = torch.empty(rows, 8)
            out = model(x)
            meter.phase("backward")
            out.sum().backward()
    saved = 4 * rows * (8 + wide + 3)  # the input, what the ReLU returns, the output
    assert meter.phases["forward"].live == saved
    grads = sum(p.nbytes for p in model.parameters())
    assert meter.live == grads + x.nbytes + out.nbytes  # what the ReLU returned is gone
    assert saved < meter.phases["backward"].peak < grads + saved + 4 * rows * (wide + 3) + 8


class Padded(Shape):
    """One row ends early, as in real batches: then models make a mask."""

    def batch(self):
        batch = super().batch()
        batch["attention_mask"][0, -1] = 0
        return batch


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_what_real_ones_take(cast, checkpointing):
    def models():
        pair = [tiny_model(vocab_size=V, dtype=torch.float32).train() for _ in range(2)]
        pair[1].requires_grad_(False)
        if checkpointing:
            checkpoint_activations(pair[0])
        return pair

    options = dict(count=2, teacher_runs=True, extra_text=False)
    sizes = Padded(3, 5, 7), Loss(4, V, cast, False)
    real = training_steps(*models(), *sizes, **options)
    with torch.device("meta"):
        pair = models()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in pair:
            to_fake(model)
        fake = training_steps(*pair, *sizes, **options)
    for one, other in zip(real, fake, strict=True):
        for name in one:
            assert other[name].flops == one[name].flops > 0
            assert other[name].peak == pytest.approx(one[name].peak, rel=0.01)


# ------------------------------------------------------------------------------- memory


def test_weights_optimizer_and_caches_by_hand(folder, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    memory = memory_of(folder, student_layers="1", teacher_dtype="bfloat16")
    student, teacher = V * H + LAYER + H, V * H + L * LAYER + H  # tied head
    buffers = [weight_bytes(m) - sum(p.nbytes for p in m.parameters())
               for m in (memory.pair.student, memory.pair.teacher)]  # fmt: skip
    assert buffers == [2 * 4 * WIDTH // 2] * 2  # rotary frequencies, and as they were at first
    assert memory.fixed == {
        "teacher weights": 2 * teacher + buffers[1],
        "student weights": 4 * student + buffers[0],
        "student's copy for decoding": 0,
        "gradients": 4 * student,
        "optimizer state": 8 * student,
        "freed and kept by malloc": 0,
    }
    position = 2 * SHARED * WIDTH
    rows, capacity = 3, 16 + 8 + 8  # prompt, response, a block drafted past its end
    assert memory.caches(rows) == {
        "teacher's cache": rows * capacity * position * L * 2,
        "student's cache": rows * capacity * position * 1 * 4,
    }
    assert memory.decoder_logits(rows) == rows * 8 * V * (2 + 4)
    assert memory.kept_hidden(rows) == rows * 8 * H * 2
    assert memory.prefill["teacher"].flops == 4 * 16 * L * (2 * (LAYER - 2 * H) + 4 * H * 16)


def test_optimizer_state_by_name():
    model, notes = nn.Linear(7, 5), []  # 35 weights, 5 biases
    sizes = {x: optimizer_bytes(model, x, notes) for x in ("adamw_torch_fused", "sgd", "adafactor",
                                                           "lion_8bit")}  # fmt: skip
    assert sizes == {"adamw_torch_fused": 320, "sgd": 0, "adafactor": 4 * (12 + 5), "lion_8bit": 40}
    assert not notes and optimizer_bytes(model, "lomo", notes) == 320 and "lomo" in notes[0]


def test_a_frozen_model_has_no_gradients(folder):
    options = dict(use_peft="true", lora_r=3, lora_target_modules="q_proj")
    memory, dropping = (memory_of(folder, **options, lora_dropout=p) for p in (0, 0.5))
    assert dropping.training_peak(4, 1) > memory.training_peak(4, 1)
    adapter, fixed = L * 3 * (H + H), memory.fixed
    assert (fixed["gradients"], fixed["optimizer state"]) == (4 * adapter, 8 * adapter)
    assert memory.peak(memory.asked) < memory_of(folder).peak(memory.asked)


def test_the_copy_for_decoding_is_counted(folder):
    memory = memory_of(folder, bf16="true")
    buffers = weight_bytes(memory.pair.student) - 4 * (V * H + L * LAYER + H)
    assert memory.fixed["student's copy for decoding"] == 2 * (V * H + L * LAYER + H) + buffers
    assert memory.decoders["student"].dtype == torch.bfloat16
    validating = memory_of(folder, bf16="true", lmbda=0).fixed["student's copy for decoding"]
    assert validating == memory.fixed["student's copy for decoding"]
    without = memory_of(folder, bf16="true", lmbda=0, eval_strategy="no")
    assert without.fixed["student's copy for decoding"] == 0 and without.asked.slots == 0
    assert "rollout" not in without.phases(without.asked)


def test_loss_chunks_follow_the_implementation(folder):
    assert memory_of(folder, gpu=True).loss.chunk == 640 * 2**20 // (4 * V)
    assert memory_of(folder, gpu=True, bf16="true").loss.chunk == 640 * 2**20 // (2 * V)


def test_processes_copy_or_share(folder):
    one, many = memory_of(folder), memory_of(folder, processes=4)
    assert many.fixed == {**one.fixed, "gradients": 2 * one.fixed["gradients"]}  # DDP's buckets
    script, config = parse(arguments(folder))
    config.fsdp = "full_shard"
    sharded = Memory(build(script, config), config, 4)
    shared = sharded.fixed
    for name in ("student weights", "gradients", "optimizer state"):
        assert shared[name] == one.fixed[name] // 4
    assert shared["student's copy for decoding"] == one.fixed["student weights"]
    assert shared["teacher weights"] == one.fixed["teacher weights"]
    assert sharded.gathered_layers == 2 * 4 * LAYER
    backward = [m.micro_steps[1]["student backward"].live for m in (one, sharded)]
    assert backward[0] - backward[1] == one.fixed["gradients"]  # none stays whole


def test_more_of_anything_takes_no_less(folder):
    memory = memory_of(folder, gradient_accumulation_steps=2)
    at = memory.peak(Sizes(4, 2, 8))
    for more in (Sizes(8, 1, 8), Sizes(16, 2, 8), Sizes(4, 4, 8), Sizes(4, 2, 800)):
        assert memory.peak(more) > at - (more.accumulation == 1) * 2**30
    assert memory.peak(Sizes(16, 2, 8)) > memory.peak(Sizes(8, 2, 8)) > at
    longer = memory_of(folder, gradient_accumulation_steps=2, max_new_tokens=64)
    assert longer.peak(Sizes(4, 2, 8)) > at
    data = Memory(memory.pair, memory.config, response=64)
    assert data.training_peak(4, 2) == longer.training_peak(4, 2)
    lean = memory_of(folder, gradient_accumulation_steps=2, gradient_checkpointing="true")
    kept = [m.parts()["activations of the student"] for m in (lean, memory)]
    assert kept[0] < 0.5 * kept[1]


def test_other_batch_sizes_lie_on_the_line(folder):
    memory = memory_of(folder, gradient_accumulation_steps=2)
    for rows in (8, 32):
        measured = memory_of(folder, per_device_train_batch_size=rows)
        for accumulation in (1, 2):
            want = measured.training_peak(rows, accumulation)
            assert memory.training_peak(rows, accumulation) == pytest.approx(want, rel=0.02)


def test_the_suggestion_fits_and_a_larger_one_does_not(folder):
    memory = memory_of(folder, gradient_accumulation_steps=8)
    limit = (memory.peak(Sizes(2, 16, 2)) + memory.peak(Sizes(16, 2, 32))) // 2
    best = memory.suggest(limit)
    assert best.rows * best.accumulation == 32 and memory.peak(best) <= limit
    assert 2 <= best.rows < 32
    assert memory.peak(Sizes(2 * best.rows, best.accumulation // 2, 1)) > limit
    if best.slots < 32:
        assert memory.peak(Sizes(best.rows, best.accumulation, 2 * best.slots)) > limit
    assert memory.suggest(1000) is None
    assert memory.suggest(2**40) == Sizes(32, 1, 32)


def test_what_malloc_keeps_is_counted_where_it_does(folder, monkeypatch):
    for name in RETURNS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    default, gpu = memory_of(folder), memory_of(folder, gpu=True)
    assert default.fixed["freed and kept by malloc"] == KEPT_BY_MALLOC
    assert gpu.fixed["freed and kept by malloc"] == 0
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    other = memory_of(folder)
    assert default.peak(default.asked) == other.peak(default.asked) + KEPT_BY_MALLOC


# ------------------------------------------------------------------------------- time


def test_an_operation_takes_the_longer_of_its_two_times():
    device = Device("d", 0, bandwidth=100.0, full=10.0, half=40.0)
    ops = [Op(80, 100, torch.float32), Op(80, 100, torch.bfloat16), Op(0, 300, torch.float32)]
    assert device.seconds(ops) == pytest.approx(8 + 2 + 3)


def test_parts_of_a_step(folder):
    memory, double = (memory_of(folder, lmbda=x, student_layers=0) for x in (0.25, 0.5))
    times = step_seconds(memory, DEVICE)
    names = ["rollout", "student forward", "teacher forward", "loss", "student backward"]
    assert list(times) == [*names, "optimizer"] and all(x > 0 for x in times.values())
    # gradient read; parameter and two moments read and written
    assert times["optimizer"] == 7 * memory.fixed["gradients"] / DEVICE.bandwidth
    less = step_seconds(double, DEVICE)["teacher forward"]
    assert less == pytest.approx(times["teacher forward"] * 0.5 / 0.75)
    double.asked = Sizes(4, 2, 4)  # two micro-batches
    twice = step_seconds(double, DEVICE)
    for name in ("student forward", "loss", "student backward"):
        assert twice[name] == pytest.approx(2 * times[name])
    alone, both = memory_of(folder, rollout_policy="teacher"), memory_of(folder)
    assert 0 < rollout_seconds(alone, DEVICE) < rollout_seconds(both, DEVICE)


def test_passes_are_extrapolated_from_small_models_where_the_device_is_here(folder, monkeypatch):
    memory = memory_of(folder, student_layers="0-1", gradient_checkpointing=True, use_peft=True)
    made, build_small = [], memory.pair.small

    def small(role, layers):
        model = build_small(role, layers)
        made.append((role, plan_probe.layers_of(model), next(model.parameters()).dtype))
        return model

    memory.pair.small = small
    seconds = iter([1.0, 2.0, 3.0, 1.5, 4.0, 3.0] * 2 + [10.0, 12.0])  # of one layer, of two
    monkeypatch.setattr(plan_probe, "median_seconds", lambda run, *_: (run(), next(seconds))[1])
    found = plan_probe.decoding(memory, "teacher", torch.device("cpu"))
    assert found == plan_probe.Passes(1.5, 4.0, 3.0)
    monkeypatch.setattr(plan_probe, "layers_of", lambda model: 5)
    assert plan_probe.decoding(memory, "student", torch.device("cpu")) == plan_probe.Passes(
        3, 10, 3
    )
    assert plan_probe.training(memory, torch.device("cpu")) == 18.0
    assert [role for role, *_ in made] == ["teacher"] * 2 + ["decoding"] * 2 + ["student"] * 2


def test_a_measured_device_is_probed(folder, monkeypatch):
    memory, here = memory_of(folder), replace(DEVICE, name="cpu", measured=True)
    calls = []
    monkeypatch.setattr(
        plan_probe, "decoding", lambda *a: calls.append(a[1]) or plan_probe.Passes(1.0, 1.0, 0.5)
    )
    monkeypatch.setattr(plan_probe, "training", lambda *a: calls.append("training") or 7.0)
    times = step_seconds(memory, here)
    assert sorted(calls) == ["student", "teacher", "training"]
    assert times["student forward"] + times["student backward"] == pytest.approx(7.0)
    # 8 tokens: at best, a round of 8 drafts and one pass over them
    assert 1.0 + 8 < times["rollout"] < 1.0 + 2 * 8
    assert times["loss"] == step_seconds(memory, DEVICE)["loss"] and len(calls) == 3
    step_seconds(memory, replace(here, memory=1000))  # no room for a probe
    assert len(calls) == 3


def test_devices():
    assert find("h100-80gb") is DATA_SHEETS["H100-80GB"] and not find("h100-80gb").measured
    here = find("cpu")
    assert here.measured and min(here.bandwidth, here.full, here.half, here.memory) > 0
    with pytest.raises(ValueError, match="got 'abacus'; or of data sheets: A100"):
        find("abacus")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 1.5 * 10**9), ("512MiB", 2**29),
     ("1000", 1000)],
)  # fmt: skip
def test_sizes_of_memory(text, size):
    assert plan.parse_bytes(text) == size


# ------------------------------------------------------------------------------- the command


def test_the_command_reads_no_weights_and_no_network(folder, monkeypatch, capsys):
    def forbidden(*args, **kwargs):
        raise AssertionError("neither weights nor network")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr("safetensors.safe_open", forbidden)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert [x.name for x in (folder / "model").iterdir()] == ["config.json"]
    out = folder / "plan.json"
    here = ["--device", "A100-80GB", "--device_memory", "10MB", "--json", str(out)]
    assert plan.main([*arguments(folder, student_layers=0), *here]) == 0
    got = json.loads(out.read_text())
    assert got["models"]["teacher"]["parameters"] == V * H + L * LAYER + H
    assert got["models"]["student"]["parameters"] == V * H + LAYER + H
    assert got["peak"] == max(got["phases"].values()) and got["fits"] is True
    assert got["device"]["limit"] == 10**7 and got["device"]["measured"] is False
    text = " ".join(capsys.readouterr().out.split())
    assert "data sheet: a lower bound" in text and "at most, forward and backward" in text
    assert "--per_device_train_batch_size 4" in text
    assert plan.main([*arguments(folder), *here[:3], "1KB"]) == 0
    assert "not even one row fits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "absent/model"}, "cannot load the model 'absent/model'"),
        ({"teacher_model_name_or_path": "absent/t"}, "cannot load the model 'absent/t'"),
        ({"student_layers": "0-7"}, "expected rising layer numbers from 0 to 1"),
        ({"max_new_tokens": 4000}, "need 4016 positions, expected at most 128"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "got the output head, expected"),
        ({"dtype": "float33"}, "dtype: got 'float33', expected float32"),
        ({"per_device_train_batch_sise": 4}, "unknown option --per_device_train_batch_sise"),
        ({"device_memory": "much"}, "device_memory: got 'much', expected a size such as"),
        ({"device_memory": 0}, "device_memory: got 0, expected a size > 0"),
        ({"device": "abacus"}, "got 'abacus'"),
        ({"processes": 0}, "processes: got 0, expected an integer >= 1"),
    ],
)
def test_bad_arguments_are_told(folder, capsys, changes, message):
    assert plan.main(arguments(folder, **{"device": "A100-80GB", **changes})) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_teacher_is_asked_for(folder, capsys):
    argv = arguments(folder, device="A100-80GB")
    at = argv.index("--teacher_model_name_or_path")
    assert plan.main(argv[:at] + argv[at + 2 :]) == 1
    assert "teacher_model_name_or_path: got None" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_training_peaks_where_the_plan_says():
    from benchmarks import plan_check as check

    small = {"max_prompt_length": 48, "max_new_tokens": 48, "max_steps": 2}
    row = check.check("embedded", check.COMMON | check.EMBEDDED | small, "mmap")
    assert abs(row["memory_error"]) < 0.15 and row["measured_mib"] > 100
