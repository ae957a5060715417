"""Examples that are whole records, such as a question and its answer: every one once in each epoch, shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .packing import pack
from .permutation import Permutation
from .rows import Located


class ShuffledExamples:
    """Blocks of examples for ``Rows``. A block is a function of (seed, number of the block) alone; epochs follow each
    other without a gap.

    Args:
        examples: with random access; what they are is the collator's business.
        seed: decides the order.
        block: examples that are packed together; up to 2**20.

    Raises:
        UserError: there are no examples.
    """

    def __init__(self, examples: Sequence[Located], seed: int, block: int = 1024) -> None:
        if not len(examples):
            raise UserError("There are no examples to train on.")
        self.examples, self.seed, self.size = examples, seed, block

    def block(self, number: int) -> list[Located]:
        """The examples number * block and following of the endless order, the same at every call."""
        length = len(self.examples)
        epochs, places = np.divmod(np.arange(self.size * number, self.size * (number + 1)), length)
        found: list[Located] = []
        for epoch in np.unique(epochs).tolist():
            order = Permutation(length, (self.seed, epoch))
            found += [self.examples[index] for index in order(places[epochs == epoch]).tolist()]
        return found


def rows_of_an_epoch(lengths: npt.NDArray[np.int64], capacity: tuple[int, int] | None, block: int = 1024) -> int:
    """How many rows an epoch has: exact without packing, and with it but for the order of the examples.

    Args:
        lengths: tokens of each example's source and target, with those that the layout adds, (examples, 2).
        capacity: tokens of a row; None for one example a row.
    """
    if capacity is None:
        return len(lengths)
    blocks = [lengths[begin : begin + block] for begin in range(0, len(lengths), block)]
    return max(1, math.ceil(sum(len(pack(each, capacity)) for each in blocks)))


def steps_of(args: Any, rows: int) -> int:
    """``max_steps``, or how many steps ``num_train_epochs`` epochs of so many rows take.

    Args:
        args: transformers' training arguments.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(1, math.ceil(args.num_train_epochs * rows / a_step))
