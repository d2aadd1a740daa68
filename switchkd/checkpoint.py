"""Finding intact checkpoints, and a run's folder after a crash."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import zipfile
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from switchkd.records import UNREADABLE

PREFIX_CHECKPOINT_DIR = "checkpoint"  # Trainer's, whose import takes seconds: a report needs none
CONFIG, COMPLETIONS, SUMMARY = "config.yaml", "completions.jsonl", "summary.json"
STATE = "trainer_state.json"
LATER = "later-"  # before the name of a checkpoint that a run no longer goes on from
RUN_STATE = "run_state.json"  # in each checkpoint: what the summary needs beyond trainer_state.json


def checkpoint_step(path: str | Path) -> int:
    return int(Path(path).name.rsplit("-", 1)[-1])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [path for path in found if path.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; one that a kill cut off is passed over."""
    for path in checkpoints(output_dir):
        with contextlib.suppress(ValueError):
            check_checkpoint(path)
            return str(path)
    return None


def check_checkpoint(path: str | Path) -> None:
    """Raise ValueError, with the reason, for a checkpoint that cannot be resumed from."""
    path = Path(path)
    if not (path.is_dir() and path.name.rsplit("-", 1)[-1].isdigit()):
        raise ValueError(f"checkpoint: got {path}, expected an existing folder checkpoint-N")
    written = ["config.json"] if (path / "config.json").is_file() else []
    for name in (STATE, RUN_STATE, *written):  # the first is written last of all files
        try:
            if not isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict):
                raise ValueError("no JSON object")
        except (OSError, *UNREADABLE) as error:
            raise ValueError(f"checkpoint {path}: {name} is missing or broken ({error})") from None
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"checkpoint {path}: got no .safetensors file, expected the weights")
    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint {path}: {file.name} is broken ({error})") from None
    # Of the last, each process has its own; any number of processes goes on with what any wrote.
    for name in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        files = list(path.glob(name))
        if not (files and all(map(zipfile.is_zipfile, files))):  # torch.save's, whose end is last
            raise ValueError(
                f"checkpoint {path}: {name} is {'broken' if files else 'missing'}, without which a "
                "run would begin anew (save_only_model true saves none)"
            )


def find_checkpoint(output_dir: str | Path, wanted: str | bool) -> str:
    """The checkpoint to resume from: `wanted`, or for "last" and True the last of a run; ValueError
    unless it is intact."""
    if str(wanted).lower() not in ("true", "last"):
        check_checkpoint(wanted)
        return str(wanted)
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        for newest in checkpoints(output_dir)[:1]:
            check_checkpoint(newest)  # says why it is not
        raise ValueError(f"resume_from_checkpoint: got no intact checkpoint in {output_dir}")
    return checkpoint


def read_run_state(checkpoint: str | Path, digest: str | None = None, args=None) -> dict:
    """What the trainer left in a checkpoint; ValueError if it was trained on other rows than those
    of `digest`, or on more or fewer at a time than `args`, a SwitchConfig, says."""
    state = json.loads((Path(checkpoint) / RUN_STATE).read_text(encoding="utf-8"))
    before = state.get("rows")
    if None not in (digest, before) and digest != before:
        raise ValueError(
            f"training data: got rows with the digest {digest}, expected {before}, as in the run "
            f"to resume ({checkpoint})"
        )
    if args is not None:
        check_split(state, args, checkpoint)
    return state


def day_of(checkpoint: str | None) -> str:
    """The day on which the run of a checkpoint began, for templates that write the date: rows must
    be the same when it is resumed on another day. Empty if there is none."""
    return "" if checkpoint is None else read_run_state(checkpoint).get("day", "")


def check_split(state: dict, args, checkpoint: str | Path) -> None:
    """Refuse other steps than those of the run to resume; in parts they may come as they like."""
    units = {"step": "per_device_train_batch_size, gradient_accumulation_steps, processes"}
    if args.dataloader_drop_last:  # an epoch leaves out the rows that fill no batch
        units["batch"] = "per_device_train_batch_size, processes; with dataloader_drop_last"
    for unit, options in units.items():
        rows, before = getattr(args, f"rows_per_{unit}"), state.get(f"rows_per_{unit}")
        if before not in (None, rows):
            raise ValueError(
                f"got {rows} rows in a {unit} ({options}), expected {before} as in {checkpoint}"
            )


def adopt_threshold(config, checkpoint: str | Path) -> None:
    """Go on with the threshold that the run to resume has chosen for its teacher's share."""
    chosen = read_run_state(checkpoint).get("calibration")
    if chosen is not None:
        config.switch_tau0, config.switch_lambda = chosen["switch_tau0"], chosen["switch_lambda"]
    elif config.target_teacher_share is not None:
        raise ValueError(
            f"target_teacher_share: got {config.target_teacher_share:g}, expected none, as in the "
            f"run to resume ({checkpoint})"
        )


def read_settings(output_dir: str | Path) -> dict:
    """The options of a run as its config.yaml says; empty if there is none."""
    path = Path(output_dir) / CONFIG
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got no key: value lines, expected a run's options")
    return values


def settings_of(model: str) -> dict:
    """The options of the run that made a model or an adapter, of its folder or a checkpoint's;
    empty for one of other origin."""
    folder = Path(model)
    saved = folder.name.removeprefix(LATER).startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    for place in (folder, folder.parent) if saved else (folder,):
        with contextlib.suppress(ValueError):  # a config.yaml of another project
            found = read_settings(place)
            if "model_name_or_path" in found:
                return found
    return {}


def unsaved(folder: Path, error: Exception) -> OSError:
    """Remove a checkpoint that could not be written whole; says why, and what is left to resume."""
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    free = shutil.disk_usage(folder.parent).free
    shutil.rmtree(folder, ignore_errors=True)
    last = last_checkpoint(folder.parent)
    return OSError(
        f"could not save {folder.name}: {reason} "
        f"({'No space left on device' if free < 2**20 else f'{free:,} bytes free'}); "
        + (f"the last intact checkpoint is {last}" if last else "no checkpoint is left")
    )


def append_completions(output_dir: str | Path, records: list[dict]) -> None:
    """One line of completions.jsonl per rollout: enough to look at it, or to replay it."""
    path = Path(output_dir) / COMPLETIONS
    path.parent.mkdir(parents=True, exist_ok=True)  # it may be gone since training began
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:  # of a full disk, which does not say where
        raise OSError(f"could not write {path}: {error.strerror}") from error


def set_completions_aside(output_dir: str | Path) -> Path | None:
    """Rename the completions.jsonl of an earlier run; returns what it is called now."""
    path = Path(output_dir) / COMPLETIONS
    if not path.exists():
        return None
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def last_completions(output_dir: str | Path) -> dict[int, list[int]]:
    """The tokens that were last written for each row; none if they were not saved."""
    path = Path(output_dir) / COMPLETIONS
    if not path.exists():
        return {}
    written = {}
    with path.open(encoding="utf-8") as file, contextlib.suppress(json.JSONDecodeError):
        for line in file:
            record = json.loads(line)
            if "replay_of" not in record:
                written[record["row"]] = record["tokens"]
    return written


def set_checkpoints_aside(checkpoint: str | Path) -> list[str]:
    """Rename the intact checkpoints of a run after the one that it goes on from: were they still
    the last, their completions would be missing. Returns what they are called now."""
    names = []
    for later in checkpoints(Path(checkpoint).parent):
        with contextlib.suppress(ValueError):
            if checkpoint_step(later) > checkpoint_step(checkpoint):
                check_checkpoint(later)
                aside = later.with_name(f"{LATER}{later.name}")
                shutil.rmtree(aside, ignore_errors=True)
                names.append(later.rename(aside).name)
    return names


def drop_completions_after(output_dir: str | Path, step: int) -> None:
    """Forget completions written after `step`: the resumed run writes them again."""
    path = Path(output_dir) / COMPLETIONS
    if not path.exists():
        return
    kept = path.with_suffix(".tmp")
    with path.open(encoding="utf-8") as old, kept.open("w", encoding="utf-8") as new:
        for line in old:
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut off
                if json.loads(line)["step"] <= step:
                    new.write(line)
    kept.replace(path)
