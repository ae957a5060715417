"""The text of a tokenizer.json: its rule for the beginning, and words that a model has no embedding for."""

from __future__ import annotations

import json
import re
from typing import Any


class TokenizerText:
    """A tokenizer.json. Most of it is the vocabulary, as objects some ten times its size, so that stays text.

    Raises:
        ValueError, IndexError, KeyError, TypeError: it is none.
    """

    def __init__(self, text: str) -> None:
        self._members, at = _before(text, text.index("{"), "model")
        self._model = text[at : text.rindex("}")]
        if not {"added_tokens", "post_processor"} <= self._members.keys():  # another order than the library's
            self._members = json.loads(text)
            self._model = json.dumps(self._members.pop("model"), ensure_ascii=False)
        self.added: dict[str, int] = {
            token["content"]: int(token["id"]) for token in self._members.get("added_tokens") or ()
        }

    def __str__(self) -> str:
        return f'{json.dumps(self._members, ensure_ascii=False)[:-1]}, "model": {self._model}}}'

    def number(self, word: str) -> int | None:
        """The id of a word; None if there is no such word."""
        if word not in self.added and (found := re.search(rf"{re.escape(_quoted(word))}\s*:\s*(\d+)", self._model)):
            return int(found[1])
        return self.added.get(word)

    def begin_with(self, token: str | None) -> None:
        """Have texts begin with a token, or with nothing, and end with nothing."""

        def piece(letter: str, kind: int) -> list[dict[str, Any]]:
            begin = [] if token is None else [{"SpecialToken": {"id": token, "type_id": kind}}]
            return [*begin, {"Sequence": {"id": letter, "type_id": kind}}]

        special = {} if token is None else {token: {"id": token, "ids": [self.number(token)], "tokens": [token]}}
        single, pair = piece("A", 0), [*piece("A", 0), *piece("B", 1)]
        self._members["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special,
        }

    def keep_to(self, rows: int) -> set[str]:
        """Have no text become an added word for which an embedding of so many rows has none.

        Gemma 3's tokenizer has 262,145 words and its embedding 262,144 rows: the last word stands for an image. Such a
        word stays in the vocabulary, so that vocabularies can be compared, but a text that spells it is read as the
        characters that it is.

        Returns:
            These words.
        """
        beyond = {word: number for word, number in self.added.items() if number >= rows}
        if beyond:
            self._members["added_tokens"] = [t for t in self._members["added_tokens"] if t["content"] not in beyond]
            self.added = {word: number for word, number in self.added.items() if word not in beyond}
            fields, at = _before(self._model, 0, "vocab")
            # Nothing is merged to them. A model of another kind would find them in a text, so there they are left out.
            if fields.get("type") == "BPE" and not fields.get("ignore_merges"):
                new = [f"{_quoted(word)}: {n}, " for word, n in beyond.items() if self.number(word) is None]
                self._model = f"{self._model[: at + 1]}{''.join(new)}{self._model[at + 1 :]}"
        return set(beyond)


def _quoted(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)


def _before(text: str, at: int, last: str) -> tuple[dict[str, Any], int]:
    """The members of the object at a place before one of them, and where that one's value begins."""
    decoder, members = json.JSONDecoder(), dict[str, Any]()
    while True:
        key, at = decoder.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        if key == last:
            return members, at
        members[key], at = decoder.raw_decode(text, at)
        at = _skip(text, at)


def _skip(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at
