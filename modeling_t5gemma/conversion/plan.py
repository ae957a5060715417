"""The plan of a conversion: where each tensor of the result comes from, decided and checked before a byte is written.

The plan is total. Every tensor of the target is written exactly once, every tensor of a source is used or listed as
left out with the reason, and every shape fits; anything else raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modeling_t5gemma.conversion.family import EMBEDDING, OUTPUT_HEAD
from modeling_t5gemma.conversion.target import (
    DECODER,
    ENCODER,
    Stack,
    Target,
    expected_tensors,
    stack_configs,
)
from modeling_t5gemma.cross_attention import is_cross_attention
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.tensors import nbytes


@dataclass(frozen=True)
class Copied:
    """From a source's tensor, each head of ``head_dim`` rows ``repeats`` times if that is not 1."""

    side: str
    name: str
    repeats: int = 1
    head_dim: int = 0


@dataclass(frozen=True)
class Drawn:
    """Normal values of this standard deviation."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere: the gain of a fresh norm, a fresh bias."""

    value: float


@dataclass(frozen=True)
class Write:
    """A tensor of the result and its origin."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Copied | Drawn | Constant

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)


@dataclass(frozen=True)
class LeftOut:
    """A tensor of a source that is not used on this side."""

    side: str
    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that is written and all that is left out.

    Attributes:
        dtype: the dtype of most bytes, which the config names.
    """

    writes: tuple[Write, ...]
    left_out: tuple[LeftOut, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(write.nbytes for write in self.writes)


def build_plan(target: Target, dtype: torch.dtype | None) -> Plan:
    """Plan a conversion.

    Args:
        dtype: of every tensor; None keeps each one's own.

    Raises:
        UserError: a source lacks a tensor, or one has another shape than its config says.
    """
    shapes = expected_tensors(target.config)
    origins = {name: _origin(name, target) for name in shapes}
    copied_dtypes = {
        name: target.stack(origin.side).source.tensors[origin.name].dtype
        for name, origin in origins.items()
        if isinstance(origin, Copied)
    }
    common = dtype or _most_bytes({name: (shapes[name], kept) for name, kept in copied_dtypes.items()})
    writes = tuple(
        Write(name, shape, dtype or copied_dtypes.get(name, common), origins[name]) for name, shape in shapes.items()
    )
    _check_shapes(writes, target)
    return Plan(writes, tuple(_left_out(target, origins)), common)


def _origin(name: str, target: Target) -> Copied | Drawn | Constant:
    """Where the tensor ``name`` of the result comes from."""
    if name == OUTPUT_HEAD:
        return _copied(DECODER, name, target.decoder)
    _, side, stack_name = name.split(".", 2)
    if stack_name == EMBEDDING and target.config.share_embeddings:
        return _copied(DECODER, stack_name, target.decoder)
    if not is_cross_attention(stack_name):
        return _copied(side, stack_name, target.stack(side))
    # The model's names: ...cross_attn.k_proj.weight, ...pre_cross_attn_layernorm.weight.
    is_key_or_value = any(f"cross_attn.{projection}_proj." in stack_name for projection in "kv")
    if target.cross_attention == "copy" or (target.cross_attention == "partial" and not is_key_or_value):
        return _copied(side, stack_name.replace("cross_attn", "self_attn"), target.decoder)
    _, config = stack_configs(target.config)
    if stack_name.endswith("norm.weight"):
        return Constant(0.0 if config.norm_unit_offset else 1.0)
    if stack_name.endswith(".bias"):
        return Constant(0.0)
    return Drawn(config.initializer_range)


def _copied(side: str, stack_name: str, stack: Stack) -> Copied:
    parts = stack_name.split(".")
    if parts[0] == "layers":
        parts[1] = str(stack.layers[int(parts[1])])
    source_name = stack.source.stack_names.get(".".join(parts))
    if source_name is None:
        raise UserError(
            f"{stack.source.path} has no tensor for {'.'.join(parts)}. Give a complete {stack.source.family.title} "
            "checkpoint."
        )
    if stack.kv_repeats > 1 and any(f".self_attn.{projection}_proj." in stack_name for projection in "kv"):
        return Copied(side, source_name, stack.kv_repeats, stack.source.config.head_dim)
    return Copied(side, source_name)


def _most_bytes(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> torch.dtype:
    totals: dict[torch.dtype, int] = {}
    for shape, dtype in tensors.values():
        totals[dtype] = totals.get(dtype, 0) + nbytes(shape, dtype)
    return max(totals, key=lambda dtype: totals[dtype])


def _check_shapes(writes: tuple[Write, ...], target: Target) -> None:
    for write in writes:
        if isinstance(write.origin, Copied):
            source = target.stack(write.origin.side).source
            stored = source.tensors[write.origin.name].shape
            if (*(size * write.origin.repeats for size in stored[:1]), *stored[1:]) != write.shape:
                needed = (write.shape[0] // write.origin.repeats, *write.shape[1:])
                raise UserError(
                    f"{source.path} holds {write.origin.name} as {list(stored)}, but its config makes it "
                    f"{list(needed)}. Give a checkpoint whose config.json belongs to its weights."
                )


def _left_out(target: Target, origins: dict[str, Copied | Drawn | Constant]) -> Iterator[LeftOut]:
    """What is not used, side by side: each side accounts for all of its own source."""
    for side in (ENCODER, DECODER):
        stack = target.stack(side)
        used = {origin.name for origin in origins.values() if isinstance(origin, Copied) and origin.side == side}
        names = {name: stack_name for stack_name, name in stack.source.stack_names.items()}
        for name in stack.source.tensors:
            if name not in used:
                reason = stack.source.left_out.get(name) or _reason(side, names[name], stack, target)
                yield LeftOut(side, name, reason)


def _reason(side: str, stack_name: str, stack: Stack, target: Target) -> str:
    if stack_name == OUTPUT_HEAD:
        return "an encoder has no output head" if side == ENCODER else "tied to the embedding"
    parts = stack_name.split(".")
    if parts[0] == "layers" and int(parts[1]) in {*range(stack.source.config.num_hidden_layers)} - {*stack.layers}:
        return "layer not kept"
    if stack_name == EMBEDDING and side == ENCODER and target.config.share_embeddings:
        return "the decoder's embedding is shared"
    raise UserError(
        f"{stack.source.path} holds a tensor for {stack_name}, which a model of its config does not have. Give a "
        "checkpoint whose config.json belongs to its weights."
    )
