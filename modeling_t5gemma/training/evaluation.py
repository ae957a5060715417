"""Held-out loss, and how much of it the encoder is responsible for.

A falling loss does not show that the decoder reads its encoder: that of one that learns to speak alone falls as well.
The loss behind another window's prefix shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .heads import Head, cross_entropies
from .precision import Precision
from .prefix_lm import PrefixLM
from .windows import Windows

TOKENS_OF_LOGITS = 128


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def over_windows(cls, values: torch.Tensor) -> Estimate:
        """From one value a window, (N,)."""
        error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(values.mean().item(), error)


@dataclass(frozen=True)
class HeldOutLoss:
    """Losses in nats a target token.

    Attributes:
        right: behind the window's own prefix.
        wrong: behind another window's prefix.
        use: wrong minus right; for an encoder-decoder, how much it uses its encoder.
        without: of a decoder-only model, without a prefix.
    """

    right: Estimate
    wrong: Estimate
    use: Estimate
    without: Estimate | None = None

    @classmethod
    def of(cls, right: torch.Tensor, wrong: torch.Tensor, without: torch.Tensor | None = None) -> HeldOutLoss:
        """From the mean loss of each window, (N,), under each condition."""
        estimate = Estimate.over_windows
        alone = None if without is None else estimate(without)
        return cls(estimate(right), estimate(wrong), estimate(wrong - right), alone)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeldOutLoss:
        return cls(**{name: value and Estimate(**value) for name, value in values.items()})


def evaluate_student(
    student: PreTrainedModel, windows: Windows, layout: PrefixLM, precision: Precision, batch_size: int = 8
) -> HeldOutLoss:
    """The encoder-decoder's losses."""

    def hidden(batch: Windows) -> torch.Tensor:
        source, target = layout.student_inputs(batch)
        outputs = student.base_model(input_ids=source, decoder_input_ids=target, use_cache=False)
        return torch.as_tensor(outputs.last_hidden_state)

    conditions = windows, windows.with_wrong_prefixes()
    return HeldOutLoss.of(*(_losses(student, hidden, each, precision, batch_size) for each in conditions))


def evaluate_teacher(
    teacher: PreTrainedModel, windows: Windows, layout: PrefixLM, precision: Precision, batch_size: int = 8
) -> HeldOutLoss:
    """The decoder-only original's losses on the same target tokens."""

    def losses(condition: Windows, inputs: Callable[[Windows], torch.Tensor]) -> torch.Tensor:
        def hidden(batch: Windows) -> torch.Tensor:
            outputs = teacher.base_model(input_ids=inputs(batch), use_cache=False)
            return torch.as_tensor(outputs.last_hidden_state[:, -batch.targets.shape[1] :])

        return _losses(teacher, hidden, condition, precision, batch_size)

    return HeldOutLoss.of(
        losses(windows, layout.teacher_inputs),
        losses(windows.with_wrong_prefixes(), layout.teacher_inputs),
        losses(windows, layout.teacher_inputs_without_prefix),
    )


@torch.no_grad()
def _losses(
    model: PreTrainedModel,
    hidden: Callable[[Windows], torch.Tensor],
    windows: Windows,
    precision: Precision,
    batch_size: int,
) -> torch.Tensor:
    """Mean loss of each window, float32 (N,) on the CPU."""
    head = Head.of(model, precision.dtype)
    training = model.training
    model.eval()
    losses = []
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size].to(model.device)
        with precision.autocast(model.device):
            states = hidden(batch)
        tokens = cross_entropies(states.flatten(0, 1), head, batch.targets.flatten(), TOKENS_OF_LOGITS)
        losses.append(tokens.view_as(batch.targets).mean(dim=1).cpu())
    model.train(training)
    return torch.cat(losses)
