"""Attention in packed rows: documents of like length become the rows of a batch of their own.

A row of short documents is a long row to a kernel, which visits it block by block and masks what the documents don't
see of each other. Side by side they are what the kernel is made for: a few large products, and little to mask.

Shapes: B rows, T queries, S keys, N query heads, G key/value heads, H head_dim; D documents of a group, U and C the
queries and keys of its longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import AttentionPattern

Kernel = Callable[[Tensor, Tensor, Tensor, AttentionPattern], Tensor]

# A document joins a group if its scores are at least so much of the largest one's there, or that has so few.
LIKE, FEW = 0.5, 32**2


@dataclass(frozen=True, eq=False)
class _Group:
    """Documents side by side.

    Attributes:
        queries, keys: int64 (D * U,) and (D * C,), their places in the flattened (B * T) and (B * S); any for padding.
        real: int64, which of the (D * U) queries are no padding.
        pattern: the rule of this batch.
    """

    queries: Tensor
    keys: Tensor
    real: Tensor
    pattern: AttentionPattern


def by_document(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, pattern: AttentionPattern, kernel: Kernel) -> Tensor:
    """What ``kernel`` gives for a packed pattern, (B, N, T, H); queries of padding give 0."""
    groups = pattern.derive("documents", lambda: list(_groups(pattern, q_BNTH.shape[0])))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BGSH, v_BGSH))
    out = torch.zeros_like(q)
    if not groups:
        return _rows(out, q_BNTH)
    found, places = [], []
    for group in groups:
        size = len(group.pattern.query_positions)
        parts = [
            x.index_select(0, index).unflatten(0, (size, -1)).transpose(1, 2)
            for x, index in ((q, group.queries), (k, group.keys), (v, group.keys))
        ]
        made = kernel(parts[0], parts[1], parts[2], group.pattern).transpose(1, 2).flatten(0, 1)
        found.append(made.index_select(0, group.real))
        places.append(group.queries.index_select(0, group.real))
    return _rows(out.index_copy(0, torch.cat(places), torch.cat(found)), q_BNTH)


def _rows(x: Tensor, like_BNTH: Tensor) -> Tensor:
    return x.unflatten(0, (like_BNTH.shape[0], -1)).transpose(1, 2)


def _groups(pattern: AttentionPattern, rows: int) -> Iterator[_Group]:
    """Every document that has queries and keys, largest first."""
    assert pattern.query_segments is not None and pattern.key_segments is not None
    queries = _documents(pattern.query_segments.expand(rows, -1))
    keys = _documents(pattern.key_segments.expand(rows, -1), pattern.key_valid)
    names = sorted(queries.keys() & keys.keys(), key=lambda name: -len(queries[name]) * len(keys[name]))
    group: list[tuple[int, int]] = []
    largest = 0
    for name in names:
        scores = len(queries[name]) * len(keys[name])
        if group and scores < LIKE * largest and largest > FEW:
            yield _group(pattern, [queries[n] for n in group], [keys[n] for n in group], rows)
            group = []
        if not group:
            largest = scores
        group.append(name)
    if group:
        yield _group(pattern, [queries[n] for n in group], [keys[n] for n in group], rows)


def _documents(segments_BT: Tensor, valid: Tensor | None = None) -> dict[tuple[int, int], Tensor]:
    """The places of each document's tokens in the flattened rows, by row and segment; padding is segment 0."""
    real = segments_BT > 0 if valid is None else (segments_BT > 0) & valid
    places = real.flatten().nonzero()[:, 0]
    if not len(places):
        return {}
    rows, segments = places // segments_BT.shape[1], segments_BT.flatten()[places]
    # A layerwise decoder's keys are two runs of each document, the source's and its own.
    order = (rows * (segments_BT.max() + 1) + segments).argsort(stable=True)
    places, rows, segments = places[order], rows[order], segments[order]
    names = torch.stack([rows, segments], dim=1)
    distinct, counts = torch.unique_consecutive(names, dim=0, return_counts=True)
    return dict(zip(map(tuple, distinct.tolist()), places.split(counts.tolist())))


def _group(pattern: AttentionPattern, queries: list[Tensor], keys: list[Tensor], rows: int) -> _Group:
    query_places, query_real = _padded(queries)
    key_places, key_real = _padded(keys)
    return _Group(
        query_places.flatten(),
        key_places.flatten(),
        query_real.flatten().nonzero()[:, 0],
        AttentionPattern(
            pattern.query_positions.expand(rows, -1).flatten()[query_places],
            pattern.key_positions.expand(rows, -1).flatten()[key_places],
            pattern.causal,
            pattern.window,
            None if bool(key_real.all()) else key_real,
        ),
    )


def _padded(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Places (D, longest), padded with each document's last, and which are no padding."""
    lengths = torch.tensor([len(piece) for piece in pieces])
    index = torch.arange(int(lengths.max()))
    real = index < lengths[:, None]
    last = torch.stack([piece[-1] for piece in pieces])
    places = last[:, None].expand(-1, len(index)).clone()
    places[real] = torch.cat(pieces)
    return places, real
