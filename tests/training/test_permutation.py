"""The computed shuffle is a shuffle: a bijection, keyed, without visible structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from modeling_t5gemma.training.permutation import Permutation


def shuffled(length: int, key: tuple[int, ...] = (0, 0, 0)) -> np.ndarray:
    return Permutation(length, key)(np.arange(length))


@pytest.mark.parametrize("lengths", [range(1, 301), (999, 1000, 1024, 4095, 4096, 4097, 65_537)])
def test_is_a_bijection(lengths):
    for length in lengths:
        assert np.array_equal(np.sort(shuffled(length, (length, 1, 2))), np.arange(length))


def test_one_number_of_the_key_changes_everything():
    base = shuffled(5000, (3, 4, 5))
    for key in [(4, 4, 5), (3, 5, 5), (3, 4, 6), (4, 3, 5), (0, 0, 0)]:
        # Two random permutations share one place on average, and more than 10 once in a hundred million.
        assert (shuffled(5000, key) == base).sum() <= 10
    assert np.array_equal(shuffled(5000, (3, 4, 5)), base)


def test_every_order_of_four_appears_about_as_often():
    orders = list(itertools.permutations(range(4)))
    draws = 4800
    counts = dict.fromkeys(orders, 0)
    for key in range(draws):
        counts[tuple(shuffled(4, (key, 0, 0)).tolist())] += 1
    expected = draws / len(orders)
    # 23 degrees of freedom: above 60 once in 30,000.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 60


@pytest.mark.parametrize("length", [1000, 10_007, 1 << 16, 300_000])
def test_neighbours_are_unrelated(length: int):
    values = shuffled(length).astype(float)
    for shift in (1, 2, 7, int(length**0.5), int(length**0.5) + 1):
        correlation = np.corrcoef(values[:-shift], values[shift:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(length), shift
    assert abs(np.corrcoef(values, np.arange(length))[0, 1]) < 5 / np.sqrt(length)


@pytest.mark.parametrize("length", [10_007, 300_000])
def test_places_and_steps_are_uniform(length: int):
    values, buckets = shuffled(length), 20
    # Where the numbers of each part of the input go: 19 * 19 free counts.
    table = np.histogram2d(np.arange(length), values, bins=buckets)[0]
    expected = length / buckets**2
    statistic = ((table - expected) ** 2 / expected).sum()
    free = (buckets - 1) ** 2
    assert abs(statistic - free) < 5 * np.sqrt(2 * free)
    # The step from one number to the next, around the circle.
    steps = np.histogram(np.diff(values) % length, bins=buckets, range=(0, length))[0]
    expected = (length - 1) / buckets
    assert ((steps - expected) ** 2 / expected).sum() < 19 + 5 * np.sqrt(2 * 19)


@pytest.mark.parametrize("length", [2**40, 2**40 - 87, 2**62])
def test_very_long(length: int):
    permutation = Permutation(length, (1, 2, 3))
    places = permutation(np.arange(20_000))
    assert len(np.unique(places)) == 20_000 and places.min() >= 0 and places.max() < length
    assert abs(places.mean() / length - 0.5) < 5 / np.sqrt(12 * 20_000)
    assert permutation(length - 1) < length


def test_an_int_is_an_array_of_one():
    permutation = Permutation(1000, (1, 1, 1))
    assert [permutation(i) for i in range(50)] == permutation(np.arange(50)).tolist()
    assert isinstance(permutation(7), int)


def test_out_of_range():
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"range\(10\)"):
            Permutation(10, (0,))(index)
    for length in (0, -1, 2**63):
        with pytest.raises(ValueError, match="elements"):
            Permutation(length, (0,))
