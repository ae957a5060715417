"""What a run uses: tokens, floating-point operations, memory, time."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .parts import part_of
from .precision import fastest_seconds


class Meter:
    """Counts between two log entries.

    Model FLOPs are those of the matrix products with weights: 2 a weight and token forward, 4 more backward; those of
    attention scores are left out. Utilisation is their rate over that of one large matrix product, measured once a
    process for each device and precision: there is no table of devices to be out of date.

    Args:
        student, teacher: the models.
        dtype: the type of the matrix products.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, dtype: torch.dtype) -> None:
        sizes = {"encoder": 0, "decoder": 0}
        for name, parameter in student.named_parameters():
            part = part_of(name)
            if part != "embeddings":
                sizes["encoder" if part == "encoder" else "decoder"] += parameter.numel()
        embeddings = student.get_output_embeddings()
        head = 0 if embeddings is None else embeddings.weight.numel()
        # A decoder-only model has no encoder: its decoder reads the source.
        self._of_source = 6 * (sizes["encoder"] or sizes["decoder"])
        self._of_target = 6 * (sizes["decoder"] + head)
        self._of_teacher = 0
        if teacher is not None:
            inner = sum(p.numel() for name, p in teacher.named_parameters() if part_of(name) != "embeddings")
            self._of_teacher = 2 * inner
            self._of_target += 2 * teacher.get_output_embeddings().weight.numel()
        self._device = student.device
        self._dtype = dtype
        self._reset()

    def _reset(self) -> None:
        self._source = self._target = self._taught = 0
        self._begin = time.perf_counter()

    def add(self, source: int, target: int, taught: int) -> None:
        """Count the real tokens of a batch in encoder, decoder and teacher."""
        self._source += source
        self._target += target
        self._taught += taught

    def read(self, ranks: int) -> dict[str, float]:
        """Rates since the last reading, over all ranks taken as equal; begins anew."""
        rate = _product_rate(self._device, self._dtype)
        seconds = time.perf_counter() - self._begin
        flops = self._of_source * self._source + self._of_target * self._target + self._of_teacher * self._taught
        result = {
            "tokens_per_second": ranks * (self._source + self._target) / seconds,
            "model_flops_utilisation": flops / seconds / rate,
            "peak_memory_gib": peak_memory(self._device) / 2**30,
        }
        self._reset()
        return result


def peak_memory(device: torch.device) -> int:
    """The most memory ever used, in bytes: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


@cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, the best of some."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        a @ a
        _wait(device)

    _wait(device)
    return 2 * size**3 / fastest_seconds(multiply)


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
