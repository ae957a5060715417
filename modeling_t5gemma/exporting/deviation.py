"""How far an export is from the model: log-probabilities of given texts, and greedy tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..inference.loading import Checkpoint
from ..inference.sampling import generation_config
from .formats import Runtime
from .samples import NEW_TOKENS, Sample


@dataclass(frozen=True)
class Behaviour:
    """What a runtime did with each sample: ``log_probs`` of its target, ``greedy`` tokens after its source."""

    log_probs: list[list[float]]
    greedy: list[list[int]]

    @classmethod
    def of(cls, runtime: Runtime, samples: Sequence[Sample]) -> Behaviour:
        return cls(
            [runtime.log_probs(sample.source, sample.target) for sample in samples],
            [runtime.greedy(sample.source, NEW_TOKENS) for sample in samples],
        )

    def is_finite(self) -> bool:
        return all(math.isfinite(value) for row in self.log_probs for value in row)


@dataclass(frozen=True)
class Deviation:
    """An export beside the model.

    Attributes:
        texts: how many were measured.
        longest_source: tokens of the longest encoder input; nothing longer was tried.
        target_tokens: how many log-probabilities were compared.
        model_loss, export_loss: mean negative log-probability of a target token, in nats.
        mean_difference, largest_difference: of a log-probability, without its sign, in nats.
        greedy_equal: texts that both continue with the same tokens.
        greedy_tokens: tokens of the model's continuations.
        greedy_tokens_equal: those of them before the export's first other token.
    """

    texts: int
    longest_source: int
    target_tokens: int
    model_loss: float
    export_loss: float
    mean_difference: float
    largest_difference: float
    greedy_equal: int
    greedy_tokens: int
    greedy_tokens_equal: int

    @classmethod
    def between(cls, model: Behaviour, export: Behaviour, samples: Sequence[Sample]) -> Deviation:
        own = [value for row in model.log_probs for value in row]
        other = [value for row in export.log_probs for value in row]
        differences = [abs(a - b) for a, b in zip(own, other, strict=True)]
        equal = [_leading(a, b) for a, b in zip(model.greedy, export.greedy, strict=True)]
        return cls(
            texts=len(samples),
            longest_source=max(len(sample.source) for sample in samples),
            target_tokens=len(own),
            model_loss=-statistics.fmean(own),
            export_loss=-statistics.fmean(other),
            mean_difference=statistics.fmean(differences),
            largest_difference=max(differences),
            greedy_equal=sum(a == b for a, b in zip(model.greedy, export.greedy, strict=True)),
            greedy_tokens=sum(map(len, model.greedy)),
            greedy_tokens_equal=sum(equal),
        )

    def rows(self) -> list[tuple[str, str]]:
        """To read: what was measured, and what came out."""
        return [
            ("texts, longest source", f"{self.texts}, {self.longest_source} tokens"),
            ("target tokens", f"{self.target_tokens}"),
            ("loss of the model, nats a token", f"{self.model_loss:.4f}"),
            ("loss of the export", f"{self.export_loss:.4f}"),
            ("log-probability, mean difference", f"{self.mean_difference:.1e}"),
            ("log-probability, largest difference", f"{self.largest_difference:.1e}"),
            ("texts continued with the same tokens", f"{self.greedy_equal} of {self.texts}"),
            ("greedy tokens before the first other one", f"{self.greedy_tokens_equal} of {self.greedy_tokens}"),
        ]


class Model:
    """A checkpoint's model itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model: Any = checkpoint.model
        self._tokenizer = checkpoint.tokenizer

    @torch.no_grad()
    def log_probs(self, source: Sequence[int], target: Sequence[int]) -> list[float]:
        ids, labels = torch.tensor([source]), torch.tensor([target])
        losses = self._model(input_ids=ids, labels=labels, return_token_losses=True).token_losses
        return [-loss for loss in losses[0].tolist()]

    def greedy(self, source: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([source])
        config = generation_config(self._model, self._tokenizer, max_new_tokens=count)
        made = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens: list[int] = made[0, 1:].tolist()
        return tokens


def _leading(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
