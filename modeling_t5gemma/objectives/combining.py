"""Several objectives: drawn in turn, or one after the other."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from ..errors import UserError
from .checks import check_weight
from .example import Example, Objective, Tokens


@dataclass(frozen=True)
class Mixture:
    """One of several objectives, drawn anew for each example.

    Attributes:
        weights: how often each, in proportion; above 0.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"{self.name} has {len(self.objectives)} objectives and {len(self.weights)} weights; a mixture takes "
                "at least one, and a weight for each."
            )
        for weight in self.weights:
            check_weight(weight)

    @property
    def teachable(self) -> bool:
        return all(objective.teachable for objective in self.objectives)

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        return self.objectives[bisect_right(self._bounds, rng.random())](window, rng)

    def lengths(self, window: int) -> tuple[int, int]:
        sources, targets = zip(*(objective.lengths(window) for objective in self.objectives))
        return max(sources), max(targets)

    def shortest(self) -> int:
        return max(objective.shortest() for objective in self.objectives)

    def sentinels_needed(self, window: int) -> int:
        return max(objective.sentinels_needed(window) for objective in self.objectives)

    @cached_property
    def _bounds(self) -> list[float]:
        """Where each share of [0, 1) but the last ends."""
        total = sum(self.weights)
        return [bound / total for bound in accumulate(self.weights[:-1])]


@dataclass(frozen=True)
class Schedule:
    """Objectives one after the other.

    Attributes:
        stages: each one's share of the run's tokens, which add up to 1, and its objective.
    """

    stages: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.stages]
        if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
            listed = ", ".join(f"{share:g}" for share in shares)
            raise UserError(f"The stages' shares are {listed or 'none'}; each must be above 0 and their sum 1.")

    def at(self, fraction: float) -> Objective:
        """The objective when ``fraction`` of the run is done; 1 and beyond is the last stage."""
        return self.stages[self.stage_index(fraction)][1]

    def stage_index(self, fraction: float) -> int:
        """The number of the stage, from 0 on. A stage begins at its bound."""
        if not fraction >= 0:
            raise ValueError(f"The fraction of a run that is done is at least 0, not {fraction}.")
        return bisect_right(self._bounds, fraction)

    @cached_property
    def _bounds(self) -> list[float]:
        """Where each stage but the last ends."""
        return list(accumulate(share for share, _ in self.stages[:-1]))
