"""What a converted checkpoint is, from its config and the headers of its files, without reading a weight."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_t5gemma.configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from modeling_t5gemma.conversion.documents import read_record
from modeling_t5gemma.conversion.target import expected_tensors
from modeling_t5gemma.cross_attention import is_cross_attention
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import hub
from modeling_t5gemma.io.checkpoints import load_config, read_generation_config
from modeling_t5gemma.io.safetensors_files import read_header
from modeling_t5gemma.io.tensors import DTYPE_CODES
from modeling_t5gemma.io.text_files import read_json

PARTS = ("encoder embedding", "encoder", "decoder embedding", "decoder", "cross-attention", "head")
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's shape, and its dtype as safetensors calls it ("BF16"), None where only the config is known."""

    shape: tuple[int, ...]
    dtype: str | None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int | None:
        return None if self.dtype is None else self.parameters * _BYTES[self.dtype]


@dataclass(frozen=True)
class Inspection:
    """A converted checkpoint.

    Attributes:
        config: its config.
        tensors: what its files hold or, without files, what a checkpoint of its config has to hold.
        has_weights: whether there are files.
        missing, unexpected: names of tensors that the config asks for and the files lack, and the reverse.
        generation: the contents of ``generation_config.json``, {} without one.
        record: the contents of ``conversion.json``, {} without one.
    """

    config: T5GemmaConfig | AdaptedSeq2SeqConfig
    tensors: Mapping[str, TensorHeader]
    has_weights: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    generation: Mapping[str, Any]
    record: Mapping[str, Any]

    def part(self, name: str) -> list[TensorHeader]:
        """The tensors of one of ``PARTS``."""
        return [header for tensor, header in self.tensors.items() if part_of(tensor) == name]


def inspect_checkpoint(given: str, revision: str | None = None) -> Inspection:
    """Inspect a checkpoint.

    Args:
        given: a folder (``config.json`` alone will do) or a Hub repository.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: there is no such checkpoint, or it is none of ours.
    """
    folder = Path(os.path.expanduser(given))
    if os.path.isdir(folder):
        return _inspect(folder, _local_headers(folder))
    if "/" not in given or os.path.lexists(folder) or os.path.isdir(folder.parent):
        raise UserError(f"{given} is neither a folder nor a Hub repository (OWNER/NAME). Check the path.")
    folder, headers = hub.describe(given, revision)
    return _inspect(folder, {name: TensorHeader(shape, dtype) for name, (shape, dtype) in headers.items()})


def part_of(tensor: str) -> str:
    """Which of ``PARTS`` a tensor belongs to."""
    stack = next((stack for stack in ("encoder", "decoder") if f"{stack}." in tensor), None)
    if stack is None:
        return "head"
    if is_cross_attention(tensor):
        return "cross-attention"
    return f"{stack} embedding" if "embed_tokens" in tensor else stack


def _inspect(folder: Path, headers: dict[str, TensorHeader]) -> Inspection:
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ("t5gemma", "adapted_seq2seq"):
        raise UserError(
            f"{folder / 'config.json'} is of model type {raw.get('model_type')!r}; this command shows 't5gemma' and "
            "'adapted_seq2seq'."
        )
    config = load_config(folder)
    expected = {name: TensorHeader(shape, None) for name, shape in expected_tensors(config).items()}
    # Other heads, and encoders alone, hold other tensors.
    is_generator = all(name.endswith("ForConditionalGeneration") for name in config.architectures or [])
    compared = bool(headers) and is_generator
    return Inspection(
        config=config,
        tensors=headers or expected,
        has_weights=bool(headers),
        missing=tuple(sorted(expected.keys() - headers.keys())) if compared else (),
        unexpected=tuple(sorted(headers.keys() - expected.keys())) if compared else (),
        generation=read_generation_config(folder),
        record=read_record(folder),
    )


def _local_headers(folder: Path) -> dict[str, TensorHeader]:
    headers = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            headers[name] = TensorHeader(tensor.shape, DTYPE_CODES[tensor.dtype])
    return headers
