"""Masks in a text, filled by a model that was trained on span corruption.

Source and target are those of ``objectives.SpanCorruption``: the n-th sentinel stands for the n-th span in the source
and goes before it in the target, which the end-of-sequence token ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import UserError
from ..training.tokenizing import encode

MASK = "<mask>"


@dataclass(frozen=True)
class Masked:
    """A text with masks.

    Attributes:
        pieces: the text between them, one more than there are masks. A space before a mask is left out: it belongs to
            the word that is masked, as in the tokens of the training text.
        spaced: whether there was a space before each mask.
    """

    pieces: tuple[str, ...]
    spaced: tuple[bool, ...]

    @classmethod
    def parse(cls, text: str) -> Masked:
        """Find the masks.

        Raises:
            UserError: there are none, or two with nothing between them.
        """
        pieces = text.split(MASK)
        if len(pieces) == 1:
            raise UserError(f'The text has no {MASK}. Write one where words are missing: "Paris is {MASK} of France".')
        if any(not piece.strip() for piece in pieces[1:-1]):
            raise UserError(f"Two {MASK} have nothing between them. One stands for any number of words: drop one.")
        spaced = tuple(piece.endswith(" ") for piece in pieces[:-1])
        return cls((*(piece.removesuffix(" ") for piece in pieces[:-1]), pieces[-1]), spaced)

    @property
    def masks(self) -> int:
        return len(self.spaced)

    def source(self, tokenizer: Any, sentinels: Sequence[int], mode: int | None = None) -> list[int]:
        """The encoder's tokens, without ``<bos>``; in the text no special tokens are seen, as in training.

        Args:
            sentinels: in the order of their use.
            mode: the token of a denoiser, which goes first; None for none.

        Raises:
            UserError: there are more masks than sentinels.
        """
        if self.masks > len(sentinels):
            raise UserError(f"The text has {self.masks} masks, and the model has {len(sentinels)} sentinels for them.")
        first, *others = (ids.tolist() for ids in encode(tokenizer, self.pieces))
        ids = [*([] if mode is None else [mode]), *first]
        for sentinel, piece in zip(sentinels, others):
            ids += [sentinel, *piece]
        return ids

    def filled(self, fills: Sequence[str | None]) -> list[tuple[str, bool]]:
        """Parts of the text, and whether each is a fill. A mask without one stays."""
        parts = [(self.pieces[0], False)]
        for fill, spaced, piece in zip(fills, self.spaced, self.pieces[1:], strict=True):
            text = MASK if fill is None else fill
            if spaced and not text[:1].isspace():
                text = f" {text}"
            parts += [(text, fill is not None), (piece, False)]
        return parts


@dataclass(frozen=True)
class Spans:
    """What a model says for each mask.

    Attributes:
        tokens: of each mask; None where the answer does not say, or says two things.
        problems: where the answer is not what a target looks like, in words; masks count from 1.
    """

    tokens: tuple[tuple[int, ...] | None, ...]
    problems: tuple[str, ...]

    @classmethod
    def parse(cls, answer: Sequence[int], sentinels: Sequence[int], masks: int, ends: Collection[int]) -> Spans:
        """Cut an answer at its sentinels.

        Args:
            answer: the decoder's new tokens.
            sentinels: all of the model's, in the order of their use; the source has the first ``masks`` of them.
            ends: tokens that end the answer.
        """
        problems = []
        end = next((place for place, token in enumerate(answer) if token in ends), None)
        if end is None:
            problems.append("the answer does not end: its last span may go on (--max-new-tokens)")
        number_of = {sentinel: number for number, sentinel in enumerate(sentinels, 1)}
        before: list[int] = []
        found: list[tuple[int, list[int]]] = []
        for token in answer[:end]:
            if token in number_of:
                found.append((number_of[token], []))
            else:
                (found[-1][1] if found else before).append(token)
        if before:
            problems.append(f"{len(before)} tokens before the first sentinel")
        order = [number for number, _ in found]
        if extra := sorted({number for number in order if number > masks}):
            problems.append(f"sentinels of masks that the text does not have: {_listed(extra)}")
        if any(one > other for one, other in pairwise(order)):
            problems.append(f"sentinels out of order: {_listed(order)}")
        tokens: list[tuple[int, ...] | None] = []
        for mask in range(1, masks + 1):
            spans = [span for number, span in found if number == mask]
            tokens.append(tuple(spans[0]) if len(spans) == 1 else None)
            if len(spans) != 1:
                problems.append(f"mask {mask} has {f'{len(spans)} fills' if spans else 'no sentinel in the answer'}")
            elif not spans[0]:
                problems.append(f"mask {mask} has an empty fill")
        return cls(tuple(tokens), tuple(problems))

    def texts(self, tokenizer: Any) -> list[str | None]:
        """The text of each span, as it reads in the middle of a text: with the space that it begins with."""
        before = encode(tokenizer, ["a"])[0].tolist()
        prefix = self._decoded(tokenizer, before)
        return [
            None if ids is None else self._decoded(tokenizer, [*before, *ids])[len(prefix) :] for ids in self.tokens
        ]

    @staticmethod
    def _decoded(tokenizer: Any, ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
