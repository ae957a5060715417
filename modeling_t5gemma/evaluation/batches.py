"""Batches as large as fit: found by trying, the longest rows first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..errors import UserError

_ROWS = 64
# A GPU says when it is full. A CPU's memory only grows until the system ends the process, and larger batches than this
# make it no faster.
_CPU_TOKENS = 8192
_CPU_LOGITS, _GPU_LOGITS = 1 << 27, 1 << 30


@dataclass(frozen=True)
class Shape:
    """What an item needs: rows, source and target tokens of the longest, and how many of a row have logits."""

    rows: int
    source: int
    target: int
    scored: int


class Item(Protocol):
    """Something that goes through a model in one piece."""

    @property
    def shape(self) -> Shape: ...

    def halves(self) -> list[Any]:
        """Two smaller ones, or none if it is a single row."""
        ...


T = TypeVar("T", bound=Item)


@dataclass
class BatchSize:
    """What a batch may have.

    Attributes:
        rows: at most.
        tokens: source and target of all rows, padding included, at most; None as long as no limit was met.
        logits: values at most.
        vocabulary: logits of a token.
        largest: rows of the largest batch so far.
    """

    rows: int
    tokens: int | None
    logits: int
    vocabulary: int
    largest: int = 0

    @classmethod
    def of(cls, device: torch.device, vocabulary: int, rows: int | None = None) -> BatchSize:
        """Found automatically, or so many rows at first."""
        if device.type == "cpu":
            return cls(rows or _ROWS, _CPU_TOKENS if rows is None else None, _CPU_LOGITS, vocabulary)
        return cls(rows or _ROWS, None, _GPU_LOGITS, vocabulary)

    def holds(self, shapes: Sequence[Shape]) -> bool:
        """Whether these go together. All items of a batch have as many rows each."""
        if len({shape.rows for shape in shapes}) > 1:
            return False
        rows = sum(shape.rows for shape in shapes)
        logits = rows * max(shape.scored for shape in shapes) * self.vocabulary
        return rows <= self.rows and logits <= self.logits and (self.tokens is None or _tokens(shapes) <= self.tokens)


def in_batches(items: Sequence[T], size: BatchSize, work: Callable[[list[T]], None]) -> None:
    """Do all items, in their order, which should be that of their lengths: the longest first.

    A batch that does not fit into memory is done again in smaller ones, and the size is smaller from then on.

    Args:
        size: lowered when a batch does not fit.
        work: called with each batch. What it does must not be kept if it raises.

    Raises:
        UserError: a single row does not fit.
    """
    left = deque(items)
    while left:
        batch = [left.popleft()]
        if not size.holds([batch[0].shape]) and (parts := batch[0].halves()):
            left.extendleft(reversed(parts))
            continue
        while left and size.holds([item.shape for item in [*batch, left[0]]]):
            batch.append(left.popleft())
        shapes = [item.shape for item in batch]
        try:
            work(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(batch) == 1 and not batch[0].halves():
                raise UserError(
                    f"A single row of {shapes[0].source} + {shapes[0].target} tokens does not fit into memory. Give "
                    "--dtype bfloat16 or --device cpu."
                ) from error
            size.tokens = _tokens(shapes) // 2
            left.extendleft(reversed(batch))
        else:
            size.largest = max(size.largest, sum(shape.rows for shape in shapes))
            continue
        clear_device_cache(garbage_collection=True)  # behind the handler, whose traceback holds the batch's tensors


def _tokens(shapes: Sequence[Shape]) -> int:
    longest = max(shape.source for shape in shapes) + max(shape.target for shape in shapes)
    return longest * sum(shape.rows for shape in shapes)
