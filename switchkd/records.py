"""Records of a data set, whatever their form: of JSON Lines, a JSON array, or a Hub data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from switchkd.names import EMBEDDED, EMBEDDED_DIR

EVALUATED = ("test", "validation", "valid")  # the split to evaluate on: the first that there is
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zst", ".xz", ".bz2", ".zip")
PIECE = 10_000  # characters
# What json.loads raises: ValueError also for numbers of thousands of digits, the other for text
# that is nested thousands of times.
UNREADABLE = (ValueError, RecursionError)


class Unreadable(str):
    """Why a line is no record."""


def why(error: Exception) -> str:
    """The reason for which a text is no JSON, in short."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}column {error.colno}, cut off?"
    return str(error).split(":")[0].split(";")[0]


def read_records(
    source: str, splits: Sequence[str]
) -> tuple[str, Iterable[Mapping | Unreadable | None]]:
    """(name, records) of a file, a Hub dataset id or folder (through `datasets`), or `embedded`.

    splits: where there are several, the first of these that there is. A blank line is None.
    """
    path = Path(source)
    if source == EMBEDDED:
        files = [EMBEDDED_DIR / "data" / f"{split}.jsonl" for split in splits]
        path = next((file for file in files if file.is_file()), files[0])
    if path.suffix in (".jsonl", ".json") or path.is_file():
        return ("embedded " if source == EMBEDDED else "") + path.name, _read_file(path)
    return _read_hub(source, splits)


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, without the mark that Windows puts before the first."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path.name}, line {number}: got the byte 0x{line[error.start]:02x} "
                    f"({error.reason}), expected a file in UTF-8"
                ) from None


def pieces_of(path: Path) -> Iterator[str]:
    """A text file in pieces of whole lines, none much longer than it must be."""
    text = ""
    for line in lines_of(path):
        text += line
        if len(text) >= PIECE:
            yield text
            text = ""
    if text:
        yield text


def _read_file(path: Path) -> Iterator[Mapping | Unreadable | None]:
    if not path.is_file():
        raise ValueError(f"data: got {path}, expected an existing .jsonl file or a Hub dataset id")
    if path.suffix in TABLES:
        raise ValueError(
            f"data: got {path}, expected JSON Lines, one object a line (.jsonl), or the folder of "
            "such a file, which is read as a Hub data set"
        )
    first = next((line for line in lines_of(path) if line.strip()), "")
    if path.suffix == ".json" and first.lstrip().startswith("["):
        try:
            records = json.loads("".join(lines_of(path)))
        except UNREADABLE as error:
            raise ValueError(f"{path.name}: not a valid JSON array ({why(error)})") from None
        yield from records
        return
    for line in lines_of(path):
        if not line.strip():
            yield None
            continue
        try:
            yield json.loads(line)
        except UNREADABLE as error:
            yield Unreadable(f"not valid JSON ({why(error)})")


def _read_hub(name: str, splits: Sequence[str]) -> tuple[str, Iterable[Mapping]]:
    from datasets import get_dataset_split_names, load_dataset  # slow to import

    try:
        there = splits if len(splits) == 1 else get_dataset_split_names(name)
        split = next((split for split in splits if split in there), None)
        if split is not None:
            return f"{name} [{split}]", load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"data: cannot load {name!r} [{', '.join(splits)}] ({type(error).__name__}: {error}); "
            "expected a Hub dataset id, a folder of data files, a .jsonl file, or 'embedded'"
        ) from error
    raise ValueError(
        f"data: got {name!r} with the splits {', '.join(there)}, expected {' or '.join(splits)}"
    )
