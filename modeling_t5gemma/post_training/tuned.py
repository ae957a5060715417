"""What training on preferences and on rewards have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from ..inference.adapters import BASE_FILE
from ..training.parts import Part, freeze
from ..training.resumable import ResumableTrainer
from .adapters import base_record
from .reference import Reference, shard_reference


class TunedTrainer(ResumableTrainer):
    """A trainer of a model or of an adapter on it, which may be weighed against the model that the run began as. An
    adapter is saved with a record of its base.

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
        # Taken now: a sharded model's weights are not at hand later.
        self._base = base_record(model) if hasattr(model, "peft_config") else None
        super().__init__(model, args, **kwargs)
        if reference_model is not None:
            reference_model.to(args.device)
            if self.is_fsdp_enabled:
                shard_reference(reference_model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._base is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / BASE_FILE).write_text(json.dumps(self._base, indent=2) + "\n", encoding="utf-8")
            self.model.get_base_model().generation_config.save_pretrained(folder)
