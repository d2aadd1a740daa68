"""How to distil: the options of `SwitchConfig`, which are flags and YAML keys, and their checks.

Names follow TRL's GKDConfig where it has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments

from switchkd import calibration
from switchkd.arguments import (
    DTYPES,
    check_numbers,
    expect,
    is_whole,
    option,
    read_mapping,
)
from switchkd.distributed import check_launch
from switchkd.methods import METHODS, WithMethods
from switchkd.mixture import FRESH_SHARE
from switchkd.policies import SCHEDULES, SKD, AdaSwitch, Policy, Student, Switch, Teacher
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
COLDEST = 1e-5  # temperature: what is colder would overflow
RATES = {"random": 0.5, "mix-in": 0.2, "sequence": 0.5}  # the teacher's share by default


@dataclass
class SwitchConfig(TrainingArguments, metaclass=WithMethods):
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
    chat_template_kwargs: dict | str | None = option(
        'What the chat template is told, e.g. {"enable_thinking": false}; saved with the student.'
    )
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
    overwrite_output_dir: bool = option(
        "Start anew in a folder that holds another run, which is kept until something is saved.",
        False,
    )
    # defaults of TrainingArguments that differ here
    per_device_train_batch_size: int = option("Rows per device and micro-batch.", 8)
    lr_scheduler_type: str = option("Learning-rate schedule.", "cosine")
    weight_decay: float = option("AdamW weight decay.", 0.01)
    logging_steps: float = option("Steps between log lines.", 10)
    eval_strategy: str | None = option(
        "When to validate: no, steps, epoch. Default: steps with eval_steps, epoch without."
    )
    save_strategy: str | None = option(
        "When to save: no, steps, epoch, best. Default: steps with save_steps, epoch without."
    )
    save_steps: float | None = option("Steps between checkpoints; below 1, a share of the run.")
    save_total_limit: int | None = option("Checkpoints kept, the best always.", 2)
    metric_for_best_model: str | None = option("Chooses the best checkpoint.", "rouge_l")
    load_best_model_at_end: bool | None = option(
        "End with the best checkpoint. Default: where every checkpoint has been validated.",
        nargs="?",
        const=True,
    )
    remove_unused_columns: bool | None = option("Must stay off.", False)
    use_cache: bool = option("What the student's config says; rollouts always cache.", True)
    dataloader_pin_memory: bool = option("Batches of row numbers need no pinning.", False)

    def __post_init__(self):
        check_numbers(self)
        if self.seq_kd:
            self.rollout_policy, self.lmbda = "teacher", 1.0
        if self.loss_type is None:
            self.loss_type = "skew_reverse_kl" if self.beta is None else "generalized_jsd"
        for kind in ("eval", "save"):
            if getattr(self, f"{kind}_strategy") is None:
                epochs = getattr(self, f"{kind}_steps") is None
                setattr(self, f"{kind}_strategy", "epoch" if epochs else "steps")
        if self.save_steps is None:
            self.save_steps = 500
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self._checkpoints_are_validated()
        self.rollout_dtype = DTYPES.get(self.rollout_dtype, self.rollout_dtype)
        follows = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if self.load_best_model_at_end or self.save_strategy == "best" or follows:
            self.metric_for_best_model = self.metric_for_best_model or "rouge_l"  # not the loss
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") == "rouge_l"
        if not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments wants to be told before it allows bf16 there
        sizes = [f"{name}_SIZE" for name in ("WORLD", "PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")]
        if get_int_from_env(sizes, 1) == 1:
            self.ddp_backend = None  # accelerate would look for the other processes
        self._check()
        check_launch(deepspeed=self.deepspeed)
        try:
            super().__post_init__()
        except TypeError as error:
            if self.accelerator_config is None:
                raise
            raise ValueError(
                f"accelerator_config: got {self.accelerator_config}: {error}"
            ) from None
        if follows:  # the larger Rouge-L the better; both schedulers expect a loss
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})
        if self.n_gpu > 1:
            raise ValueError(
                f"got {self.n_gpu} GPUs in one process, expected one process for each: "
                "accelerate launch -m switchkd.train, or CUDA_VISIBLE_DEVICES"
            )
        check_launch(fsdp=self.fsdp_plugin_args)

    def _check(self) -> None:
        need = partial(expect, self)
        read_mapping(self, "chat_template_kwargs")
        need("rollout_policy", self.rollout_policy in POLICIES, f"one of {POLICIES}")
        need("loss_type", self.loss_type in LOSSES, f"one of {LOSSES}")
        need("lmbda", 0 <= self.lmbda <= 1, "a share in [0, 1]")
        if self.method == "sft":
            loss, policy = self.loss_type, self.rollout_policy
            need("method", loss == "cross_entropy", f"loss_type cross_entropy, not {loss}")
            alone = "no rollouts (lmbda 0, no adaptive_lmbda) or those of rollout_policy student"
            need("method", not self.needs_teacher, f"{alone}: {policy} needs a teacher")
        jsd = self.loss_type == "generalized_jsd"
        need("beta", self.beta is None or jsd, "no beta unless loss_type is generalized_jsd")
        near = "a number in [0, 1{}; if neither 0 nor 1, at least 1e-4 from both"
        for name, ends, bracket in (("skew_alpha", (0,), ")"), ("beta", (None, 0, 1), "]")):
            value = getattr(self, name)  # the loss needs it and 1 less it
            need(name, value in ends or 1e-4 <= value <= 1 - 1e-4, near.format(bracket))
        need("contrastive_weight", 0 <= self.contrastive_weight <= 2, "a number in [0, 2]")
        need("jsd_base", str(self.jsd_base) in ("2", "e"), "2 or e")
        rated = self.switch_schedule in RATES
        rates = f"no rate unless switch_schedule is one of {tuple(RATES)}"
        need("switch_rate", self.switch_rate is None or rated, rates)
        self._check_mixture(need)
        for name in (
            "max_new_tokens",
            "max_prompt_length",
            "rollout_batch_size",
            "calibration_rows",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            need(name, is_whole(getattr(self, name), 1), "an integer >= 1")
        need("decoder", self.decoder in ("block", "naive"), "block or naive")
        block = self.rollout_block
        need("rollout_block", block is None or is_whole(block, 1), "an integer >= 1, or none")
        need("top_k", is_whole(self.top_k, 0), "an integer >= 0")
        drafters = (None, "student", "teacher")
        need("rollout_drafter", self.rollout_drafter in drafters, "student or teacher, or none")
        dtypes = (None, *DTYPES.values())
        need("rollout_dtype", self.rollout_dtype in dtypes, f"one of {dtypes}")
        need("lm_coef", self.lm_coef >= 0, "a number >= 0")
        mixes = ("skew_reverse_kl", "generalized_jsd", "contrastive_skew", "cross_entropy")
        detached = not self.detach_mixture or self.loss_type in mixes
        need("detach_mixture", detached, f"false with loss_type {self.loss_type}: it mixes nothing")
        apart = not (self.shard_teacher and self.teacher_is_base)
        need("shard_teacher", apart, "false with teacher_is_base, whose weights are the student's")
        need("label_smoothing_factor", self.label_smoothing_factor == 0, "0: no loss here knows it")
        sampling = ("random", "sequential")  # the others ask rows for their length
        known = getattr(self, "train_sampling_strategy", "random") in sampling
        need("train_sampling_strategy", known, " or ".join(sampling))
        for name in (
            "temperature",
            "eval_temperature",
            "teacher_temperature",
            "student_temperature",
        ):
            value = getattr(self, name)
            warm = value in (None, 0) or COLDEST <= value < math.inf
            need(name, warm, f"0, for the largest logit, or a finite number >= {COLDEST:g}")
        need("switch_lambda", self.switch_lambda < math.inf, "a finite number")
        need("learning_rate", 0 < self.learning_rate < math.inf, "a number > 0")
        need("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0")
        static = "false: gradients would not be averaged, for a loss goes past DDP's outputs"
        need("ddp_static_graph", not getattr(self, "ddp_static_graph", None), static)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            need(
                name, not getattr(self, name), "false; bf16 and rollout_dtype say what writes in it"
            )
        need("max_steps", self.max_steps != 0, "an integer >= 1, or -1 for num_train_epochs")
        by_steps = self.max_steps > 0
        need("num_train_epochs", self.num_train_epochs > 0 or by_steps, "> 0, or max_steps >= 1")
        noise = self.neftune_noise_alpha
        need("neftune_noise_alpha", noise is None or noise >= 0, "a number >= 0, or none")
        metrics = ("rouge_l", "kl", "jsd", "cross_entropy")
        best = (self.metric_for_best_model or "rouge_l").removeprefix("eval_")
        need("metric_for_best_model", best in metrics, f"one of {metrics}")
        self.policy()
        self.sampling()
        if self.target_teacher_share is not None:
            calibration.check(self.policy(), self.target_teacher_share)
            need("target_teacher_share", self.rolls_out, "rollouts: lmbda > 0")

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

    def _checkpoints_are_validated(self) -> bool:
        """What load_best_model_at_end asks for."""
        if self.eval_strategy == "no" or self.save_strategy not in (self.eval_strategy, "best"):
            return False
        times = self.save_steps / (self.eval_steps or self.logging_steps or 1)
        # Shares of a run are no multiples of each other: 0.3 % 0.1 is almost 0.1.
        return self.save_strategy != "steps" or abs(times - round(times)) < 1e-9

    @property
    def rolls_out(self) -> bool:
        """Whether text is written, be it only later."""
        return self.lmbda > 0 or self.adaptive_lmbda

    @property
    def rows_per_batch(self) -> int:
        """Rows of one pass, all processes together; dataloader_drop_last drops fewer."""
        shared = self.accelerator_config.split_batches  # a batch is that of all processes
        return self.per_device_train_batch_size * (1 if shared else self.world_size)

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_batch * self.gradient_accumulation_steps

    @property
    def needs_teacher(self) -> bool:
        if self.loss_type != "cross_entropy":
            return True
        return self.rolls_out and self.policy().needs_teacher

    def decoding_dtype(self) -> torch.dtype | None:
        """Type of the student's copy that writes rollouts; None: no copy."""
        mixed = "bfloat16" if self.bf16 else "float16" if self.fp16 else None
        name = self.rollout_dtype or mixed
        return None if name is None else getattr(torch, name)

    def policy(self) -> Policy:
        """The rollout policy of this configuration."""
        if self.rollout_policy == "switch":
            rate = RATES.get(self.switch_schedule, 0.5)
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
