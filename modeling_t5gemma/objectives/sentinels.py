"""The tokens that mark spans: which ones a vocabulary has free, and which a checkpoint was trained with."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from .checks import check_ids, shown

SENTINELS_FILE = "sentinels.json"


def sentinels_of(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of ``<unusedN>`` (Gemma), or else of ``<extra_id_N>`` (T5), in the order of N.

    Raises:
        UserError: the vocabulary has neither.
    """
    for pattern in (re.compile(r"<unused(\d+)>"), re.compile(r"<extra_id_(\d+)>")):
        matches = ((pattern.fullmatch(text), token) for text, token in vocabulary.items())
        if found := sorted((int(match[1]), token) for match, token in matches if match):
            return tuple(token for _, token in found)
    raise UserError(
        "The vocabulary has neither <unusedN> nor <extra_id_N> tokens to mark spans with. Give the ids to use as "
        "`sentinels`, a list; add tokens to the tokenizer if none are free."
    )


def save_sentinels(folder: Path, ids: Sequence[int]) -> None:
    """Write ``sentinels.json`` beside a checkpoint: whole or not at all.

    Raises:
        UserError: an id is given twice or is none.
    """
    ids = tuple(ids)
    check_ids(ids, "sentinels")
    partial = folder / f".{SENTINELS_FILE}.{secrets.token_hex(4)}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps([int(token) for token in ids]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / SENTINELS_FILE)
    finally:
        partial.unlink(missing_ok=True)


def load_sentinels(folder: Path) -> tuple[int, ...] | None:
    """The sentinels that a checkpoint was trained with; None if it does not say.

    Raises:
        UserError: the file is not a list of ids.
    """
    path = folder / SENTINELS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write a list of token ids, or remove it.") from error
    if not isinstance(ids, list):
        raise UserError(f"{path} holds {shown(ids)}. Write a list of token ids, or remove it.")
    check_ids(ids, str(path))
    return tuple(ids)
