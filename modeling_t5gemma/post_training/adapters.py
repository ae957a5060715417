"""Low-rank adapters: put on a model, and merged into it again."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel

from ..errors import UserError
from ..inference.adapters import fingerprint
from ..lora import DECODER_ONLY_TARGETS, LORA_TARGETS, lora_config
from .settings import LoraSettings


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """A ``peft.PeftModel`` around a model, whose own weights are frozen.

    Raises:
        UserError: the targets name nothing, or the rank is none.
    """
    from peft import get_peft_model

    ours = model.config.is_encoder_decoder
    try:
        config = lora_config(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            task_type="SEQ_2_SEQ_LM" if ours else "CAUSAL_LM",
            target_modules=settings.targets or (LORA_TARGETS if ours else DECODER_ONLY_TARGETS),
        )
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"The adapter cannot be made: {' '.join(str(error).split())}") from error


def merge_adapter(model: Any) -> PreTrainedModel:
    """The base with its adapter added to the weights; saved, it has the files and tensors of the base.

    Args:
        model: a ``peft.PeftModel``, which is used up.
    """
    tied = model.get_base_model().config.tie_word_embeddings
    with warnings.catch_warnings():
        # peft compares the head with the encoder's embedding, which it never was tied to.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged: PreTrainedModel = model.merge_and_unload()
    merged.config.tie_word_embeddings = tied and _is_tied(merged)
    return merged


def base_record(model: Any) -> dict[str, str]:
    """What is kept beside an adapter, in ``inference.adapters.BASE_FILE``: what it is trained on.

    Args:
        model: the ``peft.PeftModel``, not sharded yet.
    """
    base = model.get_base_model()
    return {"path": base.config.name_or_path, "fingerprint": fingerprint(base)}


def _is_tied(model: PreTrainedModel) -> bool:
    keys = model.all_tied_weights_keys
    return all(model.get_parameter(one) is model.get_parameter(other) for one, other in keys.items())
