"""Records of questions and answers: from files, folders and the Hub, held on the disk and read by number."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training.sources import import_datasets

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_records(path: str, *, name: str | None = None, split: str = "train", revision: str | None = None) -> Any:
    """A map-style ``datasets.Dataset``, memory-mapped.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, or a Hub data set.
        name: configuration of a Hub data set, if it has several.
        split: of a Hub data set, or of a folder whose files or subfolders are named after their splits.
        revision: branch, tag or commit of a Hub data set.

    Raises:
        UserError: nothing is there, it cannot be read (a line that is no JSON is named), or it is empty.
    """
    place = Path(path).expanduser()
    if place.is_file():
        records = _of_file(place, split)
    elif place.is_dir():
        records = _loaded(path, str(place), split=split)
    elif place.suffix in _KINDS or path.startswith((".", "/", "~")):
        raise UserError(f"{path} does not exist. Give a file, a folder or a Hub data set.")
    else:
        records = _loaded(path, path, name=name, split=split, revision=revision)
    if not len(records):
        raise UserError(f"{path} ({split}) has no records.")
    return records


def require_columns(records: Any, wanted: Sequence[str], what: str) -> None:
    """Refuse records without these columns.

    Args:
        records: a ``datasets.Dataset``.
        what: their name, for the message.

    Raises:
        UserError: a column is missing; names those that are there.
    """
    if missing := [column for column in wanted if column not in records.column_names]:
        raise UserError(
            f"{what} has no column {', '.join(map(repr, missing))}. It has "
            f"{', '.join(map(repr, records.column_names)) or 'none'}: rename one, or choose other columns."
        )


def _of_file(file: Path, split: str) -> Any:
    if file.suffix not in _KINDS:
        raise UserError(f"{file} is none of {', '.join(_KINDS)}.")
    if split != "train":
        raise UserError(f"{file} is one file and has no split {split!r}: leave split out, or give a folder.")
    return _loaded(str(file), _KINDS[file.suffix], data_files=glob.escape(str(file)), split="train")


def _loaded(path: str, what: str, **options: Any) -> Any:
    datasets = import_datasets()
    try:
        return datasets.load_dataset(what, **options)
    except (OSError, TypeError, ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        why = _bad_line(Path(path).expanduser()) or cause or "it has no records."
        raise UserError(f"{path} cannot be read: {why}") from error


def _bad_line(file: Path) -> str | None:
    """The first line of a file of JSON lines that is no object."""
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"line {number} is not valid JSON ({error})."
            if not isinstance(row, dict):
                return f"line {number} is a {type(row).__name__}, not an object with columns."
    return None
