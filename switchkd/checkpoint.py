"""Finding intact checkpoints, and a run's folder after a crash."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETIONS = "completions.jsonl"
RUN_STATE = "run_state.json"  # in each checkpoint: what the summary needs beyond trainer_state.json


def checkpoint_step(path: str | Path) -> int:
    return int(Path(path).name.rsplit("-", 1)[-1])


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; one that a kill cut off is passed over."""
    found = [
        path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rsplit("-", 1)[-1].isdigit()
    ]
    for path in sorted(found, key=checkpoint_step, reverse=True):
        with contextlib.suppress(ValueError):
            check_checkpoint(path)
            return str(path)
    return None


def check_checkpoint(path: str | Path) -> None:
    """Raise ValueError, with the reason, for a checkpoint that cannot be resumed from."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"checkpoint: got {path}, expected an existing folder checkpoint-N")
    for name in ("trainer_state.json", RUN_STATE):  # the first is written last of all files
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
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


def unsaved(folder: Path, error: Exception) -> OSError:
    """Remove a checkpoint that could not be written whole; says why, and what is left to resume."""
    free = shutil.disk_usage(folder.parent).free
    shutil.rmtree(folder, ignore_errors=True)
    last = last_checkpoint(folder.parent)
    return OSError(
        f"could not save {folder.name}: {str(error).splitlines()[0]} "
        f"({'No space left on device' if free < 2**20 else f'{free:,} bytes free'}); "
        + (f"the last intact checkpoint is {last}" if last else "no checkpoint is left")
    )


def append_completions(output_dir: str | Path, records: list[dict]) -> None:
    """One line of completions.jsonl per rollout: enough to look at it, or to replay it."""
    with (Path(output_dir) / COMPLETIONS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


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
