"""Flags, YAML, aliases, presets; impossible values refused at once."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import switchkd
from switchkd.__main__ import MODULES
from switchkd.__main__ import main as command
from switchkd.arguments import ScriptArguments
from switchkd.command_line import DEMO, parse
from switchkd.config import SwitchConfig
from switchkd.loading import peft_config
from switchkd.names import ALIASES, hint_of
from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher
from switchkd.run_folder import run_settings

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
ACCELERATE = sorted((Path(__file__).parent.parent / "examples" / "accelerate").glob("*.yaml"))


def config(**kwargs):
    return SwitchConfig(use_cpu=True, **kwargs)


def write(tmp_path, **values):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_defaults_are_the_papers():
    c = config()
    assert (c.rollout_policy, c.loss_type, c.skew_alpha) == ("switch", "skew_reverse_kl", 0.1)
    assert c.policy() == Switch(schedule="exponential", tau0=1.0, decay=0.1, max_new_tokens=256)
    assert (c.lmbda, c.temperature) == (0.5, 1.0)
    assert c.greater_is_better is True


def test_flags_win_over_the_file(tmp_path):
    path = write(tmp_path, model_name_or_path="a", lmbda=0.25, learning_rate=1e-4)
    script, c = parse(["--config", path, "--lmbda", "0.75"])
    assert (script.model_name_or_path, c.lmbda, c.learning_rate) == ("a", 0.75, 1e-4)


@pytest.mark.parametrize(
    "validate, save, best", [(0.1, 0.3, True), (0.1, 0.25, False), (2, 6, True), (2, 3, False)]
)
def test_the_best_is_loaded_where_every_checkpoint_has_been_validated(validate, save, best):
    steps = dict(eval_strategy="steps", eval_steps=validate, save_strategy="steps", save_steps=save)
    assert config(**steps).load_best_model_at_end is best


def test_a_gkd_config_keeps_its_names(tmp_path):
    path = write(
        tmp_path,
        method="gkd",  # without it, SWITCH writes the rollouts
        model_name_or_path="student",
        teacher_model_name_or_path="teacher",
        dataset_name="data",
        temperature=0.9,
        lmbda=0.5,
        beta=0.5,
        max_new_tokens=128,
        disable_dropout=True,
        seq_kd=False,
    )
    _, c = parse(["--config", path])
    assert (c.loss_type, c.beta, c.max_new_tokens) == ("generalized_jsd", 0.5, 128)
    assert c.policy() == Student()
    assert c.sampling().student_temperature == c.sampling().teacher_temperature == 0.9


@pytest.mark.parametrize(
    "name, instead",
    [
        ("max_length", "max_prompt_length and max_new_tokens"),
        ("teacher_model_init_kwargs", "teacher_dtype, teacher_quantization, attn_implementation"),
        ("packing", "none: rows are never packed"),
    ],
)
def test_options_of_trl_without_a_counterpart_name_what_to_give(tmp_path, name, instead):
    with pytest.raises(ValueError, match=rf"key '{name}' \(TRL's\), expected {instead}"):
        parse(["--config", write(tmp_path, **{name: 1})])
    with pytest.raises(ValueError, match=rf"option --{name} \(TRL's\), expected {instead}"):
        parse([f"--{name.replace('_', '-')}", "1"])


@pytest.mark.parametrize("where, name", [("trl", "Distillation"), ("trl.experimental.gkd", "GKD")])
def test_every_option_of_trl_is_one_here_or_names_what_to_give(monkeypatch, where, name):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    config = getattr(pytest.importorskip(where), f"{name}Config", None)
    if config is None:
        pytest.skip("this version of TRL has none")
    ours = {field.name for kind in (ScriptArguments, SwitchConfig) for field in fields(kind)}
    for field in fields(config):
        assert field.name in ours | ALIASES.keys() or "(TRL's)" in hint_of(field.name, ours)


def test_aliases_and_seq_kd(tmp_path):
    path = write(tmp_path, model_name_or_path="a", max_completion_length=33)
    assert parse(["--config", path, "--max-completion-length", "34"])[1].max_new_tokens == 34
    assert parse(["--config", path])[1].max_new_tokens == 33
    args = ["--model_name_or_path", "a", "--max_completion_length=44", "--seq_kd", "true"]
    _, c = parse(args)
    assert (c.max_new_tokens, c.rollout_policy, c.lmbda) == (44, "teacher", 1.0)


def from_text(tmp_path, text, *flags):
    path = tmp_path / "text.yaml"
    path.write_text(f"model_name_or_path: a\n{text}\n")
    return parse(["--config", str(path), *flags])


def test_yaml_values_become_what_they_mean(tmp_path):
    assert from_text(tmp_path, "learning_rate: 1e-4")[1].learning_rate == 1e-4
    assert from_text(tmp_path, "student_layers: 0")[0].student_layers == "0"
    resumed = from_text(tmp_path, "resume_from_checkpoint: true")[1]
    assert resumed.resume_from_checkpoint == "True"
    assert from_text(tmp_path, "report_to: [tensorboard]")[1].report_to == ["tensorboard"]
    assert from_text(tmp_path, "rollout_dtype: fp16")[1].rollout_dtype == "float16"
    script, _ = from_text(tmp_path, "use_peft: true\nlora_target_modules: q_proj\ndtype: bf16")
    assert (script.lora_target_modules, script.dtype) == (["q_proj"], "bfloat16")
    c = from_text(tmp_path, "eval_strategy: no\nsave_strategy: no\nsave_total_limit: null")[1]
    assert (c.eval_strategy, c.save_strategy, c.save_total_limit) == ("no", "no", None)
    text = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5, a: inf}"
    assert from_text(tmp_path, text)[1].lr_scheduler_kwargs == {"min_lr": 1e-5, "a": "inf"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate:", "learning_rate: got None, expected a number"),
        ("learning_rate: fast", "learning_rate: got 'fast', expected a number"),
        ("lmbda: [0.5]", r"lmbda: got \[0.5\], expected a number"),
        ("lmbda: {a: 1}", "lmbda: got {'a': 1}, expected a number"),
        ("rollout_batch_size: 2.5", "rollout_batch_size: got 2.5, expected an integer"),
        ("max_train_rows: [1]", r"max_train_rows: got \[1\], expected an integer or null"),
        ("bf16: perhaps", "bf16: got 'perhaps', expected true or false"),
        ("torch_dtype: [a]", r"torch_dtype: got \['a'\], expected text"),
        ("dtype: bf17", "dtype: got 'bf17', expected float32, bfloat16, float16, float64 or auto"),
        ("max_new_tokens: 4\nmax_completion_length: 4", "max_new_tokens and its alias"),
        ("lmbda: 1\nlora_r: 3\nlmbda: 0", "not valid YAML .the key 'lmbda' is there twice"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor: got 0.1, expected 0"),
        ("train_sampling_strategy: group_by_length", "got 'group_by_length', expected random or"),
        ("train_sampling_strategy: batch_rebalance", "got 'batch_rebalance', expected random or"),
        ("template: alpacca", "template: got 'alpacca', expected one of auto, chat, alpaca, none"),
        ("lora_r: 8", "lora_r: got 8, expected use_peft true with it"),
        ("eval_size: 0", "eval_size: got 0, expected an integer >= 1"),
        ("max_train_rows: 0", "max_train_rows: got 0, expected an integer >= 1"),
        ("method: kd\nrollout_policy: skd", "method kd, which trains on data alone; .* lmbda > 0"),
    ],
)
def test_yaml_values_that_cannot_work(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        from_text(tmp_path, text)


def test_names_of_other_projects_in_python(tmp_path):
    assert config(max_completion_length=7).max_new_tokens == 7
    for given, message in (
        ({"max_length": 9}, "'max_length' .TRL's., expected max_prompt_length and max_new_tokens"),
        ({"swich_tau0": 1}, "'swich_tau0'; did you mean switch_tau0"),
        ({"max_completion_length": 7, "max_new_tokens": 8}, "max_new_tokens and its alias"),
    ):
        with pytest.raises(TypeError, match=message):
            config(**given)


def test_a_bad_flag_takes_one_line(capsys):
    with pytest.raises(ValueError) as error:
        parse(["--learning_rate", "abc"])
    assert str(error.value) == "argument --learning_rate: invalid float value: 'abc'"
    assert capsys.readouterr() == ("", "")


def test_steps_choose_their_strategy_and_the_best_is_loaded_where_it_can_be():
    def chosen(**given):
        c = config(**given)
        return c.eval_strategy.value, c.save_strategy.value, c.load_best_model_at_end

    assert chosen() == ("epoch", "epoch", True)
    assert chosen(eval_steps=20, save_steps=40) == ("steps", "steps", True)
    assert chosen(eval_steps=20, save_steps=30) == ("steps", "steps", False)
    assert chosen(save_steps=30) == ("epoch", "steps", False)
    assert chosen(eval_strategy="steps", eval_steps=20) == ("steps", "epoch", False)
    assert chosen(eval_steps=20, save_strategy="best") == ("steps", "best", True)
    assert chosen(eval_steps=20, eval_strategy="no") == ("no", "epoch", False)
    assert chosen(load_best_model_at_end=False) == ("epoch", "epoch", False)
    with pytest.raises(ValueError, match="requires the save and eval strategy to match"):
        chosen(eval_steps=20, load_best_model_at_end=True)


def test_epochs_that_are_given_win_over_the_steps_of_a_file(tmp_path):
    assert parse(["--num_train_epochs", "1"])[1].max_steps == -1
    assert parse(["--num_train_epochs", "1", "--max_steps", "2"])[1].max_steps == 2
    assert from_text(tmp_path, "max_steps: 9", "--num_train_epochs=2")[1].max_steps == -1


def test_a_policy_needs_a_share_of_rollouts():
    assert config(method="kd", rollout_policy="switch", lmbda=0.5).lmbda == 0.5
    assert config(method="distillm", rollout_policy="switch").adaptive_lmbda


@pytest.mark.parametrize("method", ["switch", "kd", "distillm2"])
def test_what_a_run_writes_down_configures_the_same_run(tmp_path, method):
    before = run_settings(*parse(["--method", method]))
    path = write(tmp_path, **before)
    assert run_settings(*parse(["--config", path])) == before


def test_commands(capsys):
    assert command(["--version"]) == 0
    assert capsys.readouterr().out == f"switchkd {switchkd.__version__}\n"
    for name in MODULES:
        with pytest.raises(SystemExit) as done:
            command([name, "--help"])
        assert done.value.code == 0 and "usage:" in capsys.readouterr().out
    assert command(["--learning_rate", "abc"]) == 1
    assert "error: argument --learning_rate: invalid" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, expected",
    [("switch", Switch), ("skd", SKD), ("student", Student), ("teacher", Teacher)],
)
def test_policies_by_name(name, expected):
    assert isinstance(config(rollout_policy=name).policy(), expected)


def test_adaswitch_needs_its_k_and_l():
    with pytest.raises(ValueError, match="adaswitch_k: got None"):
        config(rollout_policy="adaswitch")
    made = config(rollout_policy="adaswitch", adaswitch_k=2.0, adaswitch_window=8).policy()
    assert made == AdaSwitch(K=2.0, L=8)


def test_without_a_metric_the_best_is_that_of_rouge_l():
    best = config(metric_for_best_model=None, eval_steps=5, save_steps=5)
    assert best.load_best_model_at_end and best.metric_for_best_model == "rouge_l"
    assert best.greater_is_better


def test_mix_in_and_random_have_the_papers_rates():
    assert config(switch_schedule="mix-in").policy().rate == 0.2
    assert config(switch_schedule="random").policy().rate == 0.5
    assert config(switch_schedule="random", switch_rate=0.53).policy().rate == 0.53


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lmbda": 1.5}, r"lmbda: got 1.5, expected a share in \[0, 1\]"),
        ({"rollout_policy": "swich"}, "rollout_policy: got 'swich', expected one of"),
        ({"loss_type": "mse"}, "loss_type: got 'mse', expected one of"),
        ({"skew_alpha": 1.0}, r"skew_alpha: got 1.0, expected a number in \[0, 1\)"),
        ({"loss_type": "tvd", "beta": 0.5}, "beta: got 0.5, expected no beta unless"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected an integer >= 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected"),
        ({"switch_tau0": 0.0}, "switch_tau0: got 0.0, expected a number > 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected a number > 0"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model: got 'loss', expected one of"),
        ({"rollout_dtype": "int7"}, "rollout_dtype: got 'int7', expected"),
        ({"switch_rate": 0.4}, "switch_rate: got 0.4, expected no rate unless switch_schedule"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0, expected an int"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: got 0, expected an int"),
        ({"method": "sft", "lmbda": 0.5}, "method: got 'sft', expected no rollouts .*: switch"),
        ({"method": "sft", "adaptive_lmbda": True}, "method: got 'sft', expected no rollouts"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha: got -1, expected a number >= 0"),
        ({"max_steps": 0}, "max_steps: got 0, expected an integer >= 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs: got 0, expected > 0, or max_steps"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_unknown_keys_and_flags_suggest_the_right_one(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'lmda'; did you mean lmbda"):
        parse(["--config", write(tmp_path, lmda=0.5)])
    with pytest.raises(
        ValueError, match="unknown key 'max_new_token'; did you mean max_new_tokens"
    ):
        parse(["--config", write(tmp_path, max_new_token=5)])
    for usual, meant in (("lr", "learning_rate"), ("batch_size", "per_device_train_batch_size")):
        with pytest.raises(
            ValueError, match=rf"unknown option --{usual}; did you mean --{meant}\?"
        ):
            parse([f"--{usual}", "1"])
    with pytest.raises(ValueError, match=r"unknown option --lmbd; did you mean --lmbda"):
        parse(["--model_name_or_path", "a", "--lmbd", "1"])


def test_broken_or_missing_files(tmp_path):
    with pytest.raises(ValueError, match="expected an existing YAML file"):
        parse(["--config", str(tmp_path / "absent.yaml")])
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(["--config", str(tmp_path / "bad.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="got list, expected key: value lines"):
        parse(["--config", str(tmp_path / "list.yaml")])


def test_no_arguments_is_the_embedded_demonstration():
    script, c = parse([])
    assert script.model_name_or_path == script.teacher_model_name_or_path == "embedded"
    assert script.student_layers is not None and c.max_steps > 0
    assert parse(["--max_steps", "3"])[1].max_steps == 3


@pytest.mark.parametrize("path", [DEMO, *EXAMPLES], ids=lambda p: p.stem)
def test_every_preset_builds_its_configuration(path):
    script, c = parse(["--config", str(path), "--use_cpu", "true"])
    assert isinstance(script, ScriptArguments)
    assert c.policy() is not None
    if c.needs_teacher:
        assert script.teacher_model_name_or_path is not None
    if "openllama" in path.stem:
        pytest.importorskip("peft")
        assert script.use_peft and script.lora_r == 16
        lora = peft_config(script)
        assert lora.r == 16 and lora.target_modules == {"q_proj", "v_proj"}
        assert (lora.lora_alpha, lora.lora_dropout) == (64, 0.1)
    if path.stem.startswith(("gpt2", "opt", "openllama", "sft_dolly")):
        assert script.max_response_length == 512 and c.max_new_tokens == 256
        assert c.disable_dropout == ("openllama" in path.stem)
    assert ("dolly-15k" in path.read_text()) == ("# exclude_dataset_name: " in path.read_text())


def test_the_papers_pairs_are_all_there():
    names = {path.stem for path in EXAMPLES}
    pairs = {f"gpt2_xl_to_{s}" for s in ("base", "medium", "large")}
    pairs |= {f"opt_2.7b_to_{s}" for s in ("125m", "350m", "1.3b")}
    assert pairs | {"openllama_7b_to_3b", "smollm2_dolly", "smollm2_sft"} <= names


@pytest.mark.parametrize(
    "launched, message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "got DeepSpeed, expected DDP or FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: got 1, expected 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
             "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: got true, expected false",
        ),
    ],
)  # fmt: skip
def test_launches_that_cannot_roll_out_are_refused(monkeypatch, launched, message):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        config()


def test_fsdp_of_the_trainer_must_be_version_2(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # TrainingArguments sets it
    with pytest.raises(ValueError, match="fsdp_version: got 1, expected 2"):
        config(fsdp=True, fsdp_config={"version": 1})
    assert config(fsdp=True).fsdp_plugin_args["fsdp_version"] == 2


def test_a_backend_for_processes_does_not_matter_to_one(tmp_path):
    assert SwitchConfig(output_dir=tmp_path, ddp_backend="gloo").process_index == 0


def test_accelerate_configurations_launch_what_they_say(monkeypatch):
    """Through accelerate's own reading of them, into the environment that a process sees."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    seen = {}
    for path in ACCELERATE:
        arguments = ["--config_file", str(path), "-m", "switchkd.train"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        environment = prepare_multi_gpu_env(args)
        wanted = {k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_USE"))}
        with monkeypatch.context() as patch:
            for name, value in wanted.items():
                patch.setenv(name, value)
            config()  # refuses what cannot work
        fsdp = wanted.get("ACCELERATE_USE_FSDP") == "true"
        seen[path.stem] = args.num_processes, args.multi_gpu, fsdp
        assert "-m switchkd.train" in path.read_text().replace("\\\n#    ", "")
    assert seen == {
        "single": (1, False, False),
        "ddp": (8, True, False),
        "fsdp2": (8, False, True),
        "fsdp2_sharded_teacher": (8, False, True),
    }
