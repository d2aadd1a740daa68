"""Configuration: two dataclasses, from which the command line and the YAML keys are made.

Names follow TRL's GKDConfig and ModelConfig where those have one.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from switchkd import calibration
from switchkd.distributed import check_launch
from switchkd.methods import METHODS, preset, with_methods
from switchkd.mixture import FRESH_SHARE
from switchkd.models import EMBEDDED, EMBEDDED_DIR
from switchkd.policies import SCHEDULES, SKD, AdaSwitch, Policy, Student, Switch, Teacher
from switchkd.quantization import NAMED
from switchkd.rollout import Sampling

POLICIES = ("switch", "adaswitch", "skd", "student", "teacher")
LOSSES = (
    "skew_reverse_kl",
    "skew_kl",
    "kl_teacher_student",
    "kl_student_teacher",
    "generalized_jsd",
    "tvd",
    "cross_entropy",
    "contrastive_skew",
)
ALIASES = {  # other projects' names of the same thing
    "max_completion_length": "max_new_tokens",
    "max_prompt_len": "max_prompt_length",
    "torch_dtype": "dtype",
    "skew_lambda": "skew_alpha",
    "teacher_model": "teacher_model_name_or_path",
    "dataset": "dataset_name",
}
DEMO = EMBEDDED_DIR / "demo.yaml"


def option(text: str, default=None):
    """A dataclass field with its help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """Which models and which data."""

    model_name_or_path: str = option("Student: Hub id, folder, or 'embedded'.", EMBEDDED)
    model_revision: str = option("Revision of the student on the Hub.", "main")
    gguf_file: str | None = option("Read the student from this GGUF file in its folder.")
    student_layers: str | None = option("Keep only these layers of the student, e.g. 0-11,18-29.")
    dtype: str = option("Type of the student's weights: float32, bfloat16, auto.", "float32")
    attn_implementation: str | None = option("Attention of both models: sdpa, eager, ...")
    trust_remote_code: bool = option("Allow code from the Hub for both models.", False)
    teacher_model_name_or_path: str | None = option("Teacher: Hub id, folder, or 'embedded'.")
    teacher_model_revision: str = option("Revision of the teacher on the Hub.", "main")
    teacher_gguf_file: str | None = option("Read the teacher from this GGUF file in its folder.")
    teacher_dtype: str = option("Type of the teacher's weights.", "auto")
    teacher_quantization: str | None = option(f"{', '.join(NAMED)}, or JSON of such a config.")
    use_peft: bool = option("Train LoRA adapters on the student (needs peft).", False)
    lora_r: int = option("Rank of the LoRA adapters.", 16)
    lora_alpha: int = option("Scale of the LoRA adapters.", 32)
    lora_dropout: float = option("Dropout of the LoRA adapters.", 0.0)
    lora_target_modules: list[str] | None = option("Their modules: q_proj v_proj; all-linear.")
    dataset_name: str = option("Training data: .jsonl file, Hub id, or 'embedded'.", EMBEDDED)
    dataset_train_split: str = option("Split to train on (Hub and embedded data).", "train")
    eval_dataset_name: str | None = option("Validation data; by default rows held out of training.")
    dataset_test_split: str = option("Split of the validation data.", "validation")
    eval_size: int = option("Rows held out for validation, or at most so many are used.", 100)
    max_train_rows: int | None = option("Use only the first so many rows.")
    skip_malformed: bool = option("Leave malformed rows out instead of stopping.", False)
    template: str = option("auto, chat, alpaca or none.", "auto")


@with_methods
@dataclass
class SwitchConfig(TrainingArguments):
    """How to distil. Extends `transformers.TrainingArguments`; names as in TRL's GKDConfig.

    Raises ValueError at construction for values that cannot work, saying got and expected.
    """

    output_dir: str | None = option("Where the run is written.", "switchkd_output")
    method: str | None = option(
        f"Defaults of a published method: {', '.join(METHODS)}. Options that are given win."
    )
    # rollout: who writes
    rollout_policy: str = option(f"Who writes tokens: {', '.join(POLICIES)}.", "switch")
    switch_schedule: str = option(f"Threshold of SWITCH: {', '.join(SCHEDULES)}.", "exponential")
    switch_tau0: float = option("Threshold at t = 0, in units of the JSD.", 1.0)
    switch_lambda: float = option("Decay of the threshold per token.", 0.1)
    switch_rate: float | None = option("Teacher's share: random, sequence (0.5), mix-in (0.2).")
    switch_tau_min: float = option("Floor of the threshold.", 0.0)
    target_teacher_share: float | None = option(
        "Choose tau0 and lambda so that the teacher writes this share of a rollout's tokens."
    )
    calibration_rows: int = option("Training rows that are rolled out for that choice.", 64)
    jsd_base: str = option("The JSD in bits, at most 1: 2; in nats, at most 0.693: e.", "2")
    importance_weight: bool = option(
        "Weight tokens by q over the mixture they were drawn from (mix-in only).", False
    )
    adaswitch_k: float | None = option("AdaSwitch: hand over above K times the mean (required).")
    adaswitch_window: int | None = option("AdaSwitch: tokens in the mean, L (required).")
    adaswitch_warm_up: int | None = option("AdaSwitch: no hand-over before; default L.")
    skd_top_k: int = option("SKD: the student's token stays if in the teacher's top K.", 25)
    # rollout: how
    lmbda: float = option("Share of rows trained on a rollout; the rest on the data.", 0.5)
    adaptive_lmbda: bool = option(
        "Raise lmbda by 0.1 when validation cross-entropy worsens by 0.1 (DistiLLM).", False
    )
    replay_capacity: int = option("Earlier rollouts kept to be trained on again; 0: none.", 0)
    replay_ratio: str = option(
        "With replay, the share of generated rows that are fresh, over training: decreasing from "
        "1, constant at 0.5, increasing to 1.",
        "decreasing",
    )
    seq_kd: bool = option("Teacher-written sequences only: rollout_policy teacher, lmbda 1.", False)
    temperature: float = option("Sampling temperature of both models, in rollouts only.", 1.0)
    teacher_temperature: float | None = option("Overrides temperature for the teacher.")
    student_temperature: float | None = option("Overrides temperature for the student.")
    top_k: int = option("Sample among the k most likely tokens; 0 is off.", 0)
    top_p: float = option("Sample in the nucleus of this mass.", 1.0)
    min_p: float = option("Sample tokens at least this likely relative to the best.", 0.0)
    max_new_tokens: int = option("Response tokens at most.", 256)
    max_prompt_length: int = option("Prompt tokens at most; longer rows are left out.", 256)
    rollout_batch_size: int = option("Rows decoded together.", 32)
    decoder: str = option(
        "block: one model drafts, the other verifies; naive: step by step.", "block"
    )
    rollout_block: int | None = option("Tokens drafted a round; default: what is cheapest.")
    rollout_drafter: str | None = option("Who drafts: student or teacher; default the cheaper.")
    draft_from_history: bool = option(
        "Try a row's completion of the epoch before as a draft; the output is the same.", False
    )
    noise_per_epoch: bool = option(
        "Fresh noise in each epoch. Without it a completion changes only where the student has, "
        "and is a good draft for the next epoch's.",
        True,
    )
    rollout_dtype: str | None = option(
        "Decode with a copy in this type; default that of --bf16, --fp16."
    )
    # loss
    loss_type: str | None = option(f"One of {', '.join(LOSSES)}; default skew_reverse_kl.")
    skew_alpha: float = option("Skew of skew_kl and skew_reverse_kl, in [0, 1).", 0.1)
    beta: float | None = option("Weight of the teacher in generalized_jsd (default 0.5).")
    detach_mixture: bool = option("No gradient through the skew mixture (DistiLLM-2).", False)
    contrastive_weight: float = option(
        "contrastive_skew: b on the student's tokens, 2 - b on the teacher's.", 1.0
    )
    lm_file: str | None = option("Text file for an extra language-model loss.")
    lm_coef: float = option("Weight of that loss.", 1.0)
    disable_dropout: bool = option("Switch dropout off in the student.", True)
    # devices
    teacher_is_base: bool = option(
        "The teacher is the student without its adapter: one set of weights (needs a LoRA).", False
    )
    shard_teacher: bool = option(
        "Keep the teacher in parts on the GPUs of a machine, whole only while it decodes.", False
    )
    # sight
    eval_temperature: float = option("Temperature of the validation samples.", 1.0)
    log_completions: bool = option("Print a coloured sample with every log line.", True)
    save_completions: bool = option("Write every rollout to completions.jsonl.", True)
    overwrite_output_dir: bool = option("Start anew in a folder that holds another run.", False)
    # defaults of TrainingArguments that differ here
    per_device_train_batch_size: int = option("Rows per device and micro-batch.", 8)
    lr_scheduler_type: str = option("Learning-rate schedule.", "cosine")
    weight_decay: float = option("AdamW weight decay.", 0.01)
    logging_steps: float = option("Steps between log lines.", 10)
    eval_strategy: str = option("When to validate: no, steps, epoch.", "epoch")
    save_strategy: str = option("When to save: no, steps, epoch, best.", "epoch")
    save_total_limit: int | None = option("Checkpoints kept, the best always.", 2)
    metric_for_best_model: str | None = option("Chooses the best checkpoint.", "rouge_l")
    load_best_model_at_end: bool = option("End with the best checkpoint.", True)
    remove_unused_columns: bool | None = option("Must stay off.", False)
    use_cache: bool = option("What the student's config says; rollouts always cache.", True)
    dataloader_pin_memory: bool = option("Batches of row numbers need no pinning.", False)

    def __post_init__(self):
        if self.seq_kd:
            self.rollout_policy, self.lmbda = "teacher", 1.0
        if self.loss_type is None:
            self.loss_type = "skew_reverse_kl" if self.beta is None else "generalized_jsd"
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") == "rouge_l"
        if not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments wants to be told before it allows bf16 there
        self._check()
        check_launch(deepspeed=self.deepspeed)
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"got {self.n_gpu} GPUs in one process, expected one process for each: "
                "accelerate launch -m switchkd.train, or CUDA_VISIBLE_DEVICES"
            )
        check_launch(fsdp=self.fsdp_plugin_args)

    def _check(self) -> None:
        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        need("rollout_policy", self.rollout_policy in POLICIES, f"one of {POLICIES}")
        need("loss_type", self.loss_type in LOSSES, f"one of {LOSSES}")
        need("lmbda", 0 <= self.lmbda <= 1, "a share in [0, 1]")
        sft = self.method == "sft" and self.needs_teacher
        need("method", not sft, f"loss_type cross_entropy without a teacher, not {self.loss_type}")
        need("skew_alpha", 0 <= self.skew_alpha < 1, "a number in [0, 1)")
        jsd = self.loss_type == "generalized_jsd"
        need("beta", self.beta is None or jsd, "no beta unless loss_type is generalized_jsd")
        need("beta", self.beta is None or 0 <= self.beta <= 1, "a number in [0, 1]")
        need("contrastive_weight", 0 <= self.contrastive_weight <= 2, "a number in [0, 2]")
        need("jsd_base", str(self.jsd_base) in ("2", "e"), "2 or e")
        self._check_mixture(need)
        for name in (
            "max_new_tokens",
            "max_prompt_length",
            "rollout_batch_size",
            "calibration_rows",
        ):
            need(name, getattr(self, name) >= 1, "an integer >= 1")
        need("decoder", self.decoder in ("block", "naive"), "block or naive")
        block = self.rollout_block
        need("rollout_block", block is None or block >= 1, "an integer >= 1, or none")
        drafters = (None, "student", "teacher")
        need("rollout_drafter", self.rollout_drafter in drafters, "student or teacher, or none")
        dtypes = (None, "float32", "bfloat16", "float16")
        need("rollout_dtype", self.rollout_dtype in dtypes, f"one of {dtypes}")
        need("lm_coef", self.lm_coef >= 0, "a number >= 0")
        apart = not (self.shard_teacher and self.teacher_is_base)
        need("shard_teacher", apart, "false with teacher_is_base, whose weights are the student's")
        need("eval_temperature", self.eval_temperature >= 0, "a number >= 0")
        need("learning_rate", self.learning_rate > 0, "a number > 0")
        metrics = ("rouge_l", "kl", "jsd", "cross_entropy")
        best = (self.metric_for_best_model or "rouge_l").removeprefix("eval_")
        need("metric_for_best_model", best in metrics, f"one of {metrics}")
        self.policy()
        self.sampling()
        if self.target_teacher_share is not None:
            calibration.check(self.policy(), self.target_teacher_share)
            rolls = self.lmbda > 0 or self.adaptive_lmbda
            need("target_teacher_share", rolls, "rollouts: lmbda > 0")

    def _check_mixture(self, need) -> None:
        validates = self.eval_strategy != "no" or not self.adaptive_lmbda
        need("adaptive_lmbda", validates, "an eval_strategy: it follows the validation loss")
        need("replay_capacity", self.replay_capacity >= 0, "an integer >= 0")
        need("replay_ratio", self.replay_ratio in FRESH_SHARE, f"one of {tuple(FRESH_SHARE)}")
        mixed = (self.rollout_policy, self.switch_schedule) == ("switch", "mix-in")
        plain = not self.importance_weight or (mixed and self.sampling() == Sampling(self.seed))
        need(
            "importance_weight", plain, "switch_schedule mix-in, temperature 1 and no top_k, top_p"
        )
        fresh = self.replay_capacity == 0 or not self.importance_weight
        need("importance_weight", fresh, "no replay: the weight is that of the student who wrote")

    @property
    def needs_teacher(self) -> bool:
        rollouts = self.lmbda > 0 or self.adaptive_lmbda
        return self.loss_type != "cross_entropy" or (rollouts and self.policy().needs_teacher)

    def decoding_dtype(self) -> torch.dtype | None:
        """Type of the student's copy that writes rollouts; None: no copy."""
        mixed = "bfloat16" if self.bf16 else "float16" if self.fp16 else None
        name = self.rollout_dtype or mixed
        return None if name is None else getattr(torch, name)

    def policy(self) -> Policy:
        """The rollout policy of this configuration."""
        if self.rollout_policy == "switch":
            rate = {"random": 0.5, "mix-in": 0.2}.get(self.switch_schedule, 0.5)
            return Switch(
                schedule=self.switch_schedule,
                tau0=self.switch_tau0,
                decay=self.switch_lambda,
                rate=rate if self.switch_rate is None else self.switch_rate,
                tau_min=self.switch_tau_min,
                max_new_tokens=self.max_new_tokens,
                base=2 if str(self.jsd_base) == "2" else self.jsd_base,
            )
        if self.rollout_policy == "adaswitch":
            return AdaSwitch(
                K=self.adaswitch_k, L=self.adaswitch_window, warm_up=self.adaswitch_warm_up
            )
        if self.rollout_policy == "skd":
            return SKD(top_k=self.skd_top_k)
        return Student() if self.rollout_policy == "student" else Teacher()

    def sampling(self) -> Sampling:
        """How rollouts draw tokens; the seed is the run's."""

        def either(own):
            return self.temperature if own is None else own

        return Sampling(
            seed=self.seed,
            teacher_temperature=either(self.teacher_temperature),
            student_temperature=either(self.student_temperature),
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )


def read_yaml(path: str, *classes) -> dict:
    """A YAML mapping with known keys only; aliases are translated."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"config: got {path}, expected an existing YAML file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: got {type(values).__name__}, expected key: value lines")
    known = {f.name: f.type for cls in classes for f in fields(cls) if f.init}
    clean = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name not in known:
            near = difflib.get_close_matches(str(key), [*known, *ALIASES], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"config {path}: got the unknown key {key!r}{hint}")
        if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", value):
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        elif str(known[name]).removeprefix("<class '").startswith("str"):  # parsers resolve names
            if isinstance(value, dict):
                value = json.dumps(value)
            elif isinstance(value, (int, float)):
                value = str(value)  # student_layers: 0
        clean[name] = value
    return clean


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, SwitchConfig]:
    """Command line and YAML to configuration; flags win over the file.

    Without a config file and without a model, the embedded demonstration is configured.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    classes = (ScriptArguments, SwitchConfig)
    argv = [_translate(argument) for argument in argv]
    parser = HfArgumentParser(classes, prog="python -m switchkd.train", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options; flags win.")
    given = {a.split("=")[0] for a in argv if a.startswith("--")}
    path = _value_of("--config", argv)
    if path is None and not given & {"--model_name_or_path", "--dataset_name"}:
        path = str(DEMO)
    values = {} if path is None else read_yaml(path, *classes)
    method = _value_of("--method", argv) or values.get("method")
    named = {flag[2:].replace("-", "_") for flag in given}
    parser.set_defaults(**preset(method, {*values, *named}))
    parser.set_defaults(**values)
    unknown = given - {o for action in parser._actions for o in action.option_strings}
    if unknown:
        flag = sorted(unknown)[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"got the unknown option {flag}{hint}")
    script, config, _ = parser.parse_args_into_dataclasses(argv)
    return script, config


def _value_of(flag: str, argv: list[str]) -> str | None:
    """What follows a flag, the last time that it is there; None if it is not."""
    found = None
    for at, argument in enumerate(argv):
        name, sep, value = argument.partition("=")
        if name == flag:
            found = value if sep else "".join(argv[at + 1 : at + 2])
    return found


def _translate(argument: str) -> str:
    flag, sep, value = argument.partition("=")
    name = ALIASES.get(flag[2:]) if flag.startswith("--") else None
    return f"--{name}{sep}{value}" if name else argument
