"""Low-rank adapters: put on a model, and merged into it again."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn
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
    except (ValueError, re.error) as error:
        raise UserError(f"The adapter cannot be made: {' '.join(str(error).split())}") from error


def merge_adapter(model: Any) -> PreTrainedModel:
    """The base with its adapter added to the weights; saved, it has the files and tensors of the base. Matrices that
    were one (embeddings and head) and that the adapter has made different are several afterwards, in its config too.

    Args:
        model: a ``peft.PeftModel``, which is used up.
    """
    base = model.get_base_model()
    tied = base.config.tie_word_embeddings
    _untie_adapted(base)
    with warnings.catch_warnings():
        # peft compares the head with the encoder's embedding, which it need not have been tied to.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged: PreTrainedModel = model.merge_and_unload()
    merged.config.tie_word_embeddings = tied
    _keep_ties_that_hold(merged)
    return merged


def base_record(model: Any) -> dict[str, str]:
    """What is kept beside an adapter, in ``inference.adapters.BASE_FILE``: what it is trained on.

    Args:
        model: the ``peft.PeftModel``, not sharded yet.
    """
    base = model.get_base_model()
    return {"path": base.config.name_or_path, "fingerprint": fingerprint(base)}


def _untie_adapted(base: PreTrainedModel) -> None:
    """Give each adapted matrix that is tied to others a copy of its own: merging adds to it in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    adapted = set()
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, name))
        if isinstance(module, BaseTunerLayer):
            adapted.update(module.get_base_layer().parameters())
    for parameter in adapted:
        for module, name in holders[parameter][1:]:
            setattr(module, name, _copy(parameter))


def _keep_ties_that_hold(merged: PreTrainedModel) -> None:
    """Tie again what still is equal, and have the config say what no longer is."""
    config, ties = merged.config, dict(merged.all_tied_weights_keys)

    def equal(one: str, other: str) -> bool:
        return torch.equal(merged.get_parameter(one), merged.get_parameter(other))

    if not all(equal(*tie) for tie in ties.items()):
        if getattr(config, "share_embeddings", False):
            # What is left to tie is the head to its own stack's embedding.
            config.share_embeddings = False
            for module in merged.modules():
                vars(module).pop("_tied_weights_keys", None)
        left = merged.get_expanded_tied_weights_keys(all_submodels=True)
        if not all(equal(*tie) for tie in left.items()):
            config.tie_word_embeddings = False
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
        for name in ties.keys() - merged.all_tied_weights_keys.keys():
            module, _, own = name.rpartition(".")
            setattr(merged.get_submodule(module), own, _copy(merged.get_parameter(name)))
    merged.tie_weights()


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
