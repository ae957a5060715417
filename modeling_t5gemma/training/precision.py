"""Which floating-point type the matrix products of adapting use."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

REPEATS = 6
PATIENCE = 1.0  # seconds


@dataclass(frozen=True)
class Precision:
    """The type of matrix products; weights and optimizer states stay float32.

    Attributes:
        dtype: torch.bfloat16 (by autocast) or torch.float32.
    """

    dtype: torch.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )
        return context


def faster_precision(device: torch.device) -> Precision:
    """bfloat16, unless a trial shows that this CPU has no fast way to multiply it."""
    if device.type != "cpu":
        return Precision(torch.bfloat16)
    times = {dtype: _product_seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return Precision(min(times, key=times.__getitem__))


def fastest_seconds(work: Callable[[], object]) -> float:
    """The fastest of several calls. The first one warms up; where it alone takes longer than that could, it is enough:
    without instructions for bfloat16, a product takes seconds."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < PATIENCE:
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 640, dtype=dtype), torch.ones(640, 2048, dtype=dtype)
    return fastest_seconds(lambda: a @ b)
