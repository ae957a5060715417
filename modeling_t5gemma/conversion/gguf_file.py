"""The header of a GGUF file: metadata and tensor table.

The ``gguf`` package's own reader makes an object of every entry of every array, 700 MB for a vocabulary of 262,144, so
the header is read here. The types and their sizes are the package's.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.tensors import GgufTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# A quantised tensor comes out as float32.
_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: by llama.cpp's keys; of the tokenizer's arrays their lengths, and no other arrays.
        tensors: by llama.cpp's names.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path, added_to_norms: float = 0.0) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        added_to_norms: taken off every tensor whose name ends with ``norm.weight``.

    Raises:
        UserError: not a GGUF file, cut short, of an unknown version, one of several parts, or with tensors whose type
            cannot be dequantised.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file. Download it again, or give a folder of safetensors.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Cursor(data, 4), added_to_norms)
            except (struct.error, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is cut short or damaged (its header). Download it again.") from error
    if header.metadata.get("split.count", 1) != 1:
        raise UserError(f"{path} is one of several parts. Join them with llama.cpp's llama-gguf-split --merge.")
    for name, tensor in header.tensors.items():
        rows = 1 if len(tensor.shape) == 1 else tensor.shape[0]
        if tensor.offset + rows * tensor.stored_row_bytes > size:
            raise UserError(f"{path} is cut short: {name} lies beyond its end. Download it again.")
    return header


def read_gguf_tokens(path: Path) -> list[str]:
    """The vocabulary in the order of the ids."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, 4)
        _version, _tensor_count = cursor.scalar("I"), cursor.scalar("Q")
        for _ in range(cursor.scalar("Q")):
            key, kind = cursor.string(), cursor.scalar("I")
            if key == "tokenizer.ggml.tokens":
                _element = cursor.scalar("I")
                return [cursor.string() for _ in range(cursor.scalar("Q"))]
            cursor.value(kind)
    return []


class _Cursor:
    """A position in the file's bytes."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element == GGUFValueType.STRING:
            for _ in range(count):
                self.string()
        else:  # llama.cpp has no arrays in arrays
            self.position += count * struct.calcsize(f"<{_SCALARS[element]}")
        if self.position > len(self.data):
            raise IndexError
        return count


def _parse(path: Path, cursor: _Cursor, added_to_norms: float) -> GgufHeader:
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise UserError(f"{path} is GGUF version {version}; {' and '.join(map(str, _VERSIONS))} can be read.")
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(value_count):
        key, kind = cursor.string(), cursor.scalar("I")
        value = cursor.value(kind)
        if kind != GGUFValueType.ARRAY or key.startswith("tokenizer."):
            metadata[key] = value
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(cursor.scalar("I"))]))
        table.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment.bit_count() != 1:
        raise UserError(f"{path} says general.alignment is {alignment!r}; it is a power of 2. Download it again.")
    start = (cursor.position + alignment - 1) // alignment * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        added = added_to_norms if name.endswith("norm.weight") else 0.0
        tensors[name] = _tensor(path, name, shape, kind, start + offset, added)
    return GgufHeader(metadata, tensors)


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, added: float) -> GgufTensor:
    try:
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds {name} as type {kind}, which the installed gguf package does not know. "
            "Upgrade it (pip install -U gguf), or give another quantisation."
        ) from error
    dtype = _PLAIN_DTYPES.get(quantization, torch.float32)
    return GgufTensor(path, offset, shape, dtype, quantization, shape[-1] // block * block_bytes, added)
