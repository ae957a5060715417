"""Safetensors files, read by their headers and written front to back.

A tensor that keeps its dtype goes from file to file inside the kernel; any other passes through a few megabytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .tensors import (
    CHUNK_BYTES,
    DTYPE_CODES,
    FLOAT_DTYPES,
    FileRange,
    SafetensorsTensor,
    StoredTensor,
    check_finite,
    nbytes,
)
from .text_files import read_json

INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_AND_RUN = ("*.safetensors", "*.safetensors.index.json", "pytorch_model_fsdp*", "optimizer*", "scheduler*",
                    "rng_state*", "trainer_state.json", "training_args.bin", "complete.json", "scaler.pt",
                    "checkpoint-*", "tokens", "*.py")  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# One call to the kernel, so that the progress bar moves.
_COPY_BYTES = 64 << 20
# What copy_file_range says where it does not exist for this pair of files.
_CANNOT_COPY = {errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to come: its header entry, and its bytes as a range of a file or as chunks of rows in ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: FileRange | Callable[[], Iterable[torch.Tensor]]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's files of weights by name, without reading their data.

    Raises:
        UserError: there are none, as ``read_header``, or the index and the files disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard, listed in _shards(folder).items():
        found = read_header(folder / shard)
        if listed is not None and listed != set(found):
            odd = sorted(listed ^ set(found))[0]
            raise UserError(f"{folder / INDEX_FILE} and {shard} disagree about {odd}. Download both again.")
        tensors.update(found)
    return tensors


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name, whatever their dtype.

    Raises:
        UserError: as ``read_headers``, but for dtypes.
    """
    return {
        name: tuple(entry["shape"]) for shard in _shards(folder) for name, entry in _entries(folder / shard)[1].items()
    }


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of a safetensors file by name, without reading their data.

    Raises:
        UserError: the file is missing, cut short or damaged, or holds a tensor that is none of ``FLOAT_DTYPES``.
    """
    begin, entries = _entries(path)
    return {
        name: SafetensorsTensor(
            path,
            begin + entry["data_offsets"][0],
            tuple(entry["shape"]),
            weight_dtype(entry["dtype"], name, str(path)),
        )
        for name, entry in entries.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that a checkpoint's index names, or its only one.

    Raises:
        UserError: there are none.
    """
    return [folder / name for name in _shards(folder)]


def weight_dtype(code: str, name: str, where: str) -> torch.dtype:
    """The dtype that a safetensors header calls ``code``.

    Raises:
        UserError: it is none of ``FLOAT_DTYPES``.
    """
    if code not in FLOAT_DTYPES:
        raise UserError(
            f"{where} holds {name} as {code}; only {', '.join(FLOAT_DTYPES)} can be converted. "
            "Give an unquantised checkpoint."
        )
    return FLOAT_DTYPES[code]


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite], on_bytes: Callable[[int], None]) -> None:
    """Write one safetensors file, and have it on the disk before returning.

    Args:
        tensors: widest dtype first, so that every tensor is aligned.
        on_bytes: called with the number of bytes of each piece written.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        UserError: a value is not finite, or a file became shorter while it was read.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + nbytes(tensor.shape, tensor.dtype)
        header[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb", buffering=0) as file:
        _write(file, struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            if isinstance(tensor.content, FileRange):
                _check_range(tensor)
                _copy_range(tensor.content, file, on_bytes)
                continue
            for chunk in tensor.content():
                assert chunk.dtype == tensor.dtype, "the header says otherwise"
                check_finite(chunk, tensor.name, "what is written")
                # numpy has no bfloat16, so the values are handed over as bytes.
                _write(file, chunk.contiguous().flatten().view(torch.uint8).numpy().data)
                on_bytes(chunk.nbytes)
        assert file.tell() == 8 + len(encoded) + end, "a tensor has other bytes than its shape and dtype say"
        os.fsync(file.fileno())


def write_divided_as(
    checkpoint: Path, folder: Path, tensors: Mapping[str, TensorToWrite], on_bytes: Callable[[int], None]
) -> None:
    """Write tensors into the files that a checkpoint has those of the same names in.

    Args:
        tensors: by name, all that the checkpoint has.
        on_bytes: as in ``write_safetensors``.

    Raises:
        OSError: as ``write_safetensors``.
    """
    files = {file: sorted(names or tensors) for file, names in _shards(checkpoint).items()}
    for file, names in files.items():
        ordered = sorted((tensors[name] for name in names), key=lambda tensor: -tensor.dtype.itemsize)
        write_safetensors(folder / file, ordered, on_bytes)
    if len(files) > 1:
        total = sum(nbytes(tensor.shape, tensor.dtype) for tensor in tensors.values())
        write_index(folder, {name: file for file, names in files.items() for name in names}, total)


def copy_rest(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside its weights, but no code and nothing that only the run that wrote it needs."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_WEIGHTS_AND_RUN), dirs_exist_ok=True)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """The index of a sharded checkpoint: tensor name to file name."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _entries(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a file's data begin, and its header's entry for each tensor."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing. Download the checkpoint again.")
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's size
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}). Download it again.") from error
    header.pop("__metadata__", None)
    return 8 + length, header


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a folder, each with the tensors that its index says it holds (None without an index)."""
    index_file = folder / INDEX_FILE
    if os.path.lexists(index_file):
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index_file} has no weight_map. Download it again.")
        shards: dict[str, set[str] | None] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard:
                raise UserError(f"{index_file} names {shard!r}, which is no file of its own folder. Do not trust it.")
            listed = shards.setdefault(shard, set())
            assert listed is not None
            listed.add(tensor)
        return shards
    if os.path.lexists(folder / "model.safetensors"):
        return {"model.safetensors": None}
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read. Give a safetensors checkpoint "
            "(transformers' save_pretrained writes one)."
        )
    raise UserError(f"{folder} has neither model.safetensors nor {INDEX_FILE}. Give a folder with the weights.")


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of ``data``: the operating system may take a part at a time."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _check_range(tensor: TensorToWrite) -> None:
    """``check_finite`` of bytes that are copied as they are, which also has them in memory by then."""
    assert isinstance(tensor.content, FileRange)
    with tensor.content.path.open("rb", buffering=0) as file:
        file.seek(tensor.content.offset)
        left = tensor.content.length
        while left:
            data = bytearray(min(CHUNK_BYTES, left))
            if file.readinto(data) != len(data):
                raise UserError(f"{tensor.content.path} became shorter while it was read. Download it again.")
            check_finite(torch.frombuffer(data, dtype=tensor.dtype), tensor.name, tensor.content.path)
            left -= len(data)


def _copy_range(source: FileRange, target: IO[bytes], on_bytes: Callable[[int], None]) -> None:
    """Append a range of a file to ``target``, inside the kernel where it can."""
    with source.path.open("rb", buffering=0) as file:
        position, end = source.offset, source.offset + source.length
        while position < end:
            count = min(_COPY_BYTES, end - position)
            try:
                copied = os.copy_file_range(file.fileno(), target.fileno(), count, offset_src=position)
            except (OSError, AttributeError) as error:  # AttributeError: macOS has no such call
                if isinstance(error, OSError) and error.errno not in _CANNOT_COPY:
                    raise
                file.seek(position)
                data = file.read(min(count, 8 << 20))
                _write(target, data)
                copied = len(data)
            if copied == 0:
                raise UserError(f"{source.path} became shorter while it was read. Download it again.")
            position += copied
            on_bytes(copied)
