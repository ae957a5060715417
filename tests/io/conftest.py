"""A checkpoint of this package, to be spoilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.conftest import MAKE, make_tokenizer
from tests.session import made_once


def checkpoint(kind: str) -> Path:
    """A folder with a tiny model of a kind and a tokenizer, not to be changed."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        MAKE[kind]().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    return made_once(f"tests/io {kind}", make)


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[..., Path]:
    """``spoilt(kind, file, **fields)``: a copy with other fields in one of its JSON files."""

    def spoil(kind: str, file: str = "config.json", **fields: Any) -> Path:
        folder = shutil.copytree(checkpoint(kind), tmp_path / "spoilt", dirs_exist_ok=True)
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}))
        return folder

    return spoil
