"""What the user can choose about a conversion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from modeling_t5gemma.errors import UserError

CROSS_ATTENTION = ("auto", "copy", "random", "partial", "layerwise")
ENCODER_KV = ("gqa", "mha")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ConversionOptions:
    """One conversion.

    Attributes:
        enc, dec: the sources: alias, Hub repository, folder or ``.gguf`` file.
        output: the folder to make.
        cross_attention: where the decoder's cross-attention comes from. "copy": from the same layer's self-attention,
            with the norms around it. "random": drawn, with fresh norms of gain 1, from which training starts lower
            than from copied ones. "partial": queries, output and norms copied, keys and values drawn. "layerwise": no
            weights, the decoder reads the encoder's keys and values layer by layer. "auto" is the paper's rule
            (arXiv 2504.06225): copy if width, heads and number of layers are equal, else random.
        encoder_attention: "bidirectional", "causal", or the layers of the converted encoder that are bidirectional.
        encoder_kv: "gqa" keeps the encoder's key/value heads; "mha" repeats them, one for each query head.
        enc_layers, dec_layers: the layers of the source to keep, as "0-11" or "0,2,4"; None keeps all.
        share_embeddings: one embedding, the decoder source's, for both stacks.
        dtype: "auto" keeps each tensor's own, and makes float32 of quantised ones.
        seed: of what is drawn; each tensor's values depend on it and on the tensor's name alone.
        max_shard_size: such as "5GB".
        revision: branch, tag or commit, of sources from the Hub.
        aliases_of: the family whose aliases ``enc`` and ``dec`` may be.
        overwrite: replace a checkpoint at ``output``.
        verify: prove the result before it is given its name.
        push_to_hub: the repository that the result is for, which its card names.
    """

    enc: str
    dec: str
    output: Path
    cross_attention: str = "auto"
    encoder_attention: str = "bidirectional"
    encoder_kv: str = "gqa"
    enc_layers: str | None = None
    dec_layers: str | None = None
    share_embeddings: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_shard_size: str = "5GB"
    revision: str | None = None
    aliases_of: str = "gemma2"
    overwrite: bool = False
    verify: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("--cross-attention", self.cross_attention, CROSS_ATTENTION),
            ("--encoder-kv", self.encoder_kv, ENCODER_KV),
            ("--dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in allowed:
                raise UserError(f"{option} is {value!r}; it can be one of {', '.join(allowed)}.")


def parse_layers(option: str, spec: str | None, layers: int) -> list[int]:
    """Layer numbers from "0-11", "0,2,4" or a mixture; None means all.

    Args:
        option: the option's name, for messages.
        layers: how many there are.

    Raises:
        UserError: not such a list, not ascending, or beyond the last layer.
    """
    if spec is None:
        return list(range(layers))
    numbers: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f'{option} is {spec!r}; write layers as "0-11" or "0,2,4".')
        first, last = int(match[1]), int(match[2] or match[1])
        # The bound is checked before a range is made of it: "0-99999999999" must not take all memory.
        if max(first, last) >= layers:
            raise UserError(f"{option} is {spec!r}, but the layers go from 0 to {layers - 1}.")
        numbers.extend(range(first, last + 1))
    if not numbers or any(a >= b for a, b in pairwise(numbers)):
        raise UserError(f"{option} is {spec!r}; layers have to be named once each, in ascending order.")
    return numbers


def describe_layers(numbers: Sequence[int]) -> str:
    """Layer numbers as ``parse_layers`` reads them, with runs joined: "0-5,8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
