"""Which tokens are kept: those that have to stay, those that texts need, and the next ones to make a round number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..io.text_files import read_json
from ..objectives import sentinels_of
from ..training.tokenizing import vocabulary_of
from .byte_pairs import BytePairs
from .papers import KEPT_FILE, TRIM_FILE
from .source import Source
from .texts import count, template_texts

_MULTIPLE = 64  # rows, for the matrix products of a GPU


def choose(source: Source, texts: Iterable[str], size: int | None, sentinels: int | None) -> tuple[list[int], int]:
    """The tokens that texts need.

    Args:
        size: how many to keep, the most frequent ones; None for all.
        sentinels: how many ``<unusedN>`` stay at least of those that no file of the checkpoint names; None for all.

    Returns:
        The ids to keep in ascending order, and how many of them are needed.

    Raises:
        UserError: the texts have no tokens, or the size is too small for what has to stay.
    """
    pairs, tokenizer = source.pairs, source.tokenizer
    counts = count(tokenizer, texts)
    if not counts.any():
        raise UserError("The texts have no tokens. Give others.")
    template = pairs.closed(np.flatnonzero(count(tokenizer, template_texts(tokenizer))).tolist())
    marks = _sentinels(pairs)
    surplus = set(marks[len(marks) if sentinels is None else sentinels :]) - source.named
    wanted = {index for index in pairs.ids.values() if index < source.rows} - surplus
    always = pairs.indispensable() | template | source.named | set(tokenizer.all_special_ids) | set(marks)
    always &= wanted
    formed = pairs.formed(counts)[: source.rows]
    # A token that is made of others is longer, so they come before it where it comes up as often.
    length = {index: len(token) for token, index in pairs.ids.items()}
    used = sorted(set(np.flatnonzero(formed).tolist()) - always, key=lambda i: (-formed[i], length[i], i))
    needed = len(always) + len(used)
    if size is None:
        size = min(-(-needed // _MULTIPLE) * _MULTIPLE, source.rows)
    elif not len(always) <= size <= source.rows:
        raise UserError(
            f"--size is {size}; {len(always)} tokens have to stay (special ones, bytes, sentinels, what the chat "
            f"template writes), and there are {source.rows}. --sentinels N keeps fewer <unusedN>."
        )
    kept = sorted(pairs.filled(always | set(used[: size - len(always)]), min(size, len(wanted)), wanted))
    return kept, min(needed, len(kept))


def _sentinels(pairs: BytePairs) -> list[int]:
    try:
        return list(sentinels_of(pairs.ids))
    except UserError:
        return []


def kept_like(like: Path, source: Source) -> list[int]:
    """The ids that another checkpoint of the same vocabulary kept, in ascending order.

    Raises:
        UserError: it was not trimmed, or from another vocabulary, or lacks a token that this one's files name.
    """
    if not (like / KEPT_FILE).is_file() or not (like / TRIM_FILE).is_file():
        raise UserError(f"--like {like} has no {TRIM_FILE} and {KEPT_FILE}: it was not trimmed. Give one that was.")
    if read_json(like / TRIM_FILE)["vocabulary"] != vocabulary_of(source.tokenizer, "").fingerprint:
        raise UserError(
            f"{like} was trimmed from another vocabulary than that of {source.folder}, so an id would mean two words."
        )
    kept: list[int] = json.loads((like / KEPT_FILE).read_text(encoding="utf-8"))
    if kept[-1] >= source.rows:
        raise UserError(f"{like} has a token of id {kept[-1]}, and {source.folder} rows up to {source.rows - 1}.")
    if missing := source.named - set(kept):
        word = source.tokenizer.convert_ids_to_tokens(min(missing))
        raise UserError(f"{source.folder} needs the token {word!r} (id {min(missing)}), which {like} does not have.")
    return kept
