"""What a SwitchTrainer refuses before any work."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path

import torch
from huggingface_hub import whoami
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer

from switchkd import models
from switchkd.arguments import is_whole
from switchkd.config import SwitchConfig
from switchkd.data import Rows
from switchkd.methods import preset
from switchkd.names import hint_of

UNUSED = (  # of `transformers.Trainer`: they would never be called
    "model_init",
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
)
USED_WITH = {  # (option, values with which others are used; none: any that is true): those others
    ("rollout_policy", ("switch",)): (
        "switch_schedule", "switch_tau0", "switch_lambda", "switch_tau_min", "jsd_base",
    ),
    ("rollout_policy", ("adaswitch",)): ("adaswitch_k", "adaswitch_window", "adaswitch_warm_up"),
    ("rollout_policy", ("skd",)): ("skd_top_k",),
    ("loss_type", ("skew_reverse_kl", "skew_kl", "contrastive_skew")): ("skew_alpha",),
    ("loss_type", ("contrastive_skew",)): ("contrastive_weight",),
    ("replay_capacity", ()): ("replay_ratio",),
    ("lm_file", ()): ("lm_coef",),
    ("target_teacher_share", ()): ("calibration_rows",),
}  # fmt: skip
LOOP = (  # options of Trainer's own validation
    "prediction_loss_only",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "batch_eval_metrics",
    "include_for_metrics",
    "label_names",
)


def check_arguments(
    args, others: dict, *, model, teacher_model, eval_dataset, processing_class, peft_config
) -> None:
    """SwitchTrainer's arguments, before anything is loaded; others: those of a Trainer."""
    if not isinstance(args, SwitchConfig):
        raise TypeError(f"args: got {type(args).__name__}, expected a SwitchConfig")
    known = [*inspect.signature(Trainer).parameters, "processing_class", "teacher_model"]
    for name in others.keys() - {*known}:
        hint = hint_of(name, known)
        raise TypeError(f"SwitchTrainer: got the unknown argument {name!r}{hint}")
    for name in UNUSED:
        if others.get(name) is not None:
            raise ValueError(
                f"{name}: got {others[name]!r}, expected none: SwitchTrainer has its own batches, "
                "loss and metrics"
            )
    for name, value in (("model", model), ("teacher_model", teacher_model)):
        needed = name == "model" or (args.needs_teacher and not args.teacher_is_base)
        if not isinstance(value, (str, nn.Module)) and (needed or value is not None):
            got = "None" if value is None else type(value).__name__
            raise ValueError(
                f"{name}: got {got}, expected a causal language model, or its Hub id or folder as "
                f"text (rollout_policy {args.rollout_policy}, loss_type {args.loss_type})"
            )
    if processing_class is None and not isinstance(model, str):
        raise ValueError("processing_class: got None, expected the tokenizer of both models")
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        got = type(peft_config).__name__
        raise ValueError(f"peft_config: got {got}, expected one of peft, such as a LoraConfig")
    if eval_dataset is None and args.eval_strategy != "no":
        raise ValueError(
            "eval_dataset: got None, expected rows to validate on (by default after each epoch), "
            "or eval_strategy='no'"
        )
    check_machine(args)


def tokenizer_of(given, name: str):
    """What is given, or of a processor, which reads images or sound, too, its tokenizer: one that
    can end responses, and fill up a batch."""
    tokenizer = given if hasattr(given, "eos_token_id") else getattr(given, "tokenizer", given)
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(
            f"{name}: got {type(given).__name__}, expected a tokenizer "
            "(AutoTokenizer.from_pretrained)"
        )
    return models.check_tokenizer(tokenizer, name)


def check_machine(args: SwitchConfig) -> None:
    """Refuse what this machine, or the packages and files that are here, cannot do."""
    if args.lm_file is not None and not Path(args.lm_file).is_file():
        raise ValueError(f"lm_file: got {args.lm_file}, expected an existing text file")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: got true on a CPU, expected a GPU, or bf16")
    if args.world_size > 1:
        check_processes(args)
    check_optimizer(args)
    if args.push_to_hub and args.process_index == 0:
        try:
            whoami(args.hub_token)
        except Exception as error:  # of the network, of the Hub, or no token
            raise ValueError(f"push_to_hub: got true, but the Hub says: {error}") from None
    check_checkpointing(args)
    if args.torch_compile:
        kind = dict(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        try:
            torch.compile(nn.Identity(), **kind)
        except RuntimeError as error:
            raise ValueError(f"torch_compile_mode: got {kind['mode']}: {error}") from None
    names = ("num_workers", "persistent_workers", "multiprocessing_context", "prefetch_factor")
    options = {name: getattr(args, f"dataloader_{name}", None) for name in names}
    try:
        DataLoader([0], **options)
    except ValueError as error:
        given = ", ".join(f"dataloader_{name} {value}" for name, value in options.items())
        raise ValueError(f"got {given}: {error}") from None


def check_processes(args: SwitchConfig) -> None:
    """All of them make the same steps, or they wait for each other."""
    if not args.accelerator_config.even_batches:
        raise ValueError(
            "accelerator_config: got even_batches false with several processes, expected true: "
            "they would end an epoch at different steps; rows that only fill up are not trained on"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: got true with several processes, expected false: while one "
            "begins anew, the others wait for it"
        )


def check_optimizer(args: SwitchConfig) -> None:
    """Make one, for a parameter that is nobody's."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(1, 1))
        if not options.keys() & {"params", "model", "optimizer_dict"}:  # else of the model's own
            kind([nn.Parameter(torch.zeros(1))], **options)
    except ImportError as error:
        raise ValueError(f"optim: got {args.optim.value}: {error}") from None
    except (TypeError, ValueError) as error:
        if args.optim_target_modules is None:  # else it misses them in this model
            raise ValueError(f"optim: got {args.optim.value}: {error}") from None


def _default(option: Field):
    return option.default if option.default_factory is MISSING else option.default_factory()


def check_checkpointing(args: SwitchConfig) -> None:
    """Compute something again, as the first step would."""
    options = dict(args.gradient_checkpointing_kwargs or {})
    if not (args.gradient_checkpointing and options):
        return
    said = f"gradient_checkpointing_kwargs: got {options}"
    options.pop("offload", None)  # Trainer's own, as the next
    if not is_whole(options.pop("every_n_layers", 1), 1):
        raise ValueError(f"{said}, expected an integer >= 1 for every_n_layers")
    try:
        checkpoint(nn.Identity(), torch.zeros(1, requires_grad=True), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from None


def notes(args: SwitchConfig, peft_config=None) -> list[str]:
    """What works, and may not be what is wanted."""
    found, narrow = [], torch.backends.cpu.get_cpu_capability() == "AVX2"
    if args.bf16 and args.device.type == "cpu" and narrow:
        found.append(
            "bf16: without AVX-512 this processor multiplies bfloat16 several times more slowly "
            "than float32; faster: bf16 false, teacher_dtype float32, no rollout_dtype"
        )
    changed = {one.name for one in fields(args) if getattr(args, one.name) != _default(one)}
    for (other, values), names in USED_WITH.items():
        value = getattr(args, other)
        if not (value in values if values else value):
            said = "" if value is None else f" {getattr(value, 'value', value)}"
            missing = "without" if value is None else "with"
            found += [
                f"{name}: not used {missing} {other}{said}" for name in names if name in changed
            ]
    found += [f"{x}: not used, for validation has a loop of its own" for x in LOOP if x in changed]
    other = {k: v for k, v in preset(args.method).items() if getattr(args, k) != v}
    if other:  # by hand, or by a parser that hands on every default
        said = ", ".join(f"{name} {getattr(args, name)} (not {x})" for name, x in other.items())
        found.append(f"method {args.method} with another {said}")
    text = args.loss_type == "cross_entropy" or (args.lm_file is not None and args.lm_coef > 0)
    dropout = not args.disable_dropout or getattr(peft_config, "lora_dropout", 0)
    if args.teacher_is_base and not (text or dropout or args.neftune_noise_alpha):
        found.append(
            f"teacher_is_base: the student begins as its teacher, where {args.loss_type} is 0 and "
            "teaches nothing; expected lm_file, loss_type cross_entropy, or dropout"
        )
    return found


def check_trained(student: nn.Module, teacher: nn.Module | None) -> None:
    """There is something to train, in a type that can be, and it is not the teacher's."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "model: got no trainable parameter, expected some (requires_grad), or a peft_config"
        )
    if any(p.dtype == torch.float16 for p in student.parameters() if p.requires_grad):
        raise ValueError(  # which has no 1e-8, the epsilon of AdamW: a step would divide by 0
            "model: got trainable parameters in float16, expected float32 or bfloat16 (dtype); "
            "fp16 true computes in float16 with float32 weights"
        )
    if teacher is not None and any(id(p) in trained for p in teacher.parameters()):
        raise ValueError(
            "teacher_model: got weights that are the student's, and would change in training; "
            "expected a model of its own, or teacher_is_base with a peft_config"
        )


def check_rows(rows: Rows | None, args: SwitchConfig) -> None:
    """The rows to train on fill a batch, and those that are trained on data have a response."""
    if rows is None:
        return
    share, batch = 1 - args.lmbda, args.rows_per_batch
    if share > 0 and not all(row.completion_ids for row in rows.rows):
        raise ValueError(
            f"{rows.report.source}: got rows without a response{_unread(rows)}, expected responses "
            f"for the share 1 - lmbda = {share:g} of rows trained on data, or lmbda 1"
        )
    if args.dataloader_drop_last and len(rows.rows) < batch:
        raise ValueError(
            f"dataloader_drop_last: got {len(rows.rows)} rows of {rows.report.source}, expected at "
            f"least {batch}, a batch (per_device_train_batch_size, processes): all would be dropped"
        )


def _unread(rows: Rows) -> str:
    return f" ({rows.report.unread})" if rows.report.unread else ""


def check_validation(rows: Rows | None, args: SwitchConfig, has_teacher: bool) -> None:
    """Validation measures what the run goes by."""
    if rows is None or args.eval_strategy == "no":
        return
    best = args.metric_for_best_model
    going_by = f"metric_for_best_model {best}" if best else "adaptive_lmbda"
    if (best or args.adaptive_lmbda) and not any(row.completion_ids for row in rows.rows):
        raise ValueError(
            f"{rows.report.source}: got no validation row with a response{_unread(rows)}, expected "
            f"some for {going_by} (eval_dataset_name, in Python eval_dataset), or eval_strategy no"
        )
    if best in ("kl", "eval_kl", "jsd", "eval_jsd") and not has_teacher:
        raise ValueError(f"{going_by}: got no teacher, expected rouge_l or cross_entropy")
