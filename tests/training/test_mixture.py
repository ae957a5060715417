"""Samples: a function of (seed, block), every window once an epoch, sources in their ratio."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.documents import Pieces
from modeling_t5gemma.training.mixture import Sample, Samples, StreamedSamples, StreamedSource, shares

from .samples import Stages, documents, mixture, same, source, window


def of(samples: list[Sample], name: str) -> list[Sample]:
    return [sample for sample in samples if sample.where.startswith(name + ":")]


def all_same(first: list[Sample], second: list[Sample]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second))


def test_a_block_depends_on_seed_and_number_alone():
    samples = mixture()
    once = [samples.block(b) for b in range(6)]
    again = mixture()
    for b in (5, 0, 3, 3):
        assert all_same(again.block(b), once[b])
    assert all_same(pickle.loads(pickle.dumps(samples)).block(4), once[4])
    assert not all_same(once[0], once[1]) and not all_same(mixture(seed=1).block(0), once[0])


def test_every_window_once_an_epoch_in_another_order():
    samples = mixture(block=64)
    pieces = samples.sources[0].pieces
    epochs = 3
    blocks = -(-epochs * len(pieces) // 48)
    # Of 64 samples 48 are of the first source; the order within a block is shuffled, so an epoch is a multiset.
    starts = Counter(s.where for b in range(blocks) for s in of(samples.block(b), "books"))
    assert len(starts) == len(pieces) and set(starts.values()) <= {epochs, epochs + 1}
    first = [{s.where for s in of(samples.block(b), "books")} for b in (0, len(pieces) // 48 + 1)]
    assert first[0] != first[1]


def test_where_names_the_window():
    samples = mixture()
    books = samples.sources[0].pieces.documents
    for sample in of(samples.block(2), "books"):
        document, offset = map(int, sample.where.split(":")[1].split("@"))
        tokens = window(sample)
        assert tokens == books[document][offset : offset + len(tokens)].tolist()


def test_sources_share_no_draws():
    twins = [source("a", 1, 1.0), source("b", 1, 1.0)]
    samples = Samples(twins, Stages(), seed=0, block=400)
    cuts = {name: sorted(len(s.source) for s in of(samples.block(0), name)) for name in "ab"}
    assert cuts["a"] != cuts["b"]


def test_an_epoch_draws_anew():
    samples = Samples([source("a", 1, 1.0)], Stages(), seed=0, block=200)
    by_window: dict[str, set[int]] = {}
    for sample in samples.block(0):
        by_window.setdefault(sample.where, set()).add(len(sample.source))
    assert all(len(cuts) > 5 for cuts in by_window.values())


def test_the_objective_follows_the_run():
    samples = mixture(total=640)
    assert [samples.fraction(b) for b in (0, 1, 5, 10, 99)] == [0.0, 0.1, 0.5, 1.0, 1.0]
    for b in (0, 4, 5, 20):
        assert {sample.continues for sample in samples.block(b)} == {b < 5}
    assert mixture().fraction(10**9) == 0.0


def test_shares_are_largest_remainders():
    assert shares([("a", 1), ("b", 1), ("c", 1)], 10) == [4, 3, 3]
    assert shares([("a", 0.5), ("b", 0), ("c", 1.5)], 1024) == [256, 0, 768]
    weights = [("a", 5.0), ("b", 0.05), ("c", 1.3)]
    assert sum(shares(weights, 1024)) == 1024


@pytest.mark.parametrize(
    "weights, message",
    [
        ([("a", 1), ("b", -1)], "Source b has weight -1"),
        ([("a", float("nan"))], "weight nan"),
        ([("a", 0)], "No source has a positive weight"),
        ([], "No source"),
    ],
)
def test_bad_weights(weights, message: str):
    with pytest.raises(UserError, match=message):
        shares(weights, 100)


def test_the_smallest_weight_is_named_and_is_enough():
    with pytest.raises(UserError, match=r"Source b has weight 1e-05.*at least 0\.0101 ") as caught:
        shares([("a", 1), ("b", 1e-5)], 100)
    assert "or 0" in str(caught.value)
    assert shares([("a", 1), ("b", 0.010102)], 100)[1] == 1


def test_wrong_numbers():
    with pytest.raises(UserError, match="block"):
        mixture(block=0)
    with pytest.raises(UserError, match="at least 1 sample"):
        mixture(total=0)


# Streams


class Opened:
    """A stream over documents, which counts how often and where it was opened."""

    def __init__(self, name: str, count: int, first: int = 0) -> None:
        self.documents, self.starts = documents(name, count, first), list[int]()
        self.read = 0

    def __call__(self, start: int) -> Iterator[np.ndarray]:
        self.starts.append(start)
        for number in range(start, len(self.documents)):
            self.read += 1
            yield self.documents[number]


def streamed(block: int = 64, count: int = 40) -> tuple[StreamedSamples, Opened]:
    opened = Opened("books", count)
    sources = [
        StreamedSource("books", opened, 3.0, 32, 2),
        StreamedSource("web", Opened("web", 100, 1_000_000), 1.0, 32, 2),
    ]
    return StreamedSamples(sources, Stages(), 0, block), opened


def test_streams_give_the_same_blocks_in_any_order():
    once = [streamed()[0].block(b) for b in range(8)]
    samples, _ = streamed()
    for b in (0, 1, 2, 7, 3, 3, 0, 6):
        assert all_same(samples.block(b), once[b]), b
    assert all_same(pickle.loads(pickle.dumps(samples)).block(5), once[5])


def test_streams_read_once_when_asked_in_order():
    samples, opened = streamed(count=400)
    for b in range(10):
        samples.block(b)
    assert opened.starts == [0]


def test_streams_cut_like_pieces():
    samples, opened = streamed()
    pieces = Pieces(opened.documents, 32, 2)
    blocks = [samples.block(b) for b in range(len(pieces) // 48 + 1)]
    windows = {s.where: window(s) for block in blocks for s in of(block, "books")}
    wanted = {}
    for index in range(len(pieces)):
        document, offset = pieces.locate(index)
        wanted[f"books:{document}@{offset}"] = pieces.piece(index).tolist()
    assert windows == wanted


def test_going_back_skips_what_is_known():
    samples, opened = streamed(block=4096, count=20_000)
    samples.block(5)
    opened.read = 0
    samples.block(4)
    assert opened.starts[0] == 0 and opened.starts[1] > 3000
    assert opened.read < 6000
    fresh, _ = streamed(block=4096, count=20_000)
    assert all_same(fresh.block(4), samples.block(4))


def test_a_stream_of_short_documents_ends_in_an_error():
    short = StreamedSource("short", lambda start: iter([np.zeros(1, np.int32)] * 3), 1.0, 32, 2)
    with pytest.raises(UserError, match="none of its 3 records has the 2 tokens"):
        StreamedSamples([short], Stages(), 0, 8).block(0)
