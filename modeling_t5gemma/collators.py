"""Examples to batches: padded, one example a row, or packed, several a row that don't see each other.

Shapes: R rows, S and T tokens of a row in encoder and decoder, U tokens of a row of the teacher, N targets in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .losses import IGNORED

Ids = npt.NDArray[np.int64]


class Pair(Protocol):
    """What an encoder reads and what its decoder has to say, as token ids without special tokens at the beginning."""

    @property
    def source(self) -> npt.NDArray[Any]: ...

    @property
    def target(self) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class Layout:
    """How an example becomes the inputs of an encoder-decoder and of a decoder-only teacher.

    Attributes:
        pad: the padding token.
        start: what decoder inputs begin with, ``decoder_start_token_id``.
        encoder_begin: a token before every source, or None. The released T5Gemma has none; a layerwise model has the
            beginning-of-sequence token, which its keys and values come from.
        teacher_begin: what a decoder-only teacher's input begins with, its beginning-of-sequence token.
    """

    pad: int
    start: int
    encoder_begin: int | None = None
    teacher_begin: int | None = None

    def source(self, pair: Pair) -> npt.NDArray[Any]:
        """The encoder's input."""
        return pair.source if self.encoder_begin is None else np.concatenate([[self.encoder_begin], pair.source])

    def decoder_input(self, pair: Pair) -> npt.NDArray[Any]:
        """The target shifted right by one behind the start token."""
        return np.concatenate([[self.start], pair.target[:-1]])

    def teacher_input(self, pair: Pair) -> npt.NDArray[Any]:
        """Source and target in one piece, as long as the position that predicts the last target token."""
        assert self.teacher_begin is not None, "a layout for a teacher has its first token"
        return np.concatenate([[self.teacher_begin], pair.source, pair.target[:-1]])

    def extra_source_tokens(self) -> int:
        return int(self.encoder_begin is not None)


def collate(rows: Sequence[Sequence[Pair]], layout: Layout, capacity: tuple[int, int] | None) -> dict[str, Any]:
    """A batch for ``T5GemmaForConditionalGeneration``.

    Args:
        rows: the examples of each row. Without capacity one a row, padded on the right to the longest.
        capacity: tokens of a packed row in encoder and decoder; segment ids then keep its examples apart.

    Returns:
        int64 tensors: input_ids (R, S), decoder_input_ids (R, T), labels (R, T) with -100 for padding, and
        attention_mask, decoder_attention_mask or, packed, segment_ids, decoder_segment_ids (from 1, 0 for padding).
    """
    assert capacity is not None or all(len(row) == 1 for row in rows)
    sources = _joined(rows, layout.source, capacity and capacity[0])
    inputs = _joined(rows, layout.decoder_input, capacity and capacity[1])
    labels = _joined(rows, lambda pair: pair.target, capacity and capacity[1])
    source_mask, mask = (sources.segments, inputs.segments) if capacity else (sources.real, inputs.real)
    names = ("segment_ids", "decoder_segment_ids") if capacity else ("attention_mask", "decoder_attention_mask")
    return {
        "input_ids": sources.filled(layout.pad),
        names[0]: torch.from_numpy(source_mask),
        "decoder_input_ids": inputs.filled(layout.pad),
        names[1]: torch.from_numpy(mask),
        "labels": labels.filled(IGNORED),
    }


def collate_for_teacher(rows: Sequence[Sequence[Pair]], layout: Layout, packed: bool) -> dict[str, Any]:
    """A batch for a decoder-only teacher of the same rows, and where it predicts the targets.

    Returns:
        input_ids (R, U), with attention_mask (R, U), or packed with position_ids (R, U) that count from 0 in each
        example, by which transformers' decoder-only models keep examples apart; and places (N,), the positions in the
        flattened (R * U) that predict the labels which are not ignored, in their order.
    """
    inputs = _joined(rows, layout.teacher_input, None)
    places = []
    for row, pairs in enumerate(rows):
        end = row * inputs.ids.shape[1]
        for pair in pairs:
            end += len(pair.source) + len(pair.target)
            places.append(np.arange(end - len(pair.target), end))
    batch = {"input_ids": inputs.filled(layout.pad), "places": torch.from_numpy(np.concatenate(places))}
    if packed:
        return {**batch, "position_ids": torch.from_numpy(inputs.positions)}
    return {**batch, "attention_mask": torch.from_numpy(inputs.real)}


@dataclass(frozen=True, eq=False)
class _Joined:
    """Pieces of a row end to end: their ids, the number of each token's piece (0 is padding) and its place in it."""

    ids: Ids
    segments: Ids
    positions: Ids

    @property
    def real(self) -> Ids:
        return (self.segments > 0).astype(np.int64)

    def filled(self, padding: int) -> torch.Tensor:
        return torch.from_numpy(np.where(self.segments > 0, self.ids, padding))


def _joined(rows: Sequence[Sequence[Pair]], part: Callable[[Pair], npt.NDArray[Any]], width: int | None) -> _Joined:
    pieces = [[part(pair) for pair in row] for row in rows]
    lengths = [sum(len(piece) for piece in row) for row in pieces]
    width = max(lengths) if width is None else width
    assert max(lengths) <= width, "rows were packed for this capacity"
    ids, segments, positions = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    for r, row in enumerate(pieces):
        sizes = [len(piece) for piece in row]
        end = lengths[r]
        ids[r, :end] = np.concatenate(row)
        segments[r, :end] = np.repeat(np.arange(1, len(row) + 1), sizes)
        positions[r, :end] = np.concatenate([np.arange(size) for size in sizes])
        # Padding is a piece of its own, so that a model which goes by positions keeps it apart as well.
        positions[r, end:] = np.arange(width - end)
    return _Joined(ids, segments, positions)
