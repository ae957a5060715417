"""The training loop, and what a step of each kind of run learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Gemma2ForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_t5gemma.collators import Layout, Pair, collate, collate_for_teacher
from modeling_t5gemma.losses import linear_loss
from modeling_t5gemma.objectives import Schedule, example_rng
from modeling_t5gemma.training.parts import groups
from modeling_t5gemma.training.settings import Part
from modeling_t5gemma.training.teacher import Teacher

from .text import BOS, PAD, Ids

# The loss of step number so-and-so, of so many.
StepLoss = Callable[[int, int], torch.Tensor]

WARMUP, FLOOR, WEIGHT_DECAY, CLIP = 0.06, 0.1, 0.01, 1.0
JOINING = 0.04  # of the steps, over which what was frozen takes up its learning rate


def fit(
    model: torch.nn.Module,
    loss_of: StepLoss,
    steps: int,
    learning_rate: float,
    precision: torch.dtype,
    *,
    factors: Mapping[str, float] | None = None,
    wait: float = 0.0,
    waiting: Sequence[Part] = (),
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a linear warm-up and a linear decay to a tenth, gradients clipped at norm 1.

    Args:
        factors: what a part's learning rate is multiplied with.
        wait: the share of the steps in which the parts ``waiting`` are not trained.
        after: called after each step with the number of steps done.
    """
    decayed = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    optimizer: Any = torch.optim.AdamW(
        groups(model, decayed, WEIGHT_DECAY, learning_rate, factors or {}), betas=(0.9, 0.95), fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        shape = min(1.0, (step + 1) / max(1, WARMUP * steps)) * (1 - (1 - FLOOR) * step / steps)
        late = min(1.0, max(0.0, step + 1 - wait * steps) / max(1, JOINING * steps)) if wait else 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = loss_of(step, steps)
        loss.backward()
        for group, peak in zip(optimizer.param_groups, peaks):
            waits = group["part"] in waiting
            group["lr"] = peak * shape * (late if waits else 1.0)
            if waits and not late:
                for parameter in group["params"]:
                    parameter.grad = None  # no part in the clipping, no state in the optimizer
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


class Windows:
    """The windows of each step of a seed: every one once in an epoch, shuffled. Runs of one seed see the same."""

    def __init__(self, windows: Ids, batch: int, seed: int, first: int = 0) -> None:
        self.windows, self.batch, self.seed, self.first = windows, batch, seed, first

    def __call__(self, step: int) -> Ids:
        count = len(self.windows)
        numbers = range((self.first + step) * self.batch, (self.first + step + 1) * self.batch)
        return np.stack([self.windows[_order(count, self.seed, n // count)[n % count]] for n in numbers])


@cache
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def language_modelling(model: Gemma2ForCausalLM, windows: Windows) -> StepLoss:
    """A decoder-only model's loss on every token of its windows."""

    def loss_of(step: int, steps: int) -> torch.Tensor:
        labels = torch.from_numpy(windows(step).astype(np.int64))
        inputs = torch.cat([torch.full((len(labels), 1), BOS), labels[:, :-1]], dim=1)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        return linear_loss(hidden, model.lm_head.weight, labels, softcap=model.config.final_logit_softcapping).total

    return loss_of


def layout_of(model: PreTrainedModel) -> Layout:
    """A layerwise model's source begins with <bos>, as its decoder-only original's did."""
    layerwise = model.config.decoder.cross_attention_type == "layerwise"
    return Layout(PAD, start=BOS, encoder_begin=BOS if layerwise else None, teacher_begin=BOS)


class Adapting:
    """An encoder-decoder's loss under a schedule of objectives.

    Args:
        teacher: learn from it instead of the labels.
        contrast: weight of a hinge: each target's loss behind another's source has to be larger by ``MARGIN`` nats.
        hidden_words: the share of the decoder's inputs that are replaced by padding, so that what they said has to
            come from the encoder (Bowman et al., arXiv 1511.06349, section 3.2).
    """

    MARGIN = 0.5

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        schedule: Schedule,
        *,
        teacher: Teacher | None = None,
        contrast: float = 0.0,
        hidden_words: float = 0.0,
    ) -> None:
        self.model, self.windows, self.schedule, self.teacher = model, windows, schedule, teacher
        self.contrast, self.hidden_words = contrast, hidden_words
        self.layout = layout_of(model)

    def __call__(self, step: int, steps: int) -> torch.Tensor:
        objective = self.schedule.at(step / steps)
        rows: list[Sequence[Pair]] = [
            [objective(window, example_rng(self.windows.seed, step, number))]
            for number, window in enumerate(self.windows(step))
        ]
        batch = collate(rows, self.layout, None)
        if self.hidden_words:
            hidden = torch.rand(batch["decoder_input_ids"].shape) < self.hidden_words
            hidden[:, 0] = False
            batch["decoder_input_ids"] = batch["decoder_input_ids"].masked_fill(hidden, PAD)
        target = None
        if self.teacher is not None:
            target = self.teacher.target(collate_for_teacher(rows, self.layout, packed=False))
        outputs = self.model(**batch, target=target, use_cache=False)
        return outputs.loss if not self.contrast else outputs.loss + self.contrast * self._hinge(batch, outputs)

    def _hinge(self, batch: dict[str, Any], outputs: Any) -> torch.Tensor:
        """How far each target's mean loss behind its neighbour's source falls short of the batch's plus the margin."""
        encoded = BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state.roll(1, dims=0))
        given = {**batch, "attention_mask": batch["attention_mask"].roll(1, dims=0)}
        given.pop("input_ids")
        wrong = self.model(**given, encoder_outputs=encoded, use_cache=False, return_token_losses=True).token_losses
        return (outputs.loss + self.MARGIN - wrong.mean(dim=1)).clamp(min=0).mean()
