"""The mean of checkpoints of one architecture, a few megabytes at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_t5gemma.conversion.convert import hub_code_files
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import load_config
from modeling_t5gemma.io.safetensors_files import TensorToWrite, copy_rest, read_headers, write_divided_as
from modeling_t5gemma.io.staging import check_apart, check_output, staged
from modeling_t5gemma.io.tensors import StoredTensor, nbytes, row_ranges
from modeling_t5gemma.io.text_files import read_json

_OF_NO_MATTER = {"_name_or_path", "transformers_version", "dtype"}


def average(
    checkpoints: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    *,
    extra: Sequence[Path] = (),
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a checkpoint whose every weight is the weighted mean of the others', summed in float32.

    Everything beside the weights (config, tokenizer, terms) is the last one's. ``output`` appears whole or not at all.

    Args:
        weights: one a checkpoint; they sum to 1.
        extra: files to put beside what the last checkpoint has.
        on_bytes: called with the number of bytes of each piece written.

    Raises:
        UserError: a checkpoint is missing, or they have other tensors, shapes, dtypes or configs than the last;
            or ``output`` is in the way, or is or holds one of them.
    """
    if len(checkpoints) < 2 or len(weights) != len(checkpoints):
        raise UserError(
            f"{len(checkpoints)} checkpoints with {len(weights)} weights: give two or more, one weight each."
        )
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"The weights {', '.join(map(str, weights))} sum to {sum(weights):g}: make it 1.")
    check_output(output, overwrite=overwrite)
    check_apart(output, checkpoints)
    for folder in checkpoints:
        load_config(folder)  # which checks what is copied, too
    stored = [read_headers(folder) for folder in checkpoints]
    for folder, tensors in zip(checkpoints, stored, strict=True):
        _compare(folder, tensors, checkpoints[-1], stored[-1])
    total = sum(nbytes(tensor.shape, tensor.dtype) for tensor in stored[-1].values())
    with staged(output, overwrite=overwrite, needed=total) as folder:
        copy_rest(checkpoints[-1], folder)
        code = hub_code_files() if "auto_map" in read_json(folder / "config.json") else []
        for path in (*extra, *code):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        means = {name: _mean(name, stored, weights) for name in stored[-1]}
        write_divided_as(checkpoints[-1], folder, means, on_bytes)
        record = {"checkpoints": [path.name for path in checkpoints], "weights": list(weights)}
        (folder / "average.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _mean(name: str, stored: Sequence[Mapping[str, StoredTensor]], weights: Sequence[float]) -> TensorToWrite:
    tensors = [each[name] for each in stored]
    shape, dtype = tensors[0].shape, tensors[0].dtype

    def chunks() -> Iterator[torch.Tensor]:
        for start, stop in row_ranges(shape):
            total = torch.zeros((), dtype=torch.float32)
            for tensor, weight in zip(tensors, weights, strict=True):
                total = total + tensor.rows(start, stop).float() * weight
            yield total.to(dtype)

    return TensorToWrite(name, shape, dtype, chunks)


def _compare(
    folder: Path, tensors: Mapping[str, StoredTensor], last: Path, wanted: Mapping[str, StoredTensor]
) -> None:
    if missing := sorted(tensors.keys() ^ wanted.keys()):
        raise UserError(f"{folder} and {last} differ in their tensors ({missing[0]}): give checkpoints of one model.")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise UserError(
                f"{name} is {tensor.shape} {tensor.dtype} in {folder} and {wanted[name].shape} {wanted[name].dtype} "
                f"in {last}: give checkpoints of one model."
            )
    mine, theirs = (_without(read_json(path / "config.json")) for path in (folder, last))
    if mine != theirs:
        keys = ", ".join(sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)))
        raise UserError(f"{folder} and {last} differ in their configs ({keys}): give checkpoints of one model.")


def _without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_NO_MATTER}
