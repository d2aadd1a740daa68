"""LoRA: the base as teacher, resuming, the cache under checkpointing, evaluation of an adapter."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from test_trainer import ROWS, make
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from switchkd import adapters, evaluate
from switchkd.config import SwitchConfig
from switchkd.decoder import rollout
from switchkd.models import check_head
from switchkd.policies import Switch
from switchkd.train import main

peft = pytest.importorskip("peft")
OPTIONS = dict(max_new_tokens=12, eos_token_ids=[1], pad_token_id=0)


def lora(**changes):
    options = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.LoraConfig(**options | changes)


def test_the_shared_base_decodes_and_teaches_as_a_model_of_its_own():
    """Against the definition: the same student, and a separate copy of its base."""
    student, apart = tiny_model(seed=2), tiny_model(seed=2)
    shared = adapters.share_base(student, None, lora())
    student = adapters.add(student, lora(), seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # zero at first: student and base would be the same
                parameter.normal_()
    mine = {p.data_ptr() for p in student.parameters()}
    assert all(p.data_ptr() in mine for p in shared.parameters())
    prompts = [[5, 6, 7], [8, 9]]
    a, b = (rollout(t, student, prompts, Switch(tau0=0.5), **OPTIONS) for t in (shared, apart))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.from_teacher, b.from_teacher)
    torch.testing.assert_close(a.divergence, b.divergence, equal_nan=True)
    assert 0 < a.teacher_tokens() < a.lengths.sum() and a.divergence.nan_to_num().max() > 0.1
    ids = torch.tensor([[5, 6, 7]])
    with student.disable_adapter():
        torch.testing.assert_close(shared(ids).logits, student(ids).logits)
    assert not torch.allclose(shared(ids).logits, student(ids).logits)


def base_run(tmp_path, **changes):
    options = dict(teacher=False, teacher_is_base=True, lmbda=1.0, learning_rate=0.05)
    config = lora(target_modules=["c_attn"])
    return make(tmp_path, peft_config=config, **options | changes)


def test_training_moves_the_student_away_from_a_base_that_stays(tmp_path):
    trainer = base_run(tmp_path, max_steps=3)
    before = {n: p.clone() for n, p in trainer.teacher.named_parameters()}
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0, abs=1e-12)
    trainer.train()
    for name, parameter in trainer.teacher.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad
    # Student = teacher is a minimum of the divergence; only cross-entropy leaves it.
    trainer = base_run(tmp_path / "ce", max_steps=5, lmbda=0.0, loss_type="cross_entropy")
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 1e-4


@pytest.mark.parametrize(
    "changes, said",
    [({}, True), ({"disable_dropout": False}, False), ({"loss_type": "cross_entropy"}, False)],
)
def test_a_base_that_has_nothing_to_teach_is_said(tmp_path, caplog, changes, said):
    base_run(tmp_path, **changes)
    assert ("the student begins as its teacher" in caplog.text) is said


def test_what_cannot_be_a_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_is_base: got no adapter"):
        make(tmp_path, teacher=False, teacher_is_base=True)
    with pytest.raises(ValueError, match="teacher_is_base: got a teacher, too"):
        base_run(tmp_path, teacher=True)
    with pytest.raises(ValueError, match="shard_teacher: got True, expected false with"):
        SwitchConfig(output_dir=str(tmp_path), teacher_is_base=True, shard_teacher=True)
    with pytest.raises(ValueError, match="got an adapter with bias 'all'"):
        adapters.share_base(tiny_model(), None, lora(bias="all"))
    with pytest.raises(ValueError, match="got the output head, expected layers below"):
        adapters.add(tiny_model(), lora(target_modules=["lm_head"]), seed=0)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for refused in (dict(alora_invocation_tokens=[5]), dict(layer_replication=[[0, 2], [1, 2]])):
        with pytest.raises(ValueError, match=f"peft_config: got {next(iter(refused))} .* expected"):
            adapters.add(tiny_model(), lora(**refused), seed=0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    unknown = DiffLlamaForCausalLM(DiffLlamaConfig(vocab_size=8, num_key_value_heads=2, **sizes))
    with pytest.raises(ValueError, match="peft knows none for 'diffllama'; expected all-linear"):
        adapters.add(unknown, lora(target_modules=None), seed=0)
    with pytest.raises(ValueError, match="peft_config: got PromptTuningConfig, expected"):
        make(tmp_path, peft_config=prompt)
    with pytest.raises(ValueError, match="use_peft: got a model that has an adapter already"):
        adapters.add(adapters.add(tiny_model(), lora(), seed=0), lora(), seed=0)


def test_a_model_that_comes_with_an_adapter_on_its_head_is_refused():
    """It would decode with it and never train it; a head that is trained whole is no adapter."""
    given = peft.get_peft_model(tiny_model(), lora(target_modules=["q_proj", "lm_head"]))
    for role in ("teacher", "student"):
        with pytest.raises(ValueError, match=f"{role}'s adapter: got the output head, expected"):
            check_head(given, role)
    whole = peft.get_peft_model(tiny_model(), lora(modules_to_save=["lm_head"]))
    check_head(whole, "student")


def test_dropout_of_the_adapter_survives_disable_dropout(tmp_path):
    trainer = make(tmp_path, peft_config=lora(target_modules=["c_attn"], lora_dropout=0.25))
    rates = {n: m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for n, p in rates.items() if "lora_dropout" in n} == {0.25}
    assert {p for n, p in rates.items() if "lora_dropout" not in n} == {0.0}


def test_the_configuration_keeps_its_cache_under_gradient_checkpointing(tmp_path):
    """A saved student whose config says use_cache=false decodes without cache ever after."""
    trainer = make(tmp_path, lmbda=1.0, gradient_checkpointing=True)
    seen = []
    decoder = trainer.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append((kwargs["use_cache"], _m.training)), with_kwargs=True
    )
    trainer.train()
    assert (True, False) in seen and (False, True) in seen  # rollouts, training
    assert (True, True) not in seen and trainer.model.config.use_cache is True
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An adapter trained by the command, whole and interrupted."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_model(vocab_size=258, seed=3, dtype=torch.float32).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = {
        "model_name_or_path": folder / "model", "student_layers": "1", "use_peft": "true",
        "lora_target_modules": "all-linear", "teacher_model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl", "eval_size": 2, "max_new_tokens": 8,
        "max_prompt_length": 40, "per_device_train_batch_size": 2, "max_steps": 4,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "logging_steps": 1, "learning_rate": 0.01, "bf16": "true", "use_cpu": "true",
        "log_completions": "false", "disable_tqdm": "true",
    }  # fmt: skip
    flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    assert main([*flags, "--output_dir", str(folder / "out")]) == 0
    cut = folder / "cut"
    shutil.copytree(folder / "out", cut, ignore=shutil.ignore_patterns("checkpoint-4", "*.json"))
    for path in (folder / "out" / "checkpoint-2").glob("*.json"):
        shutil.copy(path, cut / "checkpoint-2")
    assert main([*flags, "--output_dir", str(cut), "--resume_from_checkpoint", "last"]) == 0
    return folder


def test_a_resumed_adapter_ends_as_one_that_was_not_interrupted(run):
    files = [run / name / "checkpoint-4" / "adapter_model.safetensors" for name in ("out", "cut")]
    whole, resumed = map(load_file, files)
    assert {name.split(".")[-3] for name in whole} >= {"q_proj", "down_proj"}
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name
    first = load_file(run / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not tensor.equal(first[name]) for name, tensor in whole.items())
    lines = [(run / name / "completions.jsonl").read_text() for name in ("out", "cut")]
    assert lines[0] == lines[1]


def written(run, monkeypatch, *arguments) -> list[list[str]]:
    """What evaluation samples."""
    texts, generate = [], evaluate.metrics.generate

    def record(*args, **kwargs):
        texts.append(generate(*args, **kwargs))
        return texts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.metrics, "generate", record)
        code = evaluate.main(
            ["--data", f"rows={run / 'rows.jsonl'}", "--seeds", "1", "--max_new_tokens", "8",
             "--max_prompt_length", "40", "--json", str(run / "results.json"),
             "--overwrite", "true", *arguments]
        )  # fmt: skip
    assert code == 0
    return texts


def test_an_adapter_is_found_in_its_folder_and_evaluated_on_its_base(run, monkeypatch):
    """The base is a cut model, which exists beside the adapter only."""
    texts = written(run, monkeypatch, "--model_name_or_path", str(run / "out"))
    base = ["--model_name_or_path", str(run / "model"), "--student_layers", "1"]
    assert texts == written(run, monkeypatch, *base, "--adapter", str(run / "out"))
    assert texts != written(run, monkeypatch, *base)


def test_an_adapter_is_evaluated_on_the_base_that_its_run_began_with(tmp_path, monkeypatch):
    (tmp_path / adapters.ADAPTER_CONFIG).write_text('{"base_model_name_or_path": "some/base"}')
    revisions = []
    monkeypatch.setattr(
        evaluate, "load_tokenizer", lambda *_, revision, **__: revisions.append(revision)
    )

    def base(run, **options):
        (tmp_path / "config.yaml").write_text(json.dumps(run))
        args = evaluate.EvalArguments(model_name_or_path=[str(tmp_path)], **options)
        (found,) = evaluate.load_checkpoints(args)
        assert revisions[-1] == (found.revision or "main")
        return found.gguf_file, found.revision

    run = {"model_name_or_path": "some/base", "gguf_file": "a.gguf", "model_revision": "v1"}
    assert base(run) == ("a.gguf", "v1")
    assert base(run, gguf_file=["b.gguf"], model_revision=["v2"]) == ("b.gguf", "v2")
    cut = {**run, "model_name_or_path": "uncut/base"}  # the base is the cut one
    assert base(cut) == base({}) == (None, None)


def test_the_base_of_a_run_that_was_moved_is_found(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run / "out", moved)
    for folder in (moved, moved / "checkpoint-4"):
        path = folder / adapters.ADAPTER_CONFIG
        config = json.loads(path.read_text())
        assert adapters.find(str(folder), None) == (str(run / "out" / "base"), str(folder))
        config["base_model_name_or_path"] = str(tmp_path / "gone" / "base")
        path.write_text(json.dumps(config))
        assert adapters.find(str(folder), None) == (str(moved / "base"), str(folder))
        config["base_model_name_or_path"] = str(tmp_path / "gone")  # some model, and not the run's
        path.write_text(json.dumps(config))
        assert adapters.find(str(folder), None) == (str(tmp_path / "gone"), str(folder))


def test_adapters_that_cannot_be_loaded_say_why(run, tmp_path):
    with pytest.raises(ValueError, match=r"no readable adapter_config\.json"):
        adapters.find("model", str(tmp_path))
    (tmp_path / adapters.ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="names no base model"):
        adapters.find(str(tmp_path), None)
    assert adapters.find(str(run / "model"), None) == (str(run / "model"), None)
    shutil.copy(run / "out" / adapters.ADAPTER_CONFIG, tmp_path)
    save_file({"stray": torch.zeros(1)}, tmp_path / adapters.ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the base model"):
        adapters.load(tiny_model(vocab_size=258), str(tmp_path))
    (tmp_path / adapters.ADAPTER_WEIGHTS).write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot load the adapter"):
        adapters.load(tiny_model(vocab_size=258), str(tmp_path))


def test_caching_is_what_a_configuration_says_by_default(tmp_path):
    assert SwitchConfig(output_dir=str(tmp_path)).use_cache is True


def test_an_adapter_says_what_ends_a_response(tmp_path):
    trainer = base_run(tmp_path)
    trainer.model.generation_config.eos_token_id = [1, 9]  # as with a teacher of another end
    trainer.save_model(str(tmp_path / "saved"))
    model = adapters.load(
        tiny_model("gpt2", vocab_size=trainer.vocabulary.size), tmp_path / "saved"
    )
    assert model.generation_config.eos_token_id == [1, 9]
