"""The formats there are, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..inference.loading import Checkpoint
from .decoding import Decoding


class Runtime(Protocol):
    """Something that runs a model, a text at a time."""

    def log_probs(self, source: Sequence[int], target: Sequence[int]) -> list[float]:
        """The log-probability of each target token in nats, given the source and the target before it."""

    def greedy(self, source: Sequence[int], count: int) -> list[int]:
        """At most ``count`` likeliest tokens one after the other, up to and with one that ends a text."""


class Backend(Protocol):
    """How one format is written, in one quantisation, and run."""

    def refuse(self, config: Any, path: Path) -> None:
        """Raise a ``UserError`` for a config that the runtime cannot represent, with what can be done instead."""

    def limits(self, config: Any) -> list[str]:
        """What the runtime computes otherwise than a model with this config, and when that matters."""

    def write(self, checkpoint: Checkpoint, folder: Path, decoding: Decoding) -> None:
        """Write the model into a folder. It may be changed on the way, and is not used afterwards."""

    def load(self, folder: Path, decoding: Decoding) -> Runtime:
        """What was written, on the CPU."""


@dataclass(frozen=True)
class Format:
    """One kind of export.

    Attributes:
        title: of the runtime, to read.
        quantizations: what weights can be stored in, and the bytes of a weight; the first is the default.
        packages: what has to be installed beside torch.
    """

    title: str
    quantizations: dict[str, int]
    packages: tuple[str, ...] = ()


FORMATS = {
    "ctranslate2": Format(
        "CTranslate2", {"float32": 4, "bfloat16": 2, "int8": 1, "int8_bfloat16": 1}, ("ctranslate2",)
    ),
    "torch": Format("torch.export", {"float32": 4, "bfloat16": 2}),
    "onnx": Format("ONNX Runtime", {"float32": 4}, ("onnx", "onnxscript", "onnxruntime")),
}


def chosen(format: str, quantization: str | None) -> str:
    """The quantisation to use, after making sure that there is such a format and that it can be written here.

    Raises:
        UserError: there is none, or a package is missing.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format} is none of {', '.join(FORMATS)}.")
    known = FORMATS[format]
    quantization = quantization or next(iter(known.quantizations))
    if quantization not in known.quantizations:
        raise UserError(f"--quantization {quantization}: --format {format} has {', '.join(known.quantizations)}.")
    if missing := [name for name in known.packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {format} needs {', '.join(missing)}: pip install modeling_t5gemma[export].")
    return quantization


def backend_of(format: str, quantization: str) -> Backend:
    """How a format is written; its packages are imported here and not before."""
    if format == "ctranslate2":
        from .ctranslate2_model import CTranslate2

        return CTranslate2(quantization)
    from .packages import TwoPrograms

    return TwoPrograms(format, quantization)
