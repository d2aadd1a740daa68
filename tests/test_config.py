"""Flags, YAML, aliases, presets; impossible values refused at once."""

from pathlib import Path

import pytest
import yaml

from switchkd.config import DEMO, ScriptArguments, SwitchConfig, parse
from switchkd.policies import SKD, AdaSwitch, Student, Switch, Teacher
from switchkd.train import peft_config

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


def test_a_gkd_config_runs_unchanged(tmp_path):
    path = write(
        tmp_path,
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
    assert c.sampling().student_temperature == c.sampling().teacher_temperature == 0.9


def test_aliases_and_seq_kd(tmp_path):
    path = write(tmp_path, model_name_or_path="a", max_completion_length=33)
    assert parse(["--config", path])[1].max_new_tokens == 33
    args = ["--model_name_or_path", "a", "--max_completion_length=44", "--seq_kd", "true"]
    _, c = parse(args)
    assert (c.max_new_tokens, c.rollout_policy, c.lmbda) == (44, "teacher", 1.0)


def test_yaml_numbers_written_as_1e_minus_4_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: a\nlearning_rate: 1e-4\n")
    assert parse(["--config", str(path)])[1].learning_rate == 1e-4


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
