"""Text from files and from the Hub, record by record; bad records are counted and named."""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..data.lines import UnusableRecord, parse, raw_records
from ..errors import UserError
from ..io.text_files import decode

_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NAMED = 5


@dataclass(frozen=True)
class Record:
    """A text, and its place: "file:line" or "file, record n"."""

    text: str
    where: str


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable text, and why."""

    reason: str
    where: str


@dataclass
class BadRecords:
    """Counts bad records up to a limit.

    Attributes:
        limit: how many are let pass.
        reasons: how many of each reason.
        first: the first few, named.
    """

    limit: int = 100
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        """Count one.

        Raises:
            UserError: there are more than ``limit`` now.
        """
        self.reasons[record.reason] += 1
        if len(self.first) < _NAMED:
            self.first.append(f"{record.where}: {record.reason}")
        if self.reasons.total() > self.limit:
            raise UserError(
                f"More than {self.limit} bad records. The first: {'; '.join(self.first)}. Mend them, or raise the "
                "limit (max_bad)."
            )


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        path: a file (.json, .jsonl, .parquet, .txt, .md), a glob, a folder of files of one kind, or a Hub data set.
            Files are read in the order of their names. A ``.json`` file is JSON lines or one array, which has to fit
            into memory; the rest is streamed.
        name: configuration of a Hub data set, if it has several.
        split: of a Hub data set.
        column: which holds the text; plain text has none.
        streaming: read a Hub data set while it is downloaded, rather than download it first.
        revision: branch, tag or commit of a Hub data set.
        sample_by: what of plain text is one record: the file ("document"), a "paragraph" (up to an empty line), a
            "line".
        weight: its share in a mixture, relative to the others'.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    revision: str | None = None
    sample_by: Literal["document", "paragraph", "line"] = "document"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"{self.path}: weight {self.weight} is not a number from 0 on.")
        if self.sample_by not in ("document", "paragraph", "line"):
            raise UserError(f"{self.path}: sample_by is document, paragraph or line, not {self.sample_by!r}.")

    def files(self) -> list[Path]:
        """The local files in reading order; none for a Hub data set.

        Raises:
            UserError: nothing is there, the files are of several kinds or of one that is not read, or an option is
                given that local files do not have.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        elif path.is_file():
            files = [path]
        elif glob.has_magic(self.path):
            files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        elif path.suffix in _KINDS or not _HUB_ID.fullmatch(self.path):
            raise UserError(f"{self.path} does not exist. Give a file, a glob, a folder or a Hub data set.")
        else:
            return []
        if not files:
            raise UserError(f"{self.path} holds no files.")
        if unknown := [file for file in files if file.suffix not in _KINDS]:
            raise UserError(
                f"{unknown[0]} is none of {', '.join(_KINDS)}. Give files of these, such as {path.parent / '*.jsonl'}."
            )
        if len(kinds := {_KINDS[file.suffix]: file for file in files}) > 1:
            raise UserError(
                f"{self.path} holds files of several kinds ({', '.join(file.name for file in kinds.values())}). Give "
                "a glob that takes those of one kind."
            )
        if self.name is not None or self.revision is not None or self.split != "train":
            raise UserError(f"{self.path} is local: name, split and revision are for data sets from the Hub.")
        return files

    def read(self, start: int = 0) -> Iterator[Record | BadRecord]:
        """The records from number ``start`` on, good and bad.

        Raises:
            UserError: the source is not there or cannot be opened, or no record can have the column.
        """
        files = self.files()
        if not files:
            yield from (self._row(row, where) for row, where in self._hub_rows(start))
            return
        kind = _KINDS[files[0].suffix]
        raw = itertools.chain.from_iterable(self._raw_records(kind, file) for file in files)
        # Records before ``start`` are passed over unparsed.
        for content, where in itertools.islice(raw, start, None):
            yield self._parse(kind, content, where)

    def texts(self, bad: BadRecords, start: int = 0) -> Iterator[Record]:
        """The good records of ``read``; the others go to ``bad``.

        Raises:
            UserError: as ``read``, or there are too many bad ones.
        """
        for record in self.read(start):
            if isinstance(record, Record):
                yield record
            else:
                bad.add(record)

    def _raw_records(self, kind: str, file: Path) -> Iterator[tuple[Any, str]]:
        """Each record of a local file as it stands there: bytes, or a row already parsed."""
        if kind == "parquet":
            rows = self._opened("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
            yield from _numbered(rows, f"{file}, record", 0)
        elif kind == "json":
            yield from raw_records(file)
        elif self.sample_by == "line":
            with file.open("rb") as lines:
                yield from ((line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip())
        elif self.sample_by == "paragraph":
            with file.open("rb") as lines:
                for full, numbered in itertools.groupby(enumerate(lines, 1), key=lambda item: bool(item[1].strip())):
                    if full:
                        paragraph = list(numbered)
                        yield b"".join(line for _, line in paragraph), f"{file}:{paragraph[0][0]}"
        else:
            yield file.read_bytes(), str(file)

    def _parse(self, kind: str, content: Any, where: str) -> Record | BadRecord:
        if kind != "text":
            return self._row(content, where)
        try:
            text = decode(content)
        except UnicodeDecodeError:
            return BadRecord("not UTF-8", where)
        if "\0" in text:
            return BadRecord("NUL characters (damaged, or UTF-16)", where)
        return self._text(text.rstrip("\n") if self.sample_by != "document" else text, where)

    def _row(self, row: Any, where: str) -> Record | BadRecord:
        try:
            row = parse(row)
        except UnusableRecord as error:
            return BadRecord(str(error), where)
        if self.column not in row:
            return BadRecord(f"no column {self.column!r} (has {_named(row)})", where)
        return self._text(row[self.column], where)

    def _text(self, text: Any, where: str) -> Record | BadRecord:
        if not isinstance(text, str):
            return BadRecord(f"text is {type(text).__name__}, not a string", where)
        if not text.strip():
            return BadRecord("empty text", where)
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, and no tokenizer takes it
            return BadRecord("not Unicode (a lone surrogate)", where)
        return Record(text, where)

    def _hub_rows(self, start: int) -> Iterator[tuple[Any, str]]:
        options = dict(name=self.name, split=self.split, streaming=self.streaming, revision=self.revision)
        rows = self._opened(self.path, **options)
        # Where nothing would be left, skip() refuses or, in older versions, skips nothing: the last is dropped here.
        rest = itertools.islice(rows.skip(start - 1) if start > 1 else rows, int(start > 0), None)
        return _numbered(rest, f"{self.path} ({self.split}), record", start)

    def _opened(self, path: str, **options: Any) -> Any:
        """A data set of the text column alone."""
        datasets = import_datasets()
        try:
            rows = datasets.load_dataset(path, **options)
            # A stream may not know its columns before the first record; then each record is judged by itself.
            columns = rows.column_names or next(iter(rows.take(1)), {self.column: ""}).keys()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error
        if self.column not in columns:
            raise UserError(
                f"{self.path} has no column {self.column!r}. It has {_named(columns)}: choose one of them."
            )
        return rows.select_columns([self.column])


def import_datasets() -> ModuleType:
    """The ``datasets`` library, without its progress bars.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "Parquet files and data sets from the Hub need the datasets library: pip install modeling_t5gemma[train]"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _numbered(rows: Iterable[Any], where: str, start: int) -> Iterator[tuple[Any, str]]:
    """Each row with its number, from 1 on as in an editor."""
    return ((row, f"{where} {number}") for number, row in enumerate(rows, start + 1))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _named(columns: Iterable[str]) -> str:
    names = [repr(str(name)) for name in columns]
    return ", ".join(names[:20]) if names else "none"
