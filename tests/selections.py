"""Which of many combinations run every time. The others are marked ``slow``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that run with ``--slow`` alone: ``[0, *slow(1, 2)]``."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of a value of each axis, as parameters of a test.

    As many run every time as it takes for each value to meet each value of every other axis.
    """

    def pairs(places: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(places), 2))

    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing, quick = set().union(*map(pairs, combinations)), set()
    while missing:
        best = max(combinations, key=lambda places: len(pairs(places) & missing))
        quick.add(best)
        missing -= pairs(best)
    marks = {True: (), False: pytest.mark.slow}
    return [
        pytest.param(*(axis[place] for axis, place in zip(axes, places)), marks=marks[places in quick])
        for places in combinations
    ]
