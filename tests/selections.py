"""Which of many combinations run every time. The others are marked ``slow``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that run with ``--slow`` alone: ``[0, *slow(1, 2)]``."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def pairwise(
    *axes: Collection[Any], together: int = 2, allowed: Callable[..., bool] = lambda *values: True
) -> list[Any]:
    """All allowed combinations of a value of each axis, as parameters of a test.

    As many run every time as it takes for each value to meet each value of every other axis; with ``together`` 1, for
    each value to occur.
    """

    def groups(places: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(places), together))

    values = dict(zip(itertools.product(*(range(len(axis)) for axis in axes)), itertools.product(*axes)))
    values = {places: each for places, each in values.items() if allowed(*each)}
    missing, quick = set().union(*map(groups, values)), set()
    while missing:
        best = max(values, key=lambda places: len(groups(places) & missing))
        quick.add(best)
        missing -= groups(best)
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*each, marks=marks[places in quick]) for places, each in values.items()]
