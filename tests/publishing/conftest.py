"""Checkpoints to publish, and papers that go with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from tests.conversion.tiny import save_tokenizer, tiny_model

# Only what tells a copy from a place-holder: the terms themselves are not ours to write down.
TERMS = "Gemma Terms of Use\n\n... including the Gemma Prohibited Use Policy ...\n"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model type a converted checkpoint, in several files of weights, not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoints = {}
    for family, kind, how in (("gemma2", "t5gemma", "copy"), ("gemma3", "adapted_seq2seq", "layerwise")):
        source = folder / family
        tiny_model(family, num_hidden_layers=2).save_pretrained(source)
        save_tokenizer(source)
        options = ConversionOptions(
            str(source), str(source), folder / kind, cross_attention=how, max_shard_size="250KB"
        )
        carry_out(prepare(options))
        checkpoints[kind] = folder / kind
    return checkpoints


@pytest.fixture
def checkpoint(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may spoil."""

    def copy(kind: str, name: str = "checkpoint") -> Path:
        return Path(shutil.copytree(made[kind], tmp_path / name))

    return copy


@pytest.fixture
def terms(tmp_path: Path) -> Path:
    path = tmp_path / "terms.txt"
    path.write_text(TERMS)
    return path


def write_run(folder: Path, base: str, teacher: str | None = None, **model: str) -> Path:
    """The records of a training run."""
    folder.mkdir(exist_ok=True)
    settings = {
        "model": {"path": base, "teacher": teacher, **model},
        "data": {"sources": [{"path": "owner/prose"}, {"path": "/secret/place/notes.jsonl"}], "window": 64},
        "objective": "prefix_lm",
        "distillation": {"divergence": "forward_kl", "temperature": 1.0, "share": 1.0},
        "training": {"max_steps": 20, "learning_rate": 1e-4, "bf16": True, "optim": "adamw_torch"},
    }
    log = [
        {"step": 10, "loss": 3.0, "tokens_per_second": 100.0, "peak_memory_gib": 2.0},
        {"step": 10, "eval_loss": 2.5, "eval_encoder_use": 0.25},
        {"step": 20, "loss": 2.0, "tokens_per_second": 300.0, "peak_memory_gib": 2.5},
        {"step": 20, "eval_loss": 2.25, "eval_encoder_use": 0.5},
        {"step": 20, "train_runtime": 7200.0},
    ]
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(
        json.dumps({"settings": settings, "step": 20, "log": log, "rows_per_step": 8, "processes": 4})
    )
    return folder
