"""Rows: the same for every number of workers and ranks, and from every position."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.mixture import Sample
from modeling_t5gemma.training.rows import RowBatch, Rows

from .samples import mixture, same

CAPACITY = (64, 64)


def take(count: int, capacity=CAPACITY, rows_per_batch=4, world=1, rank=0, **options) -> list[RowBatch]:
    rows = Rows(mixture(), capacity, rows_per_batch, world, rank, **options)
    return list(itertools.islice(rows, count))


def flat(batches: list[RowBatch]) -> list[list[Sample]]:
    return [row for batch in batches for row in batch.rows]


def assert_same(first: list[list[Sample]], second: list[list[Sample]]) -> None:
    assert [len(row) for row in first] == [len(row) for row in second]
    for a, b in zip(first, second):
        assert all(map(same, a, b))


def of_ranks(count: int, world: int, rows_per_batch: int = 4, **options) -> list[RowBatch]:
    """Global batches, of all ranks one after the other."""
    ranks = [take(count, world=world, rank=r, rows_per_batch=rows_per_batch, **options) for r in range(world)]
    batches = []
    for parts in zip(*ranks):
        assert len({part.position for part in parts}) == 1
        batches.append(RowBatch([row for part in parts for row in part.rows], parts[0].position))
    return batches


@pytest.mark.parametrize("capacity", [None, CAPACITY])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_workers_change_nothing(capacity, workers: int):
    alone = take(12, capacity, rows_per_batch=7)
    helped = take(12, capacity, rows_per_batch=7, num_workers=workers)
    assert_same(flat(alone), flat(helped))
    assert [batch.position for batch in alone] == [batch.position for batch in helped]


@pytest.mark.parametrize("capacity", [None, CAPACITY])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches(capacity, world: int):
    alone = take(10, capacity, rows_per_batch=4 * world)
    shared = of_ranks(10, world, capacity=capacity)
    assert [batch.position for batch in alone] == [batch.position for batch in shared]
    assert all(len(batch.rows) == 4 * world for batch in shared)
    for whole, parts in zip(alone, shared):
        assert_same(whole.rows, parts.rows)


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_any_position_gives_the_rest(capacity):
    batches = take(20, capacity, rows_per_batch=5)
    for done in range(1, 20):
        rest = take(20 - done, capacity, rows_per_batch=5, position=batches[done - 1].position)
        assert_same(flat(rest), flat(batches[done:]))
        assert [batch.position for batch in rest] == [batch.position for batch in batches[done:]]


def test_ranks_and_batch_size_may_change_at_a_position():
    rows = flat(take(40, rows_per_batch=3))
    begun = of_ranks(5, world=2, rows_per_batch=3)
    assert_same(flat(begun), rows[:30])
    rest = of_ranks(2, world=4, rows_per_batch=5, position=begun[-1].position)
    assert_same(flat(rest), rows[30:70])
    last = take(10, rows_per_batch=5, position=rest[-1].position, num_workers=2)
    assert_same(flat(last), rows[70:120])


def test_rows_fit_and_hold_every_sample():
    samples = mixture()
    wanted = Counter(sample.where for b in range(3) for sample in samples.block(b))
    found: Counter[str] = Counter()
    for batch in Rows(mixture(), CAPACITY, 1, 1, 0):
        (row,) = batch.rows
        assert sum(len(s.source) for s in row) <= 64 and sum(len(s.target) for s in row) <= 64
        found.update(sample.where for sample in row)
        if batch.position == 3 << 20:
            break
    assert found == wanted


def test_rows_of_large_samples_are_not_together():
    samples = mixture(block=1024)
    rows = itertools.takewhile(lambda batch: batch.position < 1 << 20, Rows(samples, CAPACITY, 1, 1, 0))
    counts = np.array([len(batch.rows[0]) for batch in rows], float)
    assert abs(np.corrcoef(counts, np.arange(len(counts)))[0, 1]) < 5 / np.sqrt(len(counts))


def test_an_iteration_begins_anew():
    rows = Rows(mixture(), CAPACITY, 4, 1, 0)
    first, second = (list(itertools.islice(rows, 3)) for _ in range(2))
    assert_same(flat(first), flat(second))


def test_a_position_of_other_data():
    with pytest.raises(UserError, match="stopped before its row 1000"):
        take(1, position=1000)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_s_error_is_the_plain_one(workers: int):
    with pytest.raises(UserError, match=r"^Sample .* more than a row's 8 and 8"):
        take(1, capacity=(8, 8), num_workers=workers)


@pytest.mark.parametrize("options", [dict(rank=1), dict(rows_per_batch=0), dict(position=-1), dict(num_workers=-1)])
def test_numbers_out_of_range(options):
    with pytest.raises(UserError, match="begins at 1"):
        take(1, **options)
