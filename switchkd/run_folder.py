"""The folder of a run: whether it is free, whether its run may go on, what is written first."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from switchkd.arguments import ScriptArguments
from switchkd.checkpoint import (
    COMPLETIONS,
    CONFIG,
    LATER,
    PREFIX_CHECKPOINT_DIR,
    STATE,
    SUMMARY,
    adopt_threshold,
    checkpoints,
    find_checkpoint,
    read_settings,
)
from switchkd.config import SwitchConfig

# Options that may differ between a run and its continuation; any other would change the result.
FREE_TO_CHANGE = {
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "output_dir",
    "log_completions",
    "disable_tqdm",
    "report_to",
    "run_name",
    "save_total_limit",
    "rollout_batch_size",
    "eval_temperature",
    # Where processes run and what they say: nothing of the result depends on it.
    "shard_teacher",
    "ddp_backend",
    "ddp_timeout",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_find_unused_parameters",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "logging_first_step",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    # Together with the number of processes they make the rows of a step, which must stay:
    # `checkpoint.read_run_state`.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}
OVERWRITTEN = "overwritten"  # in the folder of a run: the one that was there before
LOGS = (COMPLETIONS, SUMMARY, STATE)  # of a run, beside its checkpoints
RESULTS = (  # what the next run, or who looks for a model or an adapter, could take for its own
    *LOGS,
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "training_args.bin",
    "report.html",
)


class BestBeside(TrainerCallback):
    """The best checkpoint of a resumed run is beside the one that it goes on from: the path that
    Trainer has noted was that of a folder which may have been moved since."""

    def __init__(self):
        self.resumed: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.resumed is not None and state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if (place := Path(self.resumed).with_name(name)).is_dir():
                state.best_model_checkpoint = str(place)


def check_output(script: ScriptArguments, config: SwitchConfig) -> str | None:
    """Refuse the folder of another run; returns the checkpoint to resume from."""
    if not config.output_dir:
        raise ValueError(f"output_dir: got {config.output_dir!r}, expected a folder")
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: got the file {folder}, expected a folder")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):  # as `reserved` would find out later
        raise ValueError(f"output_dir: cannot write to {folder}, in {place.absolute()}")
    if wanted in (None, False, "false", "False"):
        config.resume_from_checkpoint = None
        if config.process_index == 0:  # which writes into the folder while others start
            check_free(folder, script, config)
        return None
    checkpoint = find_checkpoint(folder, wanted)
    if begins(checkpoint, config) and config.process_index == 0:
        check_free(folder, script, config)
    adopt_threshold(config, checkpoint)
    values, before = run_settings(script, config), read_settings(Path(checkpoint).parent)
    for key in sorted(before.keys() & values.keys() - FREE_TO_CHANGE):
        if before[key] != values[key]:
            raise ValueError(
                f"{key}: got {values[key]!r}, expected {before[key]!r} as in the run to resume "
                f"({Path(checkpoint).parent / CONFIG})"
            )
    config.resume_from_checkpoint = checkpoint
    return checkpoint


def begins(resume: str | None, config: SwitchConfig) -> bool:
    """Whether the run has its folder still to fill: a new one, or one that goes on elsewhere."""
    return resume is None or Path(resume).parent.resolve() != Path(config.output_dir).resolve()


def check_free(folder: Path, script: ScriptArguments, config: SwitchConfig) -> None:
    """Refuse a folder in which a new run would take something away."""
    for name in (script.model_name_or_path, script.teacher_model_name_or_path):
        place = Path(name or "").resolve()
        cleared = place.parents if config.overwrite_output_dir else ()
        if name and place.exists() and folder.resolve() in (place, *cleared):
            raise ValueError(f"output_dir: {folder} holds {name}, which this run begins with")
    if config.overwrite_output_dir:
        return
    # A run that was killed early leaves a config.yaml of all options; one of fewer is somebody's.
    options, record = run_settings(script, config).keys(), folder / CONFIG
    if has_logs(folder) or (record.exists() and not options <= read_settings(folder).keys()):
        raise ValueError(
            f"output_dir: {folder} holds another run; expected a new folder, "
            "--resume_from_checkpoint last to go on with it, or --overwrite_output_dir true"
        )


def has_logs(folder: Path) -> bool:
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in LOGS)


@contextlib.contextmanager
def reserved(folder: Path):
    """Make the folder if need be, and keep other runs out of it: their files would be mixed."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)  # given back by the system, however this process ends
    except Timeout:
        raise ValueError(
            f"output_dir: got {folder}, where another run is still going on; expected another "
            "folder, or to wait for its end"
        ) from None
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {folder} ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def run_settings(script: ScriptArguments, config: SwitchConfig) -> dict:
    """Every option of a run."""
    values = {**asdict(script), **config.to_dict()}
    plugin = (values["accelerator_config"] or {}).get("gradient_accumulation_kwargs")
    if plugin:
        plugin.pop("num_steps", None)  # Trainer's note to accelerate, written into it
    return values


def forget(folder: str | Path) -> None:
    """Remove the run that was overwritten: there is something in its place."""
    shutil.rmtree(Path(folder) / OVERWRITTEN, ignore_errors=True)


class Forget(TrainerCallback):
    """Does so at the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            forget(args.output_dir)


def begin_output(script: ScriptArguments, config: SwitchConfig) -> None:
    """Clear the folder of a run to overwrite and write config.yaml.

    Only once everything has been loaded: a wrong model name must not cost the run that is there,
    nor a first step that finds no memory: it is in OVERWRITTEN until something is saved.
    """
    folder = Path(config.output_dir)
    if has_logs(folder):  # else a folder with a model in it may be anybody's
        saved = checkpoints(folder) or (folder / SUMMARY).exists()
        found = [path for name in (CONFIG, *RESULTS) for path in folder.glob(name)]
        later = list(folder.glob(f"{LATER}*"))
        aside = Path(tempfile.mkdtemp(dir=folder))
        for path in (folder / "base", *checkpoints(folder), *later, *found):
            if path.exists():
                path.rename(aside / path.name)
        if saved:
            forget(folder)
            aside.rename(folder / OVERWRITTEN)
        else:
            shutil.rmtree(aside)
    text = yaml.safe_dump(run_settings(script, config), sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
