"""The parts of an encoder-decoder that are trained differently, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cross_attention import KEY_VALUES, is_cross_attention, kind_of, layers_read
from ..errors import UserError
from .settings import Part

PARTS: tuple[Part, ...] = get_args(Part)


def part_of(name: str) -> Part:
    """The part a parameter belongs to."""
    if "embed_tokens" in name or "lm_head" in name:
        return "embeddings"
    if is_cross_attention(name):
        return "cross_attention"
    return "encoder" if ".encoder." in name or name.startswith("encoder.") else "decoder"


def parameters_of(model: nn.Module, parts: Iterable[Part]) -> list[nn.Parameter]:
    """Those that are trained, of these parts."""
    wanted = set(parts)
    return [p for name, p in model.named_parameters() if p.requires_grad and part_of(name) in wanted]


def freeze(model: PreTrainedModel, parts: Iterable[Part]) -> None:
    """Leave these parts as they are, and what nothing trains anyway.

    A layerwise decoder reads its encoder layers' keys and values: nothing after the last of them that is read has a
    gradient, and distributed training would wait for one.

    Raises:
        UserError: everything would be frozen.
    """
    wanted = set(parts)
    unread = set(_unread(model))
    for name, parameter in model.named_parameters():
        if part_of(name) in wanted or name in unread:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"With {', '.join(sorted(wanted))} frozen, nothing is left to train.")


def _unread(model: PreTrainedModel) -> list[str]:
    decoder = getattr(model.config, "decoder", None)  # which a decoder-only model has not
    if decoder is None or kind_of(decoder).reads != KEY_VALUES:
        return []
    last = layers_read(decoder)[-1]
    prefix = next(name for name, module in model.named_modules() if name.split(".")[-1] == "encoder")
    parts = ["embed_tokens", *(f"layers.{i}" for i in range(last)), *(f"layers.{last}.{name}" for name in _READ)]
    read = tuple(f"{prefix}.{part}." for part in parts)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")]
    return [name for name in names if not name.startswith(read)]


# What a layer's keys and values come from.
_READ = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm", "pre_self_attn_layernorm")


def groups(
    model: nn.Module, decayed: Iterable[str], weight_decay: float, learning_rate: float, factors: Mapping[str, float]
) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: a part and whether its weights decay.

    Args:
        decayed: the names of the parameters that decay.
        factors: what a part's learning rate is multiplied with; 1 for those not named.
    """
    decays = set(decayed)
    members: dict[tuple[Part, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((part_of(name), name in decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "part": part,
            "lr": learning_rate * factors.get(part, 1.0),
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
