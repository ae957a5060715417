"""Log-likelihoods of targets given sources, of encoder-decoders and of decoder-only models.

An encoder-decoder reads the source in its encoder, once for all targets of that source, and the target in its decoder
behind the start token. A decoder-only model reads both in one row. Targets of one source that differ in their last
token only, as the letters of a choice, are one row.

Shapes: R rows of a batch, T their longest target, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..inference.batching import padded
from .batches import BatchSize, Shape, in_batches

Ids: TypeAlias = tuple[int, ...]


class Pair(NamedTuple):
    """What is given, with everything that it begins with, and what is scored, as it is."""

    source: Ids
    target: Ids


class Score(NamedTuple):
    """The sum of the target's log-probabilities in nats, and whether each of its tokens is the likeliest."""

    log_likelihood: float
    greedy: bool


def log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    pad: int,
    size: BatchSize,
    progress: Callable[[int], object] = lambda pairs: None,
) -> list[Score]:
    """The score of each pair, in their order. An empty target is certain.

    Logarithms are taken in float32, or float64 for a model in float64.

    Args:
        model: in evaluation mode.
        pairs: with sources that are not empty.
        pad: fills the rows of a batch, and is masked.
        size: of a batch.
        progress: called with how many pairs of a batch are done.

    Raises:
        UserError: a single row does not fit into memory, or a probability is not finite.
    """
    scores = [Score(0.0, True)] * len(pairs)
    encoder_decoder = model.config.is_encoder_decoder
    logits_of = _encoder_decoder_logits if encoder_decoder else _decoder_only_logits

    def work(batch: list[_Unit]) -> None:
        found: dict[int, Score] = {}
        logits = logits_of(model, batch, pad)
        rows = [row for unit in batch for row in unit.rows]
        for row_logits, row in zip(logits, rows, strict=True):
            targets = [pairs[number].target for number in row.pairs]
            place = slice(len(row.read) + 1) if encoder_decoder else slice(-len(row.read) - 1, None)
            found.update(zip(row.pairs, _scores(row_logits[place], targets), strict=True))
        if not all(math.isfinite(score.log_likelihood) for score in found.values()):
            raise UserError(
                f"{model.config.name_or_path} gives probabilities that are not finite: its weights are damaged or it "
                "diverged. Give a checkpoint from before."
            )
        for number, score in found.items():
            scores[number] = score
        progress(len(found))

    units = _units(pairs, together=encoder_decoder)
    in_batches(sorted(units, key=lambda unit: unit.order, reverse=True), size, work)
    return scores


@dataclass(frozen=True)
class _Row:
    """What is read of a target, all but its last token, and the pairs that have it."""

    read: Ids
    pairs: tuple[int, ...]


@dataclass(frozen=True)
class _Unit:
    """A source and its rows."""

    source: Ids
    rows: tuple[_Row, ...]

    @property
    def shape(self) -> Shape:
        target = 1 + max(len(row.read) for row in self.rows)
        return Shape(len(self.rows), len(self.source), target, target)

    @property
    def order(self) -> tuple[int, int]:
        shape = self.shape
        return shape.rows, shape.source + shape.target

    def halves(self) -> list[_Unit]:
        half = len(self.rows) // 2
        return [_Unit(self.source, rows) for rows in (self.rows[:half], self.rows[half:])] if half else []


def _units(pairs: Sequence[Pair], *, together: bool) -> list[_Unit]:
    """The rows to read.

    Args:
        together: those of a source in one unit.
    """
    sources: dict[Ids, dict[Ids, list[int]]] = {}
    for number, (source, target) in enumerate(pairs):
        if target:
            sources.setdefault(source, {}).setdefault(target[:-1], []).append(number)
    units = []
    for source, reads in sources.items():
        rows = tuple(_Row(read, tuple(numbers)) for read, numbers in reads.items())
        units += [_Unit(source, rows)] if together else [_Unit(source, (row,)) for row in rows]
    return units


@torch.no_grad()
def _encoder_decoder_logits(model: Any, batch: Sequence[_Unit], pad: int) -> torch.Tensor:
    """(R, T, V); position t predicts the target's token t."""
    device, start = model.device, model.decoder_start_token_id()
    ids, mask = padded([unit.source for unit in batch], pad, left=False)
    decoder_ids, decoder_mask = padded([(start, *row.read) for unit in batch for row in unit.rows], pad, left=False)
    encoded = model.get_encoder()(input_ids=ids.to(device), attention_mask=mask.to(device))
    logits: torch.Tensor = model(
        encoder_outputs=encoded,
        decoder_input_ids=decoder_ids.to(device),
        decoder_attention_mask=decoder_mask.to(device),
        use_cache=False,
    ).logits
    return logits


@torch.no_grad()
def _decoder_only_logits(model: Any, batch: Sequence[_Unit], pad: int) -> torch.Tensor:
    """(R, T, V), rows padded on the left; the last position predicts a target's last token."""
    ids, mask = padded([unit.source + row.read for unit in batch for row in unit.rows], pad, left=True)
    logits: torch.Tensor = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
        logits_to_keep=max(unit.shape.scored for unit in batch),
        use_cache=False,
    ).logits
    return logits


def _scores(logits: torch.Tensor, targets: Sequence[Ids]) -> list[Score]:
    """The scores of targets of one length, read in one row.

    Args:
        logits: (T, V), for each of a target's tokens.
    """
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    ids = torch.tensor(targets, device=logits.device)
    normaliser, likeliest = wide.logsumexp(dim=-1), wide.argmax(dim=-1)
    chosen = wide.gather(1, ids.T).T
    sums, greedy = (chosen - normaliser).sum(dim=1).tolist(), (ids == likeliest).all(dim=1).tolist()
    return [Score(*each) for each in zip(sums, greedy, strict=True)]
