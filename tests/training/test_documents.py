"""Pieces: every token of every document that is long enough, once and in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.documents import MemoryDocuments, Pieces


def documents(lengths: list[int]) -> MemoryDocuments:
    """Every token of all documents is a different number."""
    starts = np.cumsum([0, *lengths])
    return MemoryDocuments("docs", [np.arange(a, b) for a, b in itertools.pairwise(starts)])


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 100), max_size=20),
    shortest=st.integers(1, 8),
    slack=st.integers(0, 20),
)
def test_pieces_are_the_documents(lengths: list[int], shortest: int, slack: int):
    window = 2 * shortest - 1 + slack
    docs = documents([*lengths, shortest])
    pieces = Pieces(docs, window, shortest)
    parts: dict[int, list[np.ndarray]] = {}
    for index in range(len(pieces)):
        tokens = pieces.piece(index)
        document, offset = pieces.locate(index)
        assert shortest <= len(tokens) <= window and tokens.dtype == np.int32
        assert offset == sum(map(len, parts.setdefault(document, [])))
        parts[document].append(tokens)
    for document, length in enumerate(docs.lengths):
        if length < shortest:
            assert document not in parts
            continue
        assert np.array_equal(np.concatenate(parts[document]), docs[document])
        assert len(parts[document]) == -(-length // window), "no more pieces than necessary"
    assert pieces.skipped == sum(length < shortest for length in docs.lengths)
    assert pieces.mean_tokens == pytest.approx(np.mean([len(p) for ps in parts.values() for p in ps]))


def test_a_short_remainder_shares_with_the_piece_before():
    pieces = Pieces(documents([21, 23]), window=10, shortest=3)
    assert [len(pieces.piece(i)) for i in range(len(pieces))] == [10, 6, 5, 10, 10, 3]
    assert [pieces.locate(i) for i in range(len(pieces))] == [(0, 0), (0, 10), (0, 16), (1, 0), (1, 10), (1, 20)]


def test_memory_is_eight_bytes_a_document():
    held = [value for value in vars(Pieces(documents([5] * 1000), 4, 2)).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 8 * 1000


def test_nothing_long_enough():
    with pytest.raises(UserError, match="none of its 3 documents has the 4 tokens"):
        Pieces(documents([3, 1, 0]), window=16, shortest=4)


def test_window_too_small_to_share():
    with pytest.raises(UserError, match="at least 7"):
        Pieces(documents([30]), window=6, shortest=4)


@pytest.mark.parametrize("index", [-1, 3])
def test_no_such_piece(index: int):
    with pytest.raises(IndexError, match="3 pieces"):
        Pieces(documents([30]), window=10, shortest=1).piece(index)


def test_a_piece_is_a_copy():
    docs = documents([10])
    Pieces(docs, 5, 1).piece(0)[:] = 99
    assert docs[0][0] == 0
