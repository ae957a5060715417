"""Two Gloo processes compute what one does, the teacher included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


def run(kind: str, output: Path, steps: int, batch: int, ranks: int) -> list[float]:
    """The losses of a run on so many processes."""
    first, *_ = run_ranks(ranks, "tests.training.worker", kind, output, steps, batch)
    return json.loads(first.split("LOSSES")[1])


@pytest.mark.parametrize("kind", ["trainer", "fsdp"])
def test_two_processes_have_the_losses_of_one(kind, tmp_path):
    one = run(kind, tmp_path / "one", 4, 4, ranks=1)
    two = run(kind, tmp_path / "two", 4, 2, ranks=2)
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole = run("trainer", tmp_path / "whole", 4, 4, ranks=1)
    run("trainer", tmp_path / "parts", 2, 4, ranks=1)
    parts = run("trainer", tmp_path / "parts", 4, 2, ranks=2)
    assert len(parts) == 4 and parts == pytest.approx(whole, abs=1e-4)
