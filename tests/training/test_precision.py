"""Which type is tried out, and for how long."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from modeling_t5gemma.training import precision
from modeling_t5gemma.training.precision import faster_precision, fastest_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_the_faster_one_is_taken(faster, monkeypatch):
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype: 1.0 if dtype == faster else 2.0)
    assert faster_precision(CPU).dtype == faster
    assert faster_precision(torch.device("meta")).dtype == torch.bfloat16


@pytest.mark.parametrize("seconds, products", [(0.01, 6), (0.4, 3), (5.0, 1)])
def test_what_is_slow_is_not_waited_for(seconds, products, monkeypatch):
    clock = count()
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock) * seconds)
    calls = []
    assert fastest_seconds(lambda: calls.append(None)) == pytest.approx(seconds)
    assert len(calls) == products
