"""Records of questions and answers: from files, folders and the Hub, held on the disk and read by number."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.lines import UnusableRecord, read_records
from ..errors import UserError
from ..training.sources import import_datasets

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
UNUSABLE = "unusable record"


def load_records(path: str, *, name: str | None = None, split: str = "train", revision: str | None = None) -> Any:
    """A map-style ``datasets.Dataset``, memory-mapped. Where lines of JSON are bad it has a column more,
    ``UNUSABLE``, with the reason in their rows.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, or a Hub data set.
        name: configuration of a Hub data set, if it has several.
        split: of a Hub data set, or of a folder whose files or subfolders are named after their splits.
        revision: branch, tag or commit of a Hub data set.

    Raises:
        UserError: nothing is there, it cannot be read, or no record can.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in _KINDS:
            raise UserError(f"{place} is none of {', '.join(_KINDS)}.")
        if split != "train":
            raise UserError(f"{place} is one file and has no split {split!r}: leave split out, or give a folder.")
        if _KINDS[place.suffix] == "json":
            records = _of_files(path, [place])
        else:
            records = _loaded(path, "parquet", data_files=glob.escape(str(place)), split="train")
    elif place.is_dir():
        records = _of_folder(path, place, split)
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
        there = [repr(name) for name in records.column_names if name != UNUSABLE]
        raise UserError(
            f"{what} has no column {', '.join(map(repr, missing))}. It has {', '.join(there) or 'none'}: rename one, "
            "or choose other columns."
        )


def _of_files(path: str, files: list[Path]) -> Any:
    """JSON, record by record: what is bad becomes a row with the reason in the column ``UNUSABLE``."""
    columns: dict[str, bool] = {}
    bad = []
    for row, where in _rows(files):
        if isinstance(row, UnusableRecord):
            bad.append(f"{where}: {row}")
            continue
        for name, value in row.items():
            columns[name] = columns.get(name, True) and isinstance(value, str | None)
    if not columns:
        raise UserError(f"{path} cannot be read: it has no records{', but ' + '; '.join(bad[:3]) if bad else ''}.")
    datasets = import_datasets()
    features = {name: datasets.Value("string") if plain else datasets.Json() for name, plain in columns.items()}
    if bad:
        features[UNUSABLE] = datasets.Value("string")
    facts = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return datasets.Dataset.from_generator(
        _generate, datasets.Features(features), gen_kwargs={"names": tuple(features), "facts": facts}
    )


def _generate(names: tuple[str, ...], facts: tuple[tuple[str, int, int], ...]) -> Iterator[dict[str, Any]]:
    """The rows of files; sizes and times are there for the cache to tell changed ones."""
    for row, _ in _rows([Path(file) for file, _, _ in facts]):
        found = {UNUSABLE: str(row)} if isinstance(row, UnusableRecord) else row
        yield {name: found.get(name) for name in names}


def _rows(files: list[Path]) -> Iterator[tuple[dict[str, Any] | UnusableRecord, str]]:
    return itertools.chain.from_iterable(map(read_records, files))


def _of_folder(path: str, folder: Path, split: str) -> Any:
    """Which files are of a split is for ``datasets`` to say."""
    with _told(path):
        splits = import_datasets().load_dataset_builder(str(folder)).config.data_files
        if split not in splits:
            raise ValueError(f"it has no split {split!r}, but {', '.join(map(str, splits))}")
    files = [Path(file) for file in splits[split]]
    if all(_KINDS.get(file.suffix) == "json" for file in files):
        return _of_files(path, files)
    return _loaded(path, str(folder), split=split)


def _loaded(path: str, what: str, **options: Any) -> Any:
    with _told(path):
        return import_datasets().load_dataset(what, **options)


@contextmanager
def _told(path: str) -> Iterator[None]:
    datasets = import_datasets()
    try:
        yield
    except (OSError, TypeError, ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        why = " ".join(str(error.__cause__ or error).split()) or "it has no records."
        raise UserError(f"{path} cannot be read: {why}") from error
