"""What a card says of a run: what was trained on, and what it was measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modeling_t5gemma.publishing.recipe import Recipe, read_recipe


def recipe(folder: Path, train: str, held_out: str, **columns: str) -> Recipe:
    """Of a fine-tuning run, whose data section has a set to train on and one to measure on."""
    data = {"train": {"path": train}, "eval": {"path": held_out}, "columns": columns, "max_source": 256}
    (folder / "run.json").write_text(json.dumps({"model": {"path": "owner/base"}, "data": data}))
    (folder / "summary.json").write_text(json.dumps({"step": 6, "log": [{"step": 6, "eval_loss": 2.5}]}))
    return read_recipe(folder, folder)


def test_files_are_no_datasets_of_the_hub(tmp_path):
    """Wherever the card is made: "packages/train.jsonl" looks like OWNER/NAME."""
    found = recipe(tmp_path, "packages/train.jsonl", "packages/validation.jsonl", prompt="prompt")
    (measured,) = found.held_out
    assert (found.datasets, measured.dataset) == ([], None)
    assert measured.name == "validation.jsonl, not trained on"
    assert dict(found.rows) == {
        "data: max source": "256",
        "trained for": "6 steps",
        "text": "train.jsonl",
    }


def test_a_set_that_was_measured_on_is_not_one_that_was_trained_on(tmp_path):
    found = recipe(tmp_path, "owner/questions", "owner/other", prompt="article")
    (measured,) = found.held_out
    assert (found.datasets, measured.dataset) == (["owner/questions"], "owner/other")
    assert dict(found.rows)["data: columns"] == '{"prompt": "article"}'


@pytest.mark.parametrize("name", ["best", "checkpoint-best"])
def test_of_a_folder_without_a_step_only_the_settings_are_known(tmp_path, name):
    recipe(tmp_path, "owner/text", "owner/other")
    found = read_recipe(tmp_path, tmp_path / name)
    assert (found.held_out, found.compute) == ([], [])
    assert "trained for" not in dict(found.rows) and dict(found.rows)["text"] == "owner/text"
