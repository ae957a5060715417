"""How a trained model is judged: held-out loss, use of its encoder, a classification by its fine-tuned encoder.

Shapes: H held-out windows, E examples of the classification.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.training.evaluation import HeldOutPair, student_losses, with_wrong_sources
from modeling_t5gemma.training.teacher import Teacher

from .sizes import Sizes
from .text import BOS, PAD, Labelled, Text
from .training import fit, layout_of

EVALUATED_AT_ONCE = 32


def held_out_bits(model: PreTrainedModel, text: Text, windows: int | None = None) -> dict[str, list[float]]:
    """Bits of each held-out window's second half for each of its bytes on average over all windows, so that their mean
    is the loss in bits a byte: behind their own first half ("right") and behind another's ("wrong").

    Args:
        windows: measure on so many of them; None for all.
    """
    some = text.held_out[:windows]
    half = some.shape[1] // 2
    pairs = [HeldOutPair(window[:half], window[half:]) for window in some]
    scale = half / math.log(2) / float(text.bytes[:windows].mean())
    bits = {}
    for name, each in (("right", pairs), ("wrong", with_wrong_sources(pairs))):
        if model.config.is_encoder_decoder:
            losses = student_losses(model, each, layout_of(model), EVALUATED_AT_ONCE)
        else:
            # A copy, as a teacher is frozen.
            losses = Teacher(copy.deepcopy(model), Layout(PAD, BOS, teacher_begin=BOS)).losses(each, EVALUATED_AT_ONCE)
        bits[name] = [round(value, 5) for value in (losses * scale).tolist()]
    return bits


def classified(model: PreTrainedModel, text: Text, sizes: Sizes, seed: int, precision: torch.dtype) -> list[int]:
    """Which examples of the test the model's encoder gets right after it was tuned, 1 or 0 each.

    Every parameter is tuned. The label is read off the mean of the tokens' states: the paper reads it off the last
    token, which these models would have to be tuned for much longer to gather it in.
    """
    torch.manual_seed(seed)
    classifier = _Classifier(model, len(text.sections))
    begins = not model.config.is_encoder_decoder or layout_of(model).encoder_begin is not None
    order = np.random.default_rng(seed).permutation(len(text.to_tune.labels))

    def loss_of(step: int, steps: int) -> torch.Tensor:
        numbers = np.arange(step * sizes.batch, (step + 1) * sizes.batch) % len(order)
        inputs, labels = _batch(text.to_tune, order[numbers], begins)
        return torch.nn.functional.cross_entropy(classifier(**inputs).float(), labels)

    fit(classifier, loss_of, sizes.tune_steps, sizes.tuning_rate, precision)
    classifier.eval()
    right: list[int] = []
    with torch.no_grad():
        for begin in range(0, len(text.to_test.labels), EVALUATED_AT_ONCE):
            numbers = np.arange(begin, min(begin + EVALUATED_AT_ONCE, len(text.to_test.labels)))
            inputs, labels = _batch(text.to_test, numbers, begins)
            right += (classifier(**inputs).argmax(dim=1) == labels).int().tolist()
    return right


class _Classifier(torch.nn.Module):
    """A copy of a pair's encoder or of a decoder-only model, and a projection of its mean state over real tokens."""

    def __init__(self, model: PreTrainedModel, labels: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model.model.encoder if model.config.is_encoder_decoder else model.model)
        self.encoder.config.use_cache = False
        self.score = torch.nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None]
        scores: torch.Tensor = self.score((hidden * real).sum(dim=1) / real.sum(dim=1))
        return scores


def _batch(examples: Labelled, numbers: Any, begins: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.from_numpy(examples.ids[numbers].astype(np.int64))
    ids = ids[:, : int((ids != PAD).sum(dim=1).max())]
    if begins:
        ids = torch.cat([torch.full((len(ids), 1), BOS), ids], dim=1)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}, torch.from_numpy(examples.labels[numbers])
