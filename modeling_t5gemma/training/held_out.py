"""Some windows are kept for measuring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..objectives import Objective, Tokens, example_rng
from .documents import Windows
from .evaluation import HeldOutPair


class Remaining:
    """The windows that are trained on: all but ``count``, which are spread evenly: of the text's kind, and far enough
    apart to know little of each other.

    Raises:
        UserError: no window would be left to train on.
    """

    def __init__(self, windows: Windows, count: int) -> None:
        if not 0 <= count < len(windows):
            raise UserError(
                f"{count} of {len(windows)} windows cannot be held out: at least one has to remain to train on. Give "
                "more text, or a smaller held_out."
            )
        self.windows = windows
        self.held_out = np.arange(count, dtype=np.int64) * len(windows) // max(1, count)
        self.mean_tokens = windows.mean_tokens
        # How many windows remain before each held-out one: what lies behind it has moved up by one more.
        self._before = self.held_out - np.arange(count)

    def __len__(self) -> int:
        return len(self.windows) - len(self.held_out)

    def piece(self, index: int) -> Tokens:
        return self.windows.piece(self._place(index))

    def locate(self, index: int) -> tuple[int, int]:
        return self.windows.locate(self._place(index))

    def taught(self, index: int) -> npt.NDArray[np.uint32] | None:
        return self.windows.taught(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index + int(np.searchsorted(self._before, index, side="right"))

    def pairs(self, objective: Objective, seed: int) -> list[HeldOutPair]:
        """The windows that are kept, as the objective makes examples of them; the same ones every time."""
        pairs = []
        for number, index in enumerate(self.held_out.tolist()):
            example = objective(self.windows.piece(index), example_rng(seed, 0, number))
            pairs.append(HeldOutPair(example.source, example.target))
        return pairs
