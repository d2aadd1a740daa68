"""A quantised teacher or student, by whichever backend is installed; refusals."""

import json
import re
import sys

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file
from test_trainer import make

from switchkd import models
from switchkd.arguments import ScriptArguments
from switchkd.command_line import parse
from switchkd.config import SwitchConfig
from switchkd.decoder import rollout
from switchkd.loading import load_models
from switchkd.policies import Switch
from switchkd.quantization import NAMED, quantization_config
from switchkd.train import main

# Backend and the largest mean KL, nats, from the teacher as it was: int8 and 4 bits.
BACKENDS = {
    "quanto-int8": ("optimum.quanto", 0.05),
    "torchao-int8": ("torchao", 0.05),
    "8bit": ("bitsandbytes", 0.05),
    "4bit": ("bitsandbytes", 0.5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    wide = dict(hidden_size=128, intermediate_size=128)  # 4-bit kernels want blocks of 64
    wide |= dict(max_position_embeddings=512)
    for name, seed in (("teacher", 1), ("student", 2)):
        model = tiny_model(vocab_size=258, seed=seed, dtype=torch.float32, spread=3.0, **wide)
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def load(folder, quantization):
    script = ScriptArguments(
        model_name_or_path=str(folder / "student"),
        teacher_model_name_or_path=str(folder / "teacher"),
        teacher_quantization=quantization,
    )
    config = SwitchConfig(output_dir=str(folder / "out"), use_cpu=True)
    return load_models(script, config)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_quantised_teacher_decodes_and_teaches_nearly_as_before(folder, name, tmp_path):
    backend, bound = BACKENDS[name]
    pytest.importorskip(backend)
    student, teacher = load(folder, name)
    whole = models.load_model(str(folder / "teacher"))
    layers = teacher.get_decoder().layers
    weight = layers[0].mlp.up_proj.weight
    assert type(weight.data) is not torch.Tensor or weight.element_size() == 1
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        p, q = (m(ids).logits.float().log_softmax(-1) for m in (whole, teacher))
    kl = (p.exp() * (p - q)).sum(-1)
    assert 0 < kl.mean() < bound, "quantised, and close"
    out = rollout(
        teacher, student, [[5, 6, 7], [8, 9]], Switch(tau0=0.01), max_new_tokens=8,
        eos_token_ids=[1], pad_token_id=0, keep_hidden=True,
    )  # fmt: skip
    assert out.teacher_tokens() > 0
    trainer = make(tmp_path, dtype=torch.float32, max_steps=2)
    trainer.teacher = teacher
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] != before


@pytest.mark.parametrize("name", ["quanto-int8", "4bit"])
@pytest.mark.parametrize("bf16", ["true", "false"])
@pytest.mark.parametrize("teacher", ["own", "base"])
def test_a_quantised_student_learns_by_its_adapter(folder, name, bf16, teacher, tmp_path):
    pytest.importorskip(BACKENDS[name][0])
    pytest.importorskip("peft")
    rows = [{"instruction": f"Say {i}.", "output": "yes"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    options = dict(
        model_name_or_path=folder / "student", student_quantization=name, bf16=bf16, use_peft=True,
        lora_target_modules="all-linear", dataset_name=tmp_path / "rows.jsonl", output_dir=run,
        max_prompt_length=200, max_new_tokens=6, lmbda=1.0, max_steps=2, eval_size=2, use_cpu=True,
        per_device_train_batch_size=2, learning_rate=0.05, report_to="none",
    )  # fmt: skip
    own = dict(teacher_model_name_or_path=folder / "teacher")
    options |= own if teacher == "own" else dict(teacher_is_base=True)
    assert main([x for key, value in options.items() for x in (f"--{key}", str(value))]) == 0
    weights = load_file(run / "adapter_model.safetensors")
    moved = [x for key, x in weights.items() if "lora_B" in key]
    assert moved and all(x.dtype == torch.float32 for x in moved)
    # Zero at first, and so is the gradient where the teacher is what the student is.
    assert teacher == "base" or any(x.any() for x in moved)
    summary = json.loads((run / "summary.json").read_text())
    kl = [summary[when]["kl"] for when in ("before", "after")]
    assert all(x == x for x in kl) and (teacher == "own" or abs(kl[0]) < 1e-6)


def test_a_quantised_student_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="use_peft: got False, expected true with student_quant"):
        ScriptArguments(student_quantization="4bit")
    with pytest.raises(ValueError, match="student_layers: got '0', expected none with student_q"):
        ScriptArguments(student_quantization="4bit", use_peft=True, student_layers="0")
    with pytest.raises(ValueError, match="student_quantization: got '3bit', expected one of"):
        quantization_config("3bit", "student_quantization")


def test_the_config_reaches_the_loader(folder, monkeypatch):
    """For every name, whether its backend can run here or not."""
    seen = {}

    def stand_in(path, **options):
        seen.update(options)
        return tiny_model()

    for name, make_config in NAMED.items():
        try:
            want = make_config().to_dict()
        except (ImportError, ValueError):
            continue
        with monkeypatch.context() as patch:
            real = models.AutoModelForCausalLM.from_pretrained
            patch.setattr(
                models.AutoModelForCausalLM, "from_pretrained",
                lambda path, real=real, **kw: (stand_in if "teacher" in path else real)(path, **kw),
            )  # fmt: skip
            load(folder, name)
        assert seen["quantization_config"].to_dict() == want
        assert seen["device_map"] == {"": torch.device("cpu")}
    assert NAMED["4bit"]().load_in_4bit and NAMED["8bit"]().load_in_8bit


def test_json_and_yaml_give_the_config_that_they_say(tmp_path):
    text = json.dumps({"quant_method": "quanto", "weights": "int4"})
    config = quantization_config(text)
    assert (type(config).__name__, config.weights) == ("QuantoConfig", "int4")
    file = tmp_path / "run.yaml"
    file.write_text("teacher_quantization:\n  quant_method: quanto\n  weights: int4\n")
    script, _ = parse(["--config", str(file), "--output_dir", str(tmp_path)])
    assert quantization_config(script.teacher_quantization).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "text, message",
    [
        ("3bit", "got '3bit', expected one of 4bit, 8bit"),
        ("{quant", "not valid JSON"),
        ('{"weights": "int8"}', "got quant_method None, expected one of"),
        ('{"quant_method": "quanto", "weights": "int9"}', "int9"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantization_config(text)


def test_a_backend_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="teacher_quantization torchao-int8: .*torchao"):
        quantization_config("torchao-int8")


def test_a_quantised_head_is_refused():
    model = tiny_model(dtype=torch.float32)
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"output head of Tensor, torch\.int8"):
        models.head_of(model)
