"""Checkpoints to convert, and the converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from tests.conversion.tiny import save_tokenizer, tiny_model, tiny_multimodal


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``sources(family, dtype=..., seed=..., **config)``: a checkpoint's folder, made once and not to be changed."""
    made: dict[str, Path] = {}

    def source(
        family: str, dtype: torch.dtype = torch.float32, seed: int = 0, tokenizer: bool = True, **changes: Any
    ) -> Path:
        key = json.dumps([family, str(dtype), seed, tokenizer, changes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_multimodal() if family == "multimodal" else tiny_model(family, seed, **changes)
            model.to(dtype).save_pretrained(folder)
            generation = GenerationConfig(
                bos_token_id=2, eos_token_id=[1, 6], pad_token_id=0, do_sample=True, top_k=64
            )
            generation.save_pretrained(folder)
            if tokenizer:
                save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return source


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a source that a test may spoil."""

    def copy(folder: Path, name: str = "spoilt") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """``convert(enc, dec=None, **options)``: the converted checkpoint's folder."""

    def run(enc: Path | str, dec: Path | str | None = None, output: str = "converted", **options: Any) -> Path:
        carry_out(prepare(ConversionOptions(str(enc), str(dec or enc), tmp_path / output, **options)))
        return tmp_path / output

    return run
