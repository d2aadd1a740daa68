"""Names: of options, other projects' for the same thing, and what an unknown one may mean; and of
what ships with the package."""

import difflib
from collections.abc import Iterable
from pathlib import Path

EMBEDDED = "embedded"  # the small teacher, and its data, that ship with the package
EMBEDDED_DIR = Path(__file__).parent / "embedded"
ALIASES = {  # other projects' names of the same thing
    "max_completion_length": "max_new_tokens",
    "max_prompt_len": "max_prompt_length",
    "torch_dtype": "dtype",
    "skew_lambda": "skew_alpha",
    "teacher_model": "teacher_model_name_or_path",
    "dataset": "dataset_name",
}
USUAL = {  # names that are common elsewhere, and no spelling is near
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "student": "model_name_or_path",
    "student_model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "data": "dataset_name",
    "train_file": "dataset_name",
    "validation_file": "eval_dataset_name",
    "tau": "switch_tau0",
    "tokenizer": "processing_class",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
}
REPLACED = {  # options of TRL without a counterpart: what to give instead
    "max_length": "max_prompt_length and max_new_tokens",
    "model_init_kwargs": "dtype, attn_implementation, trust_remote_code",
    "teacher_model_init_kwargs": "teacher_dtype, teacher_quantization, attn_implementation",
    "load_in_4bit": "student_quantization, teacher_quantization",
    "load_in_8bit": "student_quantization, teacher_quantization",
    "chat_template_path": "template, or the tokenizer's own",
    "pad_token": "none: the tokenizer's own",
    "eos_token": "none: the tokenizer's own",
    "generation_kwargs": "top_k, top_p, min_p",
    "repetition_penalty": "none: a penalty would be no distribution of either model",
    "cache_implementation": "none: the decoder has caches of its own",
    "use_vllm": "none: teacher and student write together, in the block decoder",
    "ds3_gather_for_generation": "none: models in parts need FSDP2",
    "max_tool_calling_iterations": "none: rows with tool calls are refused",
    "num_completions_to_print": "log_completions: one at each log",
    "log_unique_prompts": "log_completions: one at each log",
    "router_aux_loss_coef": "none: the loss is that of the method alone",
    "activation_offloading": "gradient_checkpointing",
    "shuffle_dataset": "train_sampling_strategy",
    "pad_to_multiple_of": "none: rows are padded to the longest",
    "dataset_kwargs": "rows of prompt and completion, instruction and output, or messages",
    "dataset_text_field": "rows of prompt and completion, instruction and output, or messages",
    "dataset_num_proc": "none: rows are tokenised in one process",
    "packing": "none: rows are never packed",
    "packing_strategy": "none: rows are never packed",
    "eval_packing": "none: rows are never packed",
    "padding_free": "none: rows are padded",
    "truncation_mode": "none: rows that are too long are left out",
    "completion_only_loss": "none: the loss is always on the response alone",
    "assistant_only_loss": "none: the loss is always on the response alone",
}


def hint_of(name: str, known: Iterable[str]) -> str:
    """What may have been meant by an unknown name."""
    bare = name.removeprefix("--")
    if bare.startswith("vllm_"):
        bare = "use_vllm"
    if bare in REPLACED:
        return f" (TRL's), expected {REPLACED[bare]}"
    known, usual = list(known), name.replace(bare, USUAL.get(bare, ""))
    near = [usual] if usual in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
