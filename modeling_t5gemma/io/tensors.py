"""Tensors as they lie in a source's files, and how the bytes of a converted one are made, a few megabytes at a time.

Nothing here holds a whole tensor: the embedding of a 27B model alone has 2.4 GB.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

CHUNK_BYTES = 8 << 20

# The dtypes of safetensors that a weight may have.
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class FileRange:
    """``length`` bytes of ``path`` from ``offset``, which are written as they are."""

    path: Path
    offset: int
    length: int


class StoredTensor(Protocol):
    """A tensor of a source.

    Attributes:
        shape: as torch has it.
        dtype: the dtype that its values have once read; float32 for a quantised one.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of the first dimension, in ``dtype``."""
        ...

    def verbatim(self) -> FileRange | None:
        """Where its values lie as ``dtype`` in row order, or None if they have to be computed."""
        ...


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file whose data begin ``offset`` bytes into it."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        row = row_bytes(self.shape, self.dtype)
        buffer = bytearray((stop - start) * row)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            read = file.readinto(buffer)
        assert read == len(buffer), "the file's size was checked when it was opened"
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *self.shape[1:])

    def verbatim(self) -> FileRange:
        return FileRange(self.path, self.offset, nbytes(self.shape, self.dtype))


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor that was only looked up: enough to plan with, nothing to read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("a plan made without the weights cannot be carried out")

    def verbatim(self) -> FileRange | None:
        raise AssertionError("a plan made without the weights cannot be carried out")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, dequantised with the ``gguf`` package.

    Attributes:
        quantization: llama.cpp's type of the data that begin ``offset`` bytes into ``path``.
        stored_row_bytes: what a row of the last dimension takes in the file.
        added: what llama.cpp added to every value when it wrote the file; taken off in float32.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantization: GGMLQuantizationType
    stored_row_bytes: int
    added: float

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import numpy as np
        from gguf import dequantize

        # A vector is one stored row, of which it would not pay to read a part.
        lines = (0, 1) if len(self.shape) == 1 else (start, stop)
        stored = np.memmap(
            self.path,
            dtype=np.uint8,
            mode="r",
            offset=self.offset + lines[0] * self.stored_row_bytes,
            shape=(lines[1] - lines[0], self.stored_row_bytes),
        )
        values = torch.from_numpy(np.array(dequantize(stored, self.quantization), dtype=np.float32))
        if len(self.shape) == 1:
            values = values.flatten()[start:stop]
        return (values - self.added).to(self.dtype) if self.added else values.to(self.dtype)

    def verbatim(self) -> FileRange | None:
        is_plain = self.stored_row_bytes == self.shape[-1] * self.dtype.itemsize and not self.added
        return FileRange(self.path, self.offset, nbytes(self.shape, self.dtype)) if is_plain else None


def check_finite(tensor: torch.Tensor, name: str, where: str | Path) -> None:
    """Refuse weights that are not numbers: a model with them answers and scores as any other does.

    Takes no copy; a core does some 2 GB a second.

    Raises:
        UserError: the tensor, ``name`` of ``where``, has a NaN or an infinity.
    """
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach())):
        raise UserError(
            f"{name} of {where} has values that are not finite (NaN or infinity). Give a checkpoint from before it "
            "diverged."
        )


def check_finite_model(model: nn.Module, where: str | Path) -> None:
    """``check_finite`` of all parameters."""
    for name, parameter in model.named_parameters():
        check_finite(parameter, name, where)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one entry of the first dimension."""
    return math.prod(shape[1:]) * dtype.itemsize


def stored_chunks(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """All rows of ``tensor`` in order and in ``dtype``."""
    for start, stop in row_ranges(tensor.shape):
        yield tensor.rows(start, stop).to(dtype)


def repeated_chunks(tensor: StoredTensor, dtype: torch.dtype, head_dim: int, repeats: int) -> Iterator[torch.Tensor]:
    """Rows of a key or value projection with each head ``repeats`` times in a row, so that each query has its own.

    Args:
        tensor: (kv_heads * head_dim, ...); the result has (kv_heads * repeats * head_dim, ...).
    """
    for head in range(tensor.shape[0] // head_dim):
        rows = tensor.rows(head * head_dim, (head + 1) * head_dim).to(dtype)
        for _ in range(repeats):
            yield rows


def drawn_chunks(
    shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int, name: str
) -> Iterator[torch.Tensor]:
    """Normal values of mean 0, the same for a name and a seed whatever else is drawn before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    for start, stop in row_ranges(shape):
        values = torch.empty(stop - start, *shape[1:])
        yield values.normal_(0.0, std, generator=generator).to(dtype)


def constant_chunks(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Iterator[torch.Tensor]:
    """One value everywhere."""
    for start, stop in row_ranges(shape):
        yield torch.full((stop - start, *shape[1:]), value, dtype=dtype)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``CHUNK_BYTES`` in float32, which is what all values pass through."""
    rows = max(1, CHUNK_BYTES // max(1, row_bytes(shape, torch.float32)))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])
