"""Which tokens a byte-pair tokenizer can do without, and the tokenizer that is left.

Byte-pair encoding joins, of all neighbours in a text, those whose merge stands first in the list, until none is left.
With fewer merges it does the same to a text as long as every merge that it made of that text is still there: at each
step the first merge of the longer list is then also the first of the shorter. What a token was joined from does not
depend on the text around it, because nothing was ever joined across its ends; so the merges that made it are found by
encoding it alone, and a set of tokens is *closed* that has, with each token, the two that were joined last to make it.
A text whose tokens are all in a closed set is encoded into the same tokens with that set alone; any other is encoded
into smaller pieces, bytes at worst.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers

from ..errors import UserError

Counts = npt.NDArray[np.int64]


class BytePairs:
    """A tokenizer's pieces and merges.

    Args:
        tokenizer: the contents of a ``tokenizer.json``.
        name: for messages.

    Attributes:
        ids: of every token, added ones too.
        added: the ids of tokens that are found in a text before anything is joined.

    Raises:
        UserError: it is none of byte pairs, or one that cannot encode every text once characters are missing.
    """

    def __init__(self, tokenizer: dict[str, Any], name: str) -> None:
        self._json, model = tokenizer, tokenizer["model"]
        if model["type"] != "BPE" or any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        ):
            raise UserError(
                f"The tokenizer of {name} is {model['type']}{' with affixes or dropout' * (model['type'] == 'BPE')}. "
                "Only plain byte pairs, as Gemma, Llama 3 and Qwen have them, can be trimmed."
            )
        self.merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._pieces: dict[str, int] = model["vocab"]
        self._piece_of = {index: token for token, index in self._pieces.items()}
        self.ids = {**self._pieces, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
        self.added = {token["id"] for token in tokenizer["added_tokens"]}
        self._bytes = self._byte_tokens(model, name)
        self._halves: dict[str, tuple[str, str] | None] = {}

    def indispensable(self) -> set[int]:
        """The ids of added tokens, bytes, the unknown token, and pieces that no text is encoded into, which are
        control tokens."""
        made = {left + right for left, right in self.merges}
        unmade = (token for token in self._pieces if len(token) > 1 and token not in made)
        unknown = self._json["model"].get("unk_token")
        # Where merges are ignored, whole words are looked up, and a word need not be made by any.
        control = [] if self._json["model"].get("ignore_merges") else list(unmade)
        return self.added | {self.ids[token] for token in (*self._bytes, *control, *([unknown] if unknown else []))}

    def closed(self, ids: Iterable[int]) -> set[int]:
        """The smallest closed set with these ids."""
        found, open_ = set(), list(ids)
        while open_:
            index = open_.pop()
            if index not in found:
                found.add(index)
                open_ += [self.ids[half] for half in self.halves(self._piece_of.get(index, "")) or ()]
        return found

    def formed(self, counts: Counts) -> Counts:
        """How often each token comes up while texts are encoded, as a token in the end or on the way to one.

        That is also how many tokens longer the texts get without it, where no other merge takes its place. A token
        comes up at least as often as any that is made of it, so the most frequent ones are a closed set.

        Args:
            counts: int64 (tokens,), how often each token is one in the end.
        """
        formed = counts.copy()
        by_length: dict[int, list[str]] = {}
        for token in self._pieces:
            by_length.setdefault(len(token), []).append(token)
        for length in sorted(by_length, reverse=True):
            for token in by_length[length]:
                if formed[self.ids[token]]:
                    for half in self.halves(token) or ():
                        formed[self.ids[half]] += formed[self.ids[token]]
        return formed

    def halves(self, token: str) -> tuple[str, str] | None:
        """The two tokens that are joined last to make a token; None for one that is not made by joining."""
        if token not in self._halves:
            self._halves[token] = self._last_join(token)
        return self._halves[token]

    def filled(self, kept: set[int], size: int, others: Iterable[int]) -> set[int]:
        """A set and, up to a size, others with what they are made of: lower ids, whose merges come first, before.

        Args:
            others: that may be taken; enough of them, and closed together with ``kept``.
        """
        kept, candidates = set(kept), sorted(set(others) - kept)
        while len(kept) < size:  # again, for those that were too many with all that they are made of
            for index in candidates:
                if len(kept) == size:
                    break
                more = self.closed([index]) - kept
                if len(kept) + len(more) <= size:
                    kept |= more
            candidates = [index for index in candidates if index not in kept]
        return kept

    def trimmed(self, kept: Collection[int]) -> dict[str, Any]:
        """The ``tokenizer.json`` of a closed set, whose ids are renumbered in their order."""
        new = {old: index for index, old in enumerate(sorted(kept))}
        model = self._json["model"]
        pieces = {token: new[index] for token, index in self._pieces.items() if index in new}
        merges = [pair for pair in self.merges if all(part in pieces for part in (*pair, "".join(pair)))]
        return {
            **self._json,
            "model": {**model, "vocab": pieces, "merges": merges},
            "added_tokens": [
                {**token, "id": new[token["id"]]} for token in self._json["added_tokens"] if token["id"] in new
            ],
            "post_processor": _renumbered(self._json.get("post_processor"), new.__getitem__),
            "padding": _renumbered(self._json.get("padding"), new.__getitem__),
        }

    def _byte_tokens(self, model: dict[str, Any], name: str) -> list[str]:
        spelled = [f"<0x{byte:02X}>" for byte in range(256)]
        levels = pre_tokenizers.ByteLevel.alphabet()
        if model.get("byte_fallback") and all(token in self._pieces for token in spelled):
            return spelled
        if '"ByteLevel"' in json.dumps(self._json.get("decoder")) and all(token in self._pieces for token in levels):
            return list(levels)
        raise UserError(
            f"The tokenizer of {name} has no token for each byte, so texts could not be told apart once characters "
            "are gone. Only those that have can be trimmed."
        )

    def _last_join(self, token: str) -> tuple[str, str] | None:
        parts = list(token)
        while True:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in pairwise(parts)]
            if not ranks or (best := min(ranks)) == len(self._rank):
                return None
            at = ranks.index(best)  # of equal ones, the leftmost
            if len(parts) == 2:
                return parts[0], parts[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _renumbered(part: Any, new: Callable[[int], int]) -> Any:
    """A post-processor or padding, the ids in it renumbered: ``ids`` and ``pad_id``, ``sep`` and ``cls`` as pairs."""
    if isinstance(part, list):
        return [_renumbered(each, new) for each in part]
    if not isinstance(part, dict):
        return part
    made: dict[str, Any] = {}
    for key, value in part.items():
        if key == "pad_id":
            made[key] = new(value)
        elif key == "ids":
            made[key] = [new(index) for index in value]
        elif key in ("sep", "cls"):
            made[key] = [value[0], new(value[1])]
        else:
            made[key] = _renumbered(value, new)
    return made
