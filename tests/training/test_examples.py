"""Whole records in an endless, shuffled, resumable order."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.examples import ShuffledExamples, rows_of_an_epoch, steps_of
from modeling_t5gemma.training.rows import Rows


@dataclass(frozen=True)
class Record:
    number: int

    @property
    def where(self) -> str:
        return f"record {self.number}"


def numbers(examples: ShuffledExamples, blocks: int) -> list[int]:
    return [record.number for n in range(blocks) for record in examples.block(n)]


def test_every_example_comes_once_an_epoch_in_another_order():
    found = numbers(ShuffledExamples([Record(n) for n in range(30)], seed=1, block=20), 3)
    first, second = found[:30], found[30:]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second and first != list(range(30))


def test_another_seed_is_another_order():
    examples = [Record(n) for n in range(30)]
    assert numbers(ShuffledExamples(examples, 1), 1) != numbers(ShuffledExamples(examples, 2), 1)


def test_rows_go_on_from_a_position():
    examples = ShuffledExamples([Record(n) for n in range(7)], seed=0, block=5)
    whole = [batch for batch, _ in zip(Rows(examples, None, 3, 1, 0), range(6))]
    rest = [batch for batch, _ in zip(Rows(examples, None, 3, 1, 0, whole[2].position), range(3))]
    assert [batch.rows for batch in rest] == [batch.rows for batch in whole[3:]]


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="no examples"):
        ShuffledExamples([], seed=0)


def test_steps_of_epochs():
    lengths = np.tile(np.array([[4, 2]], np.int64), (10, 1))
    assert rows_of_an_epoch(lengths, None) == 10
    assert rows_of_an_epoch(lengths, (8, 4)) == 5
    args = SimpleNamespace(
        max_steps=-1,
        num_train_epochs=1.5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        world_size=1,
    )
    assert steps_of(args, 10) == 4
    args.max_steps = 7
    assert steps_of(args, 10) == 7
