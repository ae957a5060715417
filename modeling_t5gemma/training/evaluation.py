"""Held-out loss, and how much of it the encoder is responsible for.

A falling loss does not show that the decoder reads its encoder: that of one that learns to speak alone falls as well.
The loss behind another example's source shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..collators import Layout, Pair, collate
from ..errors import UserError
from .teacher import Teacher


@dataclass(frozen=True, eq=False)
class HeldOutPair:
    """A pair made for measuring."""

    source: npt.NDArray[Any]
    target: npt.NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Estimate:
        """From one value an example, (N,)."""
        error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(values.mean().item(), error)


@dataclass(frozen=True)
class HeldOutLoss:
    """Losses in nats a target token.

    Attributes:
        right: behind the example's own source.
        wrong: behind another example's source.
        use: wrong minus right; for an encoder-decoder, how much it uses its encoder.
        without: of a decoder-only model, without a source.
    """

    right: Estimate
    wrong: Estimate
    use: Estimate
    without: Estimate | None = None

    @classmethod
    def of(cls, right: torch.Tensor, wrong: torch.Tensor, without: torch.Tensor | None = None) -> HeldOutLoss:
        """From the mean loss of each example, (N,), under each condition."""
        alone = None if without is None else Estimate.of(without)
        return cls(Estimate.of(right), Estimate.of(wrong), Estimate.of(wrong - right), alone)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeldOutLoss:
        return cls(**{name: value and Estimate(**value) for name, value in values.items()})


def with_wrong_sources(pairs: Sequence[Pair]) -> list[HeldOutPair]:
    """Each target behind the source of the pair before it (the first behind the last's).

    Raises:
        UserError: there is only one pair.
    """
    if len(pairs) < 2:
        raise UserError("One held-out example alone has no other example's source: hold out at least two.")
    return [HeldOutPair(pairs[i - 1].source, pair.target) for i, pair in enumerate(pairs)]


def evaluate_student(
    model: torch.nn.Module, pairs: Sequence[Pair], layout: Layout, batch_size: int = 8
) -> HeldOutLoss:
    """The encoder-decoder's losses. ``model`` may be wrapped (DDP, FSDP): only its forward is called."""
    return HeldOutLoss.of(
        *(student_losses(model, each, layout, batch_size) for each in (pairs, with_wrong_sources(pairs)))
    )


def evaluate_teacher(teacher: Teacher, pairs: Sequence[Pair], batch_size: int = 8) -> HeldOutLoss:
    """The decoder-only original's losses on the same targets."""
    without = [HeldOutPair(np.empty(0, dtype=np.int64), pair.target) for pair in pairs]
    return HeldOutLoss.of(*(teacher.losses(each, batch_size) for each in (pairs, with_wrong_sources(pairs), without)))


@torch.no_grad()
def student_losses(model: torch.nn.Module, pairs: Sequence[Pair], layout: Layout, batch_size: int) -> torch.Tensor:
    """The mean loss of each pair's target, float32 (len(pairs),) on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    losses = []
    for begin in range(0, len(pairs), batch_size):
        some = pairs[begin : begin + batch_size]
        batch = {name: value.to(device) for name, value in collate([[p] for p in some], layout, None).items()}
        tokens = model(**batch, use_cache=False, return_token_losses=True).token_losses.cpu()
        losses.append(tokens.sum(dim=1) / torch.tensor([len(pair.target) for pair in some]))
    model.train(training)
    return torch.cat(losses)
