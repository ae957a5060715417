"""Which key each query may see: the only home of the causal, bidirectional, window and segment rules.

A pattern is a handful of small tensors and two Python values, never a dense mask: one that needs a dense mask asks for
it and shares it among all layers that use the same pattern.

Shapes: B batch, T queries, S keys. A leading dimension of 1 stands for "the same for every row".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

Derived = TypeVar("Derived")


def reach(window: int) -> int:
    """How many positions before its own a query of a sliding layer sees: the rule that masks, kernels, caches and
    accounting share. It is the released T5Gemma's; stock transformers' eager path sees one position more in its
    encoder."""
    return window - 1


@dataclass(eq=False)
class AttentionPattern:
    """The visibility rule of one kind of attention in one forward pass.

    Key ``s`` is visible to query ``t`` of the same row when all of these hold:

    * ``key_valid[s]``, if given: the key is no padding;
    * ``query_segments[t] == key_segments[s]``, if given: both belong to the same packed document;
    * ``key_positions[s] <= query_positions[t]``, if ``causal``;
    * ``abs(query_positions[t] - key_positions[s]) <= reach(window)``, if ``window`` is given.

    Attributes:
        query_positions: int64 (B or 1, T).
        key_positions: int64 (B or 1, S).
        causal: whether a query sees no later key.
        window: a distance in positions, or None for no limit.
        key_valid: bool (B or 1, S), or None when no key is padding.
        query_segments: int64 (B, T), or None when nothing is packed. 0 marks padding, documents count from 1.
        key_segments: int64 (B, S), given together with ``query_segments``.
        query_valid: bool (B or 1, T), or None when no query is padding. It hides nothing: a kernel that aligns queries
            and keys by their order needs to know which queries have no key of their own.
    """

    query_positions: torch.Tensor
    key_positions: torch.Tensor
    causal: bool = False
    window: int | None = None
    key_valid: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    query_valid: torch.Tensor | None = None
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def visible(self) -> torch.Tensor | None:
        """The dense mask, bool (B or 1, 1, T, S), True where a key is seen; None when every query sees every key."""
        return None if self.sees_everything else self.derive("visible", self._build_visible)

    def hidden(self) -> torch.Tensor | None:
        """The opposite of ``visible``, True where a key is not seen."""
        return None if self.sees_everything else self.derive("hidden", lambda: ~self._build_visible())

    def of_last_keys(self, length: int) -> AttentionPattern:
        """The same for the last so many of the keys."""
        keys = self.key_positions.shape[1]
        if length == keys:
            return self
        names = "key_positions", "key_valid", "key_segments"
        given = {name: each for name in names if (each := getattr(self, name)) is not None}
        return replace(self, **{name: each[:, keys - length :] for name, each in given.items()})

    def derive(self, name: str, build: Callable[[], Derived]) -> Derived:
        """What a backend makes of this pattern, built by the first layer that needs it."""
        if name not in self._derived:
            self._derived[name] = build()
        made: Derived = self._derived[name]
        return made

    @property
    def sees_everything(self) -> bool:
        """Whether the rule hides nothing, as far as that is known without looking at a tensor's values."""
        return not self.causal and self.window is None and self.key_valid is None and self.query_segments is None

    def _build_visible(self) -> torch.Tensor:
        distance_BTS = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        visible_BTS = torch.ones_like(distance_BTS, dtype=torch.bool)
        if self.causal:
            visible_BTS = visible_BTS & (distance_BTS >= 0)
        if self.window is not None:
            visible_BTS = visible_BTS & (distance_BTS.abs() <= reach(self.window))
        if self.key_valid is not None:
            visible_BTS = visible_BTS & self.key_valid[:, None, :]
        if self.query_segments is not None:
            assert self.key_segments is not None, "segments come in pairs, one for queries and one for keys"
            visible_BTS = visible_BTS & (self.query_segments[:, :, None] == self.key_segments[:, None, :])
        return visible_BTS[:, None]


def join(source: AttentionPattern, own: AttentionPattern) -> AttentionPattern:
    """The pattern of queries that see two lists of keys in one softmax: the source's first, then their own.

    Both patterns have the same queries; causality and window are those of ``own`` and count over the joined positions.
    """
    rows = max(p.shape[0] for p in (source.key_positions, own.key_positions, own.query_positions))
    valid = None
    if source.key_valid is not None or own.key_valid is not None:
        valid = torch.cat([_valid_or_all(source, rows), _valid_or_all(own, rows)], dim=1)
    segments = None
    if source.key_segments is not None:
        assert own.key_segments is not None, "both or neither side is packed"
        segments = torch.cat([source.key_segments, own.key_segments], dim=1)
    positions = torch.cat([source.key_positions.expand(rows, -1), own.key_positions.expand(rows, -1)], dim=1)
    return AttentionPattern(
        own.query_positions, positions, own.causal, own.window, valid, own.query_segments, segments, own.query_valid
    )


def _valid_or_all(pattern: AttentionPattern, rows: int) -> torch.Tensor:
    if pattern.key_valid is not None:
        return pattern.key_valid.expand(rows, -1)
    keys = pattern.key_positions
    return torch.ones((rows, keys.shape[1]), dtype=torch.bool, device=keys.device)


def first_read(positions: torch.Tensor, valid: torch.Tensor | None, window: int) -> int:
    """The first of S source slots that a sliding layer of a decoder reads which goes on after the source: its first
    token decides, of the row that reads from furthest back. 0 in a traced graph, which has no values to look at.

    Args:
        positions: int64 (B or 1, S), the source's positions.
        valid: bool (B, S), or None when nothing is padding.
        window: the layer's.
    """
    if is_compiling():
        return 0
    read = positions >= ends_of_source(positions, valid, None, None) - reach(window)
    if valid is not None:
        read = read & valid
    return int(read.any(dim=0).long().argmax())


def positions_in_segments(segment_ids: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 in each run of equal segment ids; int64 (B, T) to int64 (B, T)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def ends_of_source(
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    target_segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The position after the last real source token, for a decoder that goes on from there.

    Args:
        positions: int64 (B or 1, S), the source's positions.
        valid: bool (B, S), or None when nothing is padding.
        segment_ids, target_segment_ids: int64 (B, S) and (B, T) when documents are packed; each target token then goes
            on after its own document. Ids are below S + T.

    Returns:
        int64 (B or 1, 1), or (B, T) when packed; 0 for a source without a real token.
    """
    if segment_ids is None or target_segment_ids is None:
        real = positions if valid is None else torch.where(valid, positions, -1)
        return real.amax(dim=1, keepdim=True) + 1
    slots = segment_ids.shape[1] + target_segment_ids.shape[1]
    ends = segment_ids.new_zeros((segment_ids.shape[0], slots))
    ends = ends.scatter_reduce(1, segment_ids, positions.expand_as(segment_ids) + 1, "amax")
    return ends.gather(1, target_segment_ids)
