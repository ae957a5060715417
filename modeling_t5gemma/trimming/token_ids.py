"""The token ids in a checkpoint's JSON files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# eos_token_id, suppress_tokens, image_token_index, ... and what a training run and its checkpoint were given.
_NAMES = re.compile(r"(.*_)?token_(ids?|index)|(begin_)?suppress_tokens|(bad|force)_words_ids|sentinels|mode_tokens")


def renumber(document: Any, new: Callable[[str, int], int]) -> Any:
    """A document in which every token id is another.

    Args:
        document: what a JSON file holds.
        new: from the key that an id stands under, and the id, to the one to write.
    """
    if isinstance(document, list):
        return [renumber(each, new) for each in document]
    if not isinstance(document, dict):
        return document
    made: dict[str, Any] = {}
    for key, value in document.items():
        if key == "forced_decoder_ids" and value:
            made[key] = [[position, _each(key, index, new)] for position, index in value]
        elif key == "sequence_bias" and isinstance(value, list):
            made[key] = [[_each(key, ids, new), bias] for ids, bias in value]
        elif key == "added_tokens_decoder":
            made[key] = {str(new(key, int(index))): token for index, token in value.items()}
        else:
            made[key] = _each(key, value, new) if _NAMES.fullmatch(key) else renumber(value, new)
    return made


def _each(key: str, value: Any, new: Callable[[str, int], int]) -> Any:
    """Ids in lists, and of mode tokens under their names."""
    if isinstance(value, list):
        return [_each(key, each, new) for each in value]
    if isinstance(value, dict):
        return {name: _each(key, each, new) for name, each in value.items()}
    return new(key, value) if isinstance(value, int) and not isinstance(value, bool) else value


def without(document: Any, words: set[str]) -> Any:
    """A document without the entries, of objects and lists, that are one of these words or name it as ``content``."""

    def stays(value: Any) -> bool:
        word = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(word, str) and word in words)

    if isinstance(document, list):
        return [without(each, words) for each in document if stays(each)]
    if isinstance(document, dict):
        return {key: without(value, words) for key, value in document.items() if stays(value)}
    return document
