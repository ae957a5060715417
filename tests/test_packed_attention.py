"""Packed rows, document by document, are what the dense rule says."""

from __future__ import annotations

import pytest
import torch

from modeling_t5gemma import packed_attention
from modeling_t5gemma.attention import attention
from modeling_t5gemma.blocked_attention import blocked_attention
from modeling_t5gemma.masks import AttentionPattern, join, positions_in_segments
from modeling_t5gemma.packed_attention import by_document

SCALE = 0.3
LENGTHS = [[5, 1, 17, 40, 3], [30, 31, 2], [66]]


def segments(width: int, lengths: list[list[int]], skip: int | None = None) -> torch.Tensor:
    """Rows of documents of these lengths, one left out, the rest padding."""
    made = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, each in enumerate(lengths):
        numbers = torch.arange(1, len(each) + 1).repeat_interleave(torch.tensor(each))
        made[row, : len(numbers)] = numbers
    return made if skip is None else torch.where(made == skip, 0, made)


def own(causal: bool, window: int | None) -> AttentionPattern:
    ids = segments(70, LENGTHS)
    positions = positions_in_segments(ids)
    return AttentionPattern(positions, positions, causal, window, ids > 0, ids, ids)


def crossed() -> AttentionPattern:
    """Targets behind sources of other lengths; a document without a source, and one without a target."""
    ids = segments(70, LENGTHS)
    source = segments(90, [[9, 30, 4, 20, 8], [3, 3, 60], [0, 12]], skip=3)
    return AttentionPattern(
        positions_in_segments(ids), positions_in_segments(source), False, None, source > 0, ids, source
    )


PATTERNS = {
    "bidirectional": lambda: own(False, None),
    "window": lambda: own(False, 7),
    "causal": lambda: own(True, None),
    "causal window": lambda: own(True, 7),
    "cross": crossed,
    "joined": lambda: join(crossed(), own(True, None)),
}


@pytest.mark.parametrize("few", [0, 32**2], ids=["many groups", "few groups"])
@pytest.mark.parametrize("name", PATTERNS)
def test_it_is_the_dense_rule(name, few, monkeypatch):
    monkeypatch.setattr(packed_attention, "FEW", few)
    pattern = PATTERNS[name]()
    rows, queries, keys = 3, pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    q = torch.randn(rows, 4, queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(rows, 2, keys, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def kernel(q, k, v, pattern):
        return blocked_attention(q, k, v, pattern, scale=SCALE, softcap=5.0)

    found = by_document(q, k, v, pattern, kernel)
    # A query of padding is whatever it is; only documents count.
    real = (pattern.query_segments > 0)[:, None, :, None]
    dense, _ = attention(q, k, v, pattern, backend="eager", scale=SCALE, softcap=5.0)
    torch.testing.assert_close(found, dense.masked_fill(~real, 0))
    weights = torch.randn_like(dense) * real
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, dense)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_documents_of_like_length_share_a_group():
    groups = list(packed_attention._groups(own(True, None), 3))
    sizes = [[int(n) for n in group.pattern.query_positions.amax(dim=1) + 1] for group in groups]
    assert sizes == [[66], [40, 31, 30], [17, 5, 3, 2, 1]]


def test_rows_of_padding_alone():
    ids = torch.zeros(2, 8, dtype=torch.int64)
    pattern = AttentionPattern(ids, ids, True, None, ids > 0, ids, ids)
    x = torch.randn(2, 2, 8, 4, requires_grad=True)
    out = by_document(x, x, x, pattern, lambda *_: pytest.fail("there is nothing to attend to"))
    assert not out.any()


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_the_door_takes_packed_rows_by_document(backend, monkeypatch):
    called = []
    monkeypatch.setattr(
        packed_attention, "_group", lambda *a, made=packed_attention._group: called.append(1) or made(*a)
    )
    pattern = own(True, None)
    x = torch.randn(3, 2, 70, 8)
    out, _ = attention(x, x, x, pattern, backend=backend, scale=SCALE)
    again, _ = attention(x, x, x, pattern, backend=backend, scale=SCALE)
    assert len(called) == 3, "groups are made once for all layers"
    assert torch.equal(out, again)
