"""Tokenised documents, and the windows that they are cut into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..objectives import Tokens


class Documents(Protocol):
    """Documents by number, as tokens without special ones."""

    @property
    def name(self) -> str:
        """What error messages call them."""

    @property
    def lengths(self) -> npt.NDArray[np.integer]:
        """Tokens of each document, (len,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, document: int) -> Tokens:
        """int32, and without a copy where that is possible: a document may be larger than the memory."""


class Windows(Protocol):
    """Random access to windows of text; see ``Pieces``."""

    @property
    def mean_tokens(self) -> float:
        """Of a window."""

    def __len__(self) -> int: ...

    def piece(self, index: int) -> Tokens:
        """A window's tokens, int32."""

    def locate(self, index: int) -> tuple[int, int]:
        """The document of a window, and the place of its first token there."""

    def taught(self, index: int) -> npt.NDArray[np.uint32] | None:
        """What a teacher would have said in the place of each token, (tokens, samples), where that is known."""


class MemoryDocuments:
    """Documents that fit into memory, 4 bytes a token."""

    def __init__(self, name: str, documents: Iterable[Tokens]) -> None:
        self.name = name
        parts = [np.asarray(document, np.int32) for document in documents]
        self.lengths: npt.NDArray[np.int64] = np.array([len(part) for part in parts], np.int64)
        self._tokens = np.concatenate([np.zeros(0, np.int32), *parts])
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> Tokens:
        end = int(self._ends[document])
        return self._tokens[end - int(self.lengths[document]) : end]


class Pieces:
    """Random access to the windows of documents: a document longer than a window is cut end to end, every token is in
    exactly one piece. Holds 8 bytes a document.

    Args:
        window: most tokens of a piece.
        shortest: fewest. Where a document's remainder would be shorter, its last two pieces share their tokens evenly.

    Attributes:
        skipped: documents that are shorter than ``shortest`` as a whole, the only tokens that no piece has.
        mean_tokens: of a piece.

    Raises:
        UserError: a shared remainder could be too short for two pieces, or no document is long enough.
    """

    def __init__(self, documents: Documents, window: int, shortest: int) -> None:
        check_cut(window, shortest)
        self.documents, self.window, self.shortest = documents, window, shortest
        lengths = documents.lengths
        counts = -(-lengths.astype(np.int64) // window)
        counts[lengths < shortest] = 0
        self.skipped = int((counts == 0).sum())
        self._ends = np.cumsum(counts, out=counts)
        if not len(self):
            raise UserError(
                f"{documents.name}: none of its {len(documents)} documents has the {shortest} tokens that the "
                "objective needs. Give longer documents."
            )
        self.mean_tokens = float(lengths[lengths >= shortest].sum(dtype=np.int64)) / len(self)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The document of a piece, and the place of its first token there."""
        document, offset, _ = self._find(index)
        return document, offset

    def piece(self, index: int) -> Tokens:
        """A piece's tokens, int32, a copy.

        Raises:
            IndexError: there is no such piece.
        """
        document, offset, length = self._find(index)
        return self.documents[document][offset : offset + length].copy()

    def taught(self, index: int) -> npt.NDArray[np.uint32] | None:
        """Nothing: this is text alone."""
        return None

    def _find(self, index: int) -> tuple[int, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.documents.name} has {len(self)} pieces, so there is no piece {index}.")
        document = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[document - 1]) if document else 0
        return document, *Cut(len(self.documents[document]), self.window, self.shortest)[index - first]


@dataclass(frozen=True)
class Cut:
    """The pieces of a document of ``length`` tokens, each (first token, tokens): as ``Pieces`` says."""

    length: int
    window: int
    shortest: int

    def __len__(self) -> int:
        return -(-self.length // self.window) if self.length >= self.shortest else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[piece] for piece in range(len(self)))

    def __getitem__(self, piece: int) -> tuple[int, int]:
        count, window = len(self), self.window
        if not 0 <= piece < count:
            raise IndexError(piece)
        remainder = self.length - (count - 1) * window
        shared = window + remainder
        if count == 1 or remainder >= self.shortest or piece < count - 2:
            return piece * window, min(window, self.length - piece * window)
        if piece == count - 2:
            return piece * window, shared - shared // 2
        return self.length - shared // 2, shared // 2


def check_cut(window: int, shortest: int) -> None:
    """Refuse a window that its remainder could not be shared with.

    Raises:
        UserError: half a window is less than ``shortest``.
    """
    if shortest < 1 or window + 1 < 2 * shortest:
        raise UserError(
            f"A window of {window} tokens is too small for an objective that needs {shortest}: give a window of at "
            f"least {max(1, 2 * shortest - 1)}."
        )
