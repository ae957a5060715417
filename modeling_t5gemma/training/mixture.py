"""Training samples: windows of several sources in a fixed ratio, each made into an example by the run's objective.

Samples come in blocks. A block is a function of (seed, number of the block) alone, so any worker of any rank can make
it, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..objectives import Schedule, Tokens, example_rng
from .documents import Cut, Windows, check_cut
from .permutation import Permutation

# example_rng knows a seed, an epoch and an index; the source's number goes above the index.
_INDEX_BITS = 48
# Tells the shuffle within a block from Permutation's keys, which have three numbers.
_BLOCK_SHUFFLE = 1


@dataclass(frozen=True)
class Source:
    """Documents with random access, and their share relative to the other sources' (by windows, not tokens)."""

    name: str
    pieces: Windows
    weight: float


@dataclass(frozen=True)
class StreamedSource:
    """Documents that can only be read in order.

    Attributes:
        open: gives the documents from record ``start`` on, and an empty one for a record without a usable text: so a
            record's number is that of the document (``TokenStream``).
        weight: its share by windows, relative to the other sources'.
        window, shortest: how documents are cut, as for ``Pieces``. Shorter documents are left out.
    """

    name: str
    open: Callable[[int], Iterator[Tokens]]
    weight: float
    window: int
    shortest: int


@dataclass(frozen=True, eq=False)
class Sample:
    """An objective's example, and the window that it was made of.

    Attributes:
        source: int32, what the encoder reads.
        target: int32, what the decoder has to produce.
        continues: the target goes on where the source ends, word for word.
        where: the window, "name:document@offset", for error messages.
        taught: uint32 (target, samples), what a teacher would have said in the place of each target token, where that
            is known and the target goes on where the source ends.
    """

    source: Tokens
    target: Tokens
    continues: bool
    where: str
    taught: npt.NDArray[np.uint32] | None = None


class Samples:
    """Samples of sources with random access: within a source every window once in each epoch, in a shuffled order.

    Args:
        sources: of each there are as many samples in every block, by the weights.
        schedule: gives a block its objective by the share of the run before it.
        block: samples of a block; up to 2**20.
        total: samples of the whole run; None for a run without an end, which stays in the schedule's first stage.

    Raises:
        UserError: a weight is negative or too small for even one sample in a block, or none is positive.
    """

    def __init__(
        self, sources: Sequence[Source], schedule: Schedule, seed: int, block: int = 1024, total: int | None = None
    ) -> None:
        self.sources = list(sources)
        self._plan = _Plan([(source.name, source.weight) for source in sources], schedule, seed, block, total)

    def fraction(self, number: int) -> float:
        """Share of the run that is done before a block, 0 to 1."""
        return self._plan.fraction(number)

    def block(self, number: int) -> list[Sample]:
        """The samples of a block, a function of its number alone."""
        windows = []
        for k, (source, count) in enumerate(zip(self.sources, self._plan.counts)):
            length = len(source.pieces)
            epochs, places = np.divmod(np.arange(count * number, count * (number + 1)), length)
            for epoch in np.unique(epochs):
                order = Permutation(length, (self._plan.seed, int(epoch), k))
                for index in order(places[epochs == epoch]).tolist():
                    document, offset = source.pieces.locate(index)
                    where = f"{source.name}:{document}@{offset}"
                    taught = source.pieces.taught(index)
                    windows.append(_Window(source.pieces.piece(index), k, int(epoch), index, where, taught))
        return self._plan.samples(number, windows)


class StreamedSamples:
    """``Samples`` of sources that are read in order, so their windows are not shuffled beyond a block.

    Blocks are meant to be asked for one after the other. For another one the sources are read again from the last
    place known before it, and what lies between is cut but not made into samples: resuming a new process in the middle
    costs reading and tokenizing up to there. For long runs write shards (``t5gemma tokenize``).

    Args, Raises: as ``Samples``; also a source none of whose documents is long enough.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        schedule: Schedule,
        seed: int,
        block: int = 1024,
        total: int | None = None,
    ) -> None:
        self._plan = _Plan([(source.name, source.weight) for source in sources], schedule, seed, block, total)
        self._readers = [_Reader(source, k) for k, source in enumerate(sources)]

    def fraction(self, number: int) -> float:
        """Share of the run that is done before a block, 0 to 1."""
        return self._plan.fraction(number)

    def block(self, number: int) -> list[Sample]:
        """The samples of a block, a function of its number alone."""
        windows = []
        for reader, count in zip(self._readers, self._plan.counts):
            if count:
                windows += reader.windows(number * count, count)
        return self._plan.samples(number, windows)


@dataclass(frozen=True)
class _Window:
    tokens: Tokens
    source: int
    epoch: int
    index: int
    where: str
    taught: npt.NDArray[np.uint32] | None = None


class _Plan:
    """What both kinds of samples share: counts, order and objectives of the blocks."""

    def __init__(
        self, weights: Sequence[tuple[str, float]], schedule: Schedule, seed: int, block: int, total: int | None
    ) -> None:
        if not 1 <= block <= 1 << 20:
            raise UserError(f"A block has 1 to {1 << 20} samples, not {block}.")
        if total is not None and total < 1:
            raise UserError(f"A run has at least 1 sample, not {total}.")
        self.schedule, self.seed, self.size, self.total = schedule, seed, block, total
        self.counts = shares(weights, block)

    def fraction(self, number: int) -> float:
        return 0.0 if self.total is None else min(1.0, number * self.size / self.total)

    def samples(self, number: int, windows: list[_Window]) -> list[Sample]:
        objective = self.schedule.at(self.fraction(number))
        samples = []
        for place in np.random.default_rng((self.seed, number, 0, _BLOCK_SHUFFLE)).permutation(len(windows)).tolist():
            window = windows[place]
            rng = example_rng(self.seed, window.epoch, window.source << _INDEX_BITS | window.index)
            example = objective(window.tokens, rng)
            taught = None
            if window.taught is not None and example.continues:
                taught = window.taught[len(window.tokens) - len(example.target) :]
            samples.append(Sample(example.source, example.target, example.continues, window.where, taught))
        return samples


def shares(weights: Sequence[tuple[str, float]], block: int) -> list[int]:
    """How many samples of a block each source gives: the largest remainders round up. Weight 0 gives none.

    Args:
        weights: name and weight of each source.

    Raises:
        UserError: a weight is not a number from 0 on, none is positive, or one is too small for a sample in a block.
    """
    for name, weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"Source {name} has weight {weight}: give a number from 0 on.")
    total = math.fsum(weight for _, weight in weights)
    if total == 0:
        raise UserError("No source has a positive weight. Give at least one.")
    quotas = [block * weight / total for _, weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: (counts[k] - quotas[k], k))
    for k in by_remainder[: block - sum(counts)]:
        counts[k] += 1
    for (name, weight), count in zip(weights, counts):
        if weight > 0 and count == 0:
            smallest = (total - weight) / (block - 1) if block > 1 else math.inf
            raise UserError(
                f"Source {name} has weight {weight:g}, less than one sample in a block of {block}: give it at least "
                f"{smallest:.4g} (or 0 to leave it out), or a larger block."
            )
    return counts


@dataclass(frozen=True)
class _Place:
    """Where a stream stands: before the first window of a record."""

    epoch: int
    record: int
    windows: int  # cut in all, in every epoch
    of_epoch: int  # cut in this epoch


class _Reader:
    """The windows of one stream by number, epoch after epoch.

    Places are kept, one in at least 4096 windows, so that going back reads a little only.
    """

    _EVERY = 4096

    def __init__(self, source: StreamedSource, number: int) -> None:
        check_cut(source.window, source.shortest)
        self.source, self.number = source, number
        self._places = [_Place(0, 0, 0, 0)]
        self._next = 0
        self._stream: Iterator[_Window] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Another process opens its own stream."""
        return {**vars(self), "_stream": None}

    def windows(self, first: int, count: int) -> list[_Window]:
        if self._stream is None or first < self._next:
            place = max((place for place in self._places if place.windows <= first), key=lambda place: place.windows)
            self._stream, self._next = self._read(place), place.windows
        while self._next < first:
            next(self._stream)
            self._next += 1
        self._next += count
        return [next(self._stream) for _ in range(count)]

    def _read(self, place: _Place) -> Iterator[_Window]:
        name, window, shortest = self.source.name, self.source.window, self.source.shortest
        epoch, record, total, index = place.epoch, place.record, place.windows, place.of_epoch
        while True:
            for tokens in self.source.open(record):
                if total >= self._places[-1].windows + self._EVERY:
                    self._places.append(_Place(epoch, record, total, index))
                for offset, length in Cut(len(tokens), window, shortest):
                    piece = tokens[offset : offset + length].copy()
                    yield _Window(piece, self.number, epoch, index, f"{name}:{record}@{offset}")
                    total, index = total + 1, index + 1
                record += 1
            if not index:
                raise UserError(
                    f"{name}: none of its {record} records has the {shortest} tokens that the objective needs. Give "
                    "longer texts."
                )
            epoch, record, index = epoch + 1, 0, 0
