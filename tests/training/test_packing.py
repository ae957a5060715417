"""Packing: nothing lost, nothing over, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.packing import pack


def padding(rows: list[np.ndarray], lengths: np.ndarray, capacity: tuple[int, int]) -> float:
    return 1 - lengths.sum() / (len(rows) * sum(capacity))


@settings(max_examples=300, deadline=None)
@given(
    capacity=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    fractions=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=80),
)
def test_every_sample_once_and_no_row_too_long(capacity, fractions):
    lengths = np.array([[round(a * capacity[0]), round(b * capacity[1])] for a, b in fractions], np.int64)
    lengths = lengths.reshape(-1, 2)
    rows = pack(lengths, capacity)
    assert sorted(np.concatenate([np.zeros(0, np.int64), *rows]).tolist()) == list(range(len(lengths)))
    for row in rows:
        assert len(row) and (lengths[row].sum(axis=0) <= capacity).all()
    assert all(np.array_equal(row, again) for row, again in zip(rows, pack(lengths, capacity)))


def test_a_perfect_fit_is_found_to_the_last_token():
    lengths = np.full((64, 2), 128)
    assert len(pack(lengths, (1024, 1024))) == 8
    thirds = np.tile([[1, 2], [1, 0], [1, 1]], (20, 1))
    assert len(pack(thirds, (3, 3))) == 20


@pytest.mark.parametrize("capacity", [1024, 2048])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_windows_cut_in_half(capacity: int, seed: int):
    windows = np.random.default_rng(seed).integers(16, 513, 1024)
    lengths = np.stack([windows // 2, windows - windows // 2], axis=1)
    assert padding(pack(lengths, (capacity, capacity)), lengths, (capacity, capacity)) < 0.02


@pytest.mark.parametrize("capacity", [2048, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_sources_and_targets(capacity: int, seed: int):
    lengths = np.random.default_rng(seed).integers(16, 513, (1024, 2))
    rows = pack(lengths, (capacity, capacity))
    assert len(rows) <= -(-lengths.sum(axis=0).max() // capacity) + 1, "one row more than any packing needs"
    assert padding(rows, lengths, (capacity, capacity)) < 0.035


def test_unequal_capacities():
    lengths = np.random.default_rng(0).integers(16, 513, (1024, 2)) // (1, 4)
    rows = pack(lengths, (4096, 1024))
    assert padding(rows, lengths, (4096, 1024)) < 0.035


def test_the_last_rows_share_what_is_left():
    lengths = np.full((66, 2), 100)
    sizes = [len(row) for row in pack(lengths, (1024, 1024))]
    assert len(sizes) == 7 and min(sizes) >= 6


def test_a_sample_larger_than_a_row():
    lengths = np.array([[10, 10], [10, 21], [30, 1]])
    with pytest.raises(UserError, match="Sample 1 has 10 source and 21 target tokens"):
        pack(lengths, (20, 20))
