"""Batches of rows for each rank, the same rows whatever the number of workers and ranks.

Rows have one global order: block by block. A global batch is the next ``rows_per_batch * world`` of them, across the
borders of blocks, and each rank takes its part. Where a run stands is the number of the next row: a single integer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .packing import pack
from .permutation import Permutation

_ROW_BITS = 20


class Located(Protocol):
    """A sample: whatever the collator understands, with a name. Packing asks for ``source`` and ``target`` too."""

    @property
    def where(self) -> str: ...


class Blocks(Protocol):
    """Blocks of samples, each a function of its number."""

    def block(self, number: int) -> Sequence[Located]:
        """The samples number * block and following, the same at every call."""


@dataclass(frozen=True, eq=False)
class RowBatch:
    """One rank's part of a global batch.

    Attributes:
        rows: the samples of each row, to be packed together.
        position: of the first row after the global batch: where to go on. The same on every rank.
    """

    rows: list[list[Any]]
    position: int


class Rows:
    """The batches of one rank, without an end; every iteration begins at ``position``.

    Every rank makes all blocks, since where one ends depends on how its samples pack, and yields its own part.

    Args:
        samples: gives the blocks; sent to the workers.
        capacity: tokens of a row's sources and targets; None has one sample in a row.
        rows_per_batch: of one rank.
        position: of the first row (``RowBatch.position``), from a run with any number of workers and ranks, and any
            ``rows_per_batch``.
        num_workers: processes that make blocks ahead; 0 makes them here.
        before_source: tokens that the layout puts before each source, which take room in a row.

    Raises:
        UserError: a number is out of range; while iterating, whatever making the blocks raises, or there is no such
            position, as happens when the data or its settings are not those it was saved with.
    """

    def __init__(
        self,
        samples: Blocks,
        capacity: tuple[int, int] | None,
        rows_per_batch: int,
        world: int,
        rank: int,
        position: int = 0,
        num_workers: int = 0,
        before_source: int = 0,
    ) -> None:
        if rows_per_batch < 1 or not 0 <= rank < world or position < 0 or num_workers < 0:
            raise UserError(
                f"rows_per_batch ({rows_per_batch}) begins at 1, rank ({rank}) is below world ({world}), and position "
                f"({position}) and workers ({num_workers}) are not negative."
            )
        self.position, self.rows_per_batch, self.world, self.rank = position, rows_per_batch, world, rank
        self._blocks = _BlocksOfRows(samples, capacity, before_source)
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[RowBatch]:
        first, size = self.rank * self.rows_per_batch, self.rows_per_batch * self.world
        rows = self._rows()
        while True:
            batch = list(itertools.islice(rows, size))
            yield RowBatch([row for row, _ in batch[first : first + self.rows_per_batch]], batch[-1][1])

    def _rows(self) -> Iterator[tuple[list[Any], int]]:
        """Every row from the position on, and the position after it."""
        block, skip = divmod(self.position, 1 << _ROW_BITS)
        loader: DataLoader[list[list[Any]] | UserError] = DataLoader(
            self._blocks,
            batch_size=None,
            sampler=_From(block),
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            # A generator of its own: it would draw a seed from torch's, which a resumed run has just restored.
            generator=torch.Generator(),
        )
        for number, rows in enumerate(loader, block):
            if isinstance(rows, UserError):
                raise rows
            if skip > len(rows):
                raise UserError(
                    f"Block {number} has {len(rows)} rows and the run stopped before its row {skip}: the data, the "
                    "seed or the packing has changed since. Give what the run began with."
                )
            for n, row in enumerate(rows[skip:], skip + 1):
                yield row, (number << _ROW_BITS) + n if n < len(rows) else (number + 1) << _ROW_BITS
            skip = 0


class _BlocksOfRows(Dataset[list[list[Any]] | UserError]):
    """Blocks by number, as rows. An error is returned: torch would wrap a traceback of the worker around its text."""

    def __init__(self, samples: Blocks, capacity: tuple[int, int] | None, before_source: int) -> None:
        self.samples, self.capacity, self.before_source = samples, capacity, before_source

    def __getitem__(self, number: int) -> list[list[Any]] | UserError:
        try:
            samples: Sequence[Any] = self.samples.block(number)
            if self.capacity is None:
                return [[sample] for sample in samples]
            sizes = [(self.before_source + len(sample.source), len(sample.target)) for sample in samples]
            lengths = np.array(sizes, np.int64)
            rows = pack(lengths, self.capacity)
        except UserError as error:
            return error
        # pack() begins with the large samples: a batch should not be made of like ones.
        order = Permutation(len(rows), (number,))(np.arange(len(rows)))
        return [[samples[n] for n in rows[k]] for k in order]


class _From(Sampler[int]):
    """The numbers from ``first`` on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def _unchanged(rows: list[list[Any]] | UserError) -> list[list[Any]] | UserError:
    return rows
