"""What every objective is: a function of a window and a generator, which gives a source and a target.

Shapes: L tokens of a window. Token arrays are int32 and one-dimensional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """One example; its arrays may share memory with the window.

    Attributes:
        source: what the encoder reads, without ``<bos>``.
        target: what the decoder has to produce; its input is its start token and ``target[:-1]``.
        continues: the target goes on where the source ends, word for word: source + target is the window, so that a
            decoder-only teacher can teach it.
    """

    source: Tokens
    target: Tokens
    continues: bool


class Objective(Protocol):
    """How a window becomes an example."""

    @property
    def name(self) -> str:
        """For logs and messages."""

    @property
    def teachable(self) -> bool:
        """Whether every example ``continues``."""

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        """Make an example of a window, int32 (L,), of at least ``shortest()`` tokens."""

    def lengths(self, window: int) -> tuple[int, int]:
        """The longest source and the longest target that a window of so many tokens can give; never less for a longer
        window."""

    def shortest(self) -> int:
        """The fewest tokens that a window can have."""

    def sentinels_needed(self, window: int) -> int:
        """The most sentinels that a window of so many tokens can take; never less for a longer window."""


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example: Philox with key (seed, epoch) and ``index`` as the highest word of its counter.

    No two triples share a stream, and none reaches another's before 2**192 blocks.

    Raises:
        OverflowError: a number is negative or has more than 64 bits.
    """
    key: Any = _Key(seed, epoch)  # numpy's annotations know SeedSequence alone
    return np.random.Generator(np.random.Philox(key, counter=np.array([0, 0, 0, index], np.uint64)))


class _Key(ISeedSequence):
    """A generator's key as it is. Philox would hash a seed, and given a key it still asks the system for entropy."""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        assert n_words == len(self._words) and dtype == np.uint64
        return self._words
