"""Lines of JSON, whoever wrote them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text_files import DEEPEST, is_shallow


class UnusableRecord(UserError):
    """A record that nothing can be learnt from; its text is the reason, for counting."""


def parse(raw: Any) -> dict[str, Any]:
    """The record in a line of JSON, or in an item of an array.

    Raises:
        UnusableRecord: it is none, or nested too deeply.
    """
    try:
        row = json.loads(raw.removeprefix(codecs.BOM_UTF8).decode()) if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        raise UnusableRecord("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UnusableRecord("not valid JSON") from error
    if not isinstance(row, dict):
        raise UnusableRecord("not an object with columns")
    if not is_shallow(row):
        raise UnusableRecord(f"nested deeper than {DEEPEST} levels")
    return row


def parse_text(raw: Any) -> dict[str, Any]:
    """As ``parse``, a record all of whose texts can be tokenised and written.

    Raises:
        UnusableRecord: as ``parse``, or JSON spells half a surrogate pair, which is no text.
    """
    row = parse(raw)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("not Unicode (a lone surrogate)") from error
    return row


def raw_records(file: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a .json or .jsonl file, to be parsed, and its place: "file:line" or "file, record n". A ``.json``
    file is JSON lines or one array, which has to fit into memory.

    Raises:
        UserError: an array is not valid JSON as a whole.
    """
    if file.suffix == ".json" and _is_array(file):
        yield from ((row, f"{file}, record {number}") for number, row in enumerate(_array(file), 1))
        return
    with file.open("rb") as lines:
        yield from ((line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip())


def read_records(file: Path) -> Iterator[tuple[dict[str, Any] | UnusableRecord, str]]:
    """``raw_records``, each as of ``parse_text``, or what is wrong with it."""
    for raw, where in raw_records(file):
        try:
            yield parse_text(raw), where
        except UnusableRecord as error:
            yield error, where


def _is_array(file: Path) -> bool:
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    return first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array(file: Path) -> list[Any]:
    try:
        rows: list[Any] = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not valid JSON ({error}). Only of JSON lines can single records be bad."
        ) from error
    return rows
