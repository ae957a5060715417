"""What training on answers, on preferences and on rewards have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from ..inference.adapters import BASE_FILE
from ..training.parts import freeze
from ..training.resumable import ResumableTrainer
from ..training.settings import Part
from .adapters import base_record
from .reference import Reference, shard_reference


class AdapterTrainer(ResumableTrainer):
    """Trains a model or an adapter on it; an adapter is saved with a record of its base.

    Args:
        model: the model, or a PEFT model around it.
        args, kwargs: as ``ResumableTrainer``, or as the trainer that this one is put before.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # Taken now: a sharded model's weights are not at hand later.
        self._base = base_record(model) if hasattr(model, "peft_config") else None
        super().__init__(model, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._base is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / BASE_FILE).write_text(json.dumps(self._base, indent=2) + "\n", encoding="utf-8")
            self.model.get_base_model().generation_config.save_pretrained(folder)


class TunedTrainer(AdapterTrainer):
    """A trainer whose model may be weighed against the one that the run began as.

    Args:
        reference_model: what the run began as, to be kept beside it; None for the model without its adapter.
        weighed: whether there is a reference at all.
        frozen: parts that stay as they are.
        others: as ``ResumableTrainer``.

    Raises:
        UserError: there is to be a reference, and neither a second model nor an adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Seq2SeqTrainingArguments,
        *,
        reference_model: PreTrainedModel | None,
        weighed: bool,
        frozen: Sequence[Part] = (),
        **kwargs: Any,
    ) -> None:
        self.reference = Reference(model, reference_model) if weighed else None
        freeze(model, frozen)
        super().__init__(model, args, **kwargs)
        if reference_model is not None:
            reference_model.to(args.device)
            if self.is_fsdp_enabled:
                shard_reference(reference_model)
