"""From two arms' results to an effect, its interval and a verdict.

Shapes: S seeds, N held-out windows or test examples, the same for both arms and all seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

SEEN, NOT_SEEN, TOO_SMALL = "seen", "not seen", "too small to tell"
# Two-sided 95% quantiles of Student's t by degrees of freedom, and of the normal distribution.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_NORMAL = 1.960


@dataclass(frozen=True)
class Effect:
    """A mean difference and the half-width of its 95% interval."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def effect_of(better: Values, worse: Values) -> Effect:
    """The mean of ``better - worse``, both (S, N).

    The interval allows for other seeds and for other windows: the half-width of Student's t interval over the seeds'
    means (S - 1 degrees of freedom) and that of a normal interval over the windows' means, added as squares. With
    three seeds the first has a factor of 4.3 on its standard error, so it is wide.

    Raises:
        ValueError: shapes differ, or there are fewer than two seeds or windows.
    """
    if better.shape != worse.shape or min(better.shape) < 2:
        raise ValueError(f"Shapes {better.shape} and {worse.shape}: give two of one shape, at least 2 by 2.")
    differences = better - worse
    seeds, windows = differences.shape
    over_seeds = _T.get(seeds - 1, _T[9]) * differences.mean(axis=1).std(ddof=1) / math.sqrt(seeds)
    over_windows = _NORMAL * differences.mean(axis=0).std(ddof=1) / math.sqrt(windows)
    return Effect(float(differences.mean()), math.hypot(over_seeds, over_windows))


def verdict(effect: Effect) -> str:
    """Whether a claim that the effect is above 0 is seen: its interval lies above 0, below it, or holds it."""
    if effect.low <= 0 <= effect.high:
        return TOO_SMALL
    return SEEN if effect.mean > 0 else NOT_SEEN
