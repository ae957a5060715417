"""PrefixLM: the window is cut in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError
from .example import Example, Tokens


@dataclass(frozen=True)
class PrefixLM:
    """The first part is the source, the rest the target.

    Attributes:
        cut: "half" is the paper's ("Encoder-Decoder Gemma", arXiv 2504.06225, section 3): the source has L // 2
            tokens. "random": every cut that leaves both sides tokens is as likely as any other.
        min_source: the fewest tokens of a source, at least 1.
    """

    cut: Literal["half", "random"] = "half"
    min_source: int = 1

    name = "prefix_lm"
    teachable = True

    def __post_init__(self) -> None:
        if self.cut not in ("half", "random"):
            raise UserError(f"cut is {self.cut!r}; it can be half or random.")
        if self.min_source < 1:
            raise UserError(f"min_source is {self.min_source}; it must be at least 1.")

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        assert len(window) >= self.shortest(), (self, len(window))
        cut = len(window) // 2 if self.cut == "half" else int(rng.integers(self.min_source, len(window)))
        return Example(window[:cut], window[cut:], continues=True)

    def lengths(self, window: int) -> tuple[int, int]:
        if self.cut == "half":
            return window // 2, window - window // 2
        return window - 1, window - self.min_source

    def shortest(self) -> int:
        return 2 * self.min_source if self.cut == "half" else self.min_source + 1

    def sentinels_needed(self, window: int) -> int:
        return 0
