"""Tiny checkpoints of all kinds, and a folder of data sets in place of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inference.conftest import checkpoints, invoke  # noqa: F401

KINDS = ("separate", "layerwise", "decoder_only")
DATA = Path(__file__).parent / "fixtures"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
