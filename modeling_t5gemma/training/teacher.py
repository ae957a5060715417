"""A decoder-only teacher: frozen, forward only, its logits never kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..collators import Layout, Pair, collate_for_teacher
from ..errors import UserError
from ..losses import Divergence, TeacherTarget, token_losses


@dataclass(frozen=True)
class Distillation:
    """How a teacher is followed; see ``TeacherTarget``.

    Raises:
        UserError: a number is out of range.
    """

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.share <= 1:
            raise UserError(
                f"distillation.temperature ({self.temperature}) is above 0, and distillation.share ({self.share}) "
                "between 0 and 1."
            )


class Teacher:
    """A decoder-only model that says what comes next where the student has to.

    Args:
        model: a causal language model of transformers, of any dtype, with the student's vocabulary.
        layout: how examples become its inputs.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, distillation: Distillation | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layout = layout
        self.distillation = distillation or Distillation()
        stack = model.config.get_text_config(decoder=True)
        self.softcap: float | None = getattr(stack, "final_logit_softcapping", None)

    @property
    def head(self) -> torch.Tensor:
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    def check_vocabulary(self, student: PreTrainedModel) -> None:
        """Refuse a student with other words.

        Raises:
            UserError: the vocabularies' sizes differ.
        """
        size = student.get_output_embeddings().weight.shape[0]
        if len(self.head) != size:
            raise UserError(
                f"The teacher ({self.model.config.name_or_path}) knows {len(self.head)} words and the student {size}: "
                "distillation needs one tokenizer. Take the decoder-only model that the student was converted from."
            )

    @torch.no_grad()
    def hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """Final hidden states (N, E) at the places of a batch of ``collate_for_teacher``."""
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        places = inputs.pop("places")
        with torch.autocast(self.model.device.type, enabled=False):  # it has a dtype of its own
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[places]

    def target(self, batch: dict[str, Any]) -> TeacherTarget:
        """What the student learns from, for a batch of ``collate_for_teacher``."""
        how = self.distillation
        return TeacherTarget(self.hidden(batch), self.head, self.softcap, how.divergence, how.temperature, how.share)

    @torch.no_grad()
    def losses(self, pairs: Sequence[Pair], batch_size: int) -> torch.Tensor:
        """The mean cross-entropy of each pair's target in nats, float32 (len(pairs),) on the CPU."""
        losses = []
        for begin in range(0, len(pairs), batch_size):
            some = pairs[begin : begin + batch_size]
            states = self.hidden(collate_for_teacher([[pair] for pair in some], self.layout, packed=False))
            labels = torch.cat([torch.from_numpy(pair.target.astype("int64")) for pair in some]).to(states.device)
            tokens = token_losses(states, self.head, labels, self.softcap).cpu()
            losses += [each.mean() for each in tokens.split([len(pair.target) for pair in some])]
        return torch.stack(losses)


def shard(teacher: Teacher, mesh: Any = None) -> None:
    """Spread the teacher's layers over all ranks (FSDP2), each gathered when it is its turn.

    Embeddings, final norm and head stay whole: the head is used as one matrix outside of the model.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(teacher.model):
        fully_shard(layer, mesh=mesh)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"{type(model).__name__} has no list of layers to shard: train with DDP, or without a teacher."
        )
    return layers
