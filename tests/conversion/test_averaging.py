"""Means of checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from modeling_t5gemma.cli import app
from modeling_t5gemma.conversion.averaging import average
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import tensors
from modeling_t5gemma.training.checkpoints import complete
from tests import tiny


@pytest.fixture
def run(tmp_path):
    """A run's folder with three complete checkpoints and one that was cut short."""
    models = []
    for step in (2, 4, 6, 8):
        model = tiny.t5gemma()
        folder = tmp_path / "run" / f"checkpoint-{step}"
        # Sharded, and in a dtype whose mean has to be summed in a wider one.
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
        (folder / "optimizer.pt").write_bytes(b"state")
        if step < 8:
            complete(folder, {})
            models.append(model)
    return tmp_path / "run", models


def test_the_last_n(run, tmp_path, monkeypatch):
    folder, models = run
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1000)
    result = CliRunner().invoke(
        app, ["average", str(folder), "--last", "2", "--output", str(tmp_path / "mean"), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    mean = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mean")
    parameters = [dict(model.named_parameters()) for model in models[-2:]]
    for name, weight in mean.named_parameters():
        expected = (parameters[0][name].float() / 2 + parameters[1][name].float() / 2).bfloat16()
        assert torch.equal(weight, expected), name
    assert not (tmp_path / "mean" / "optimizer.pt").exists()
    assert json.loads((tmp_path / "mean" / "average.json").read_text())["checkpoints"] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_terms_and_settings_of_the_run_go_with_the_mean(run, tmp_path):
    """They lie with the run, or until its end with what it began as: hazard 37."""
    folder, _ = run
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "NOTICE").write_text("terms")
    (folder / "run.json").write_text(json.dumps({"model": {"path": str(tmp_path / "begun")}}))
    command = ["average", str(folder), "--last", "2", "--output", str(tmp_path / "mean"), "--quiet"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "mean" / "NOTICE").read_text() == "terms"
    assert (tmp_path / "mean" / "run.json").read_bytes() == (folder / "run.json").read_bytes()


def test_what_it_is_the_mean_of_stays(run):
    """A finished run has a model of its own beside its checkpoints, which --overwrite would replace."""
    folder, _ = run
    shutil.copyfile(folder / "checkpoint-6" / "config.json", folder / "config.json")
    checkpoints = [folder / "checkpoint-2", folder / "checkpoint-6"]
    for output in (folder, *checkpoints):
        with pytest.raises(UserError, match=r"is or holds .*, which would be lost"):
            average(checkpoints, [0.5, 0.5], output, overwrite=True)
    assert all((checkpoint / "optimizer.pt").is_file() for checkpoint in checkpoints)


def test_a_weighted_merge_of_two(run, tmp_path):
    folder, models = run
    average([folder / "checkpoint-2", folder / "checkpoint-6"], [0.75, 0.25], tmp_path / "merged")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    a, b, c = (next(model.model.encoder.parameters()).float() for model in (models[0], models[2], merged))
    torch.testing.assert_close(c, 0.75 * a + 0.25 * b, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_averaged(run, tmp_path):
    folder, _ = run
    two = [folder / "checkpoint-2", folder / "checkpoint-4"]
    with pytest.raises(UserError, match=r"sum to 0.9"):
        average(two, [0.5, 0.4], tmp_path / "x")
    with pytest.raises(UserError, match="two or more"):
        average(two[:1], [1.0], tmp_path / "x")
    other = tmp_path / "other"
    shutil.copytree(folder / "checkpoint-6", other)
    config = json.loads((other / "config.json").read_text())
    config["decoder"]["final_logit_softcapping"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"differ in their configs \(decoder\)"):
        average([two[0], other], [0.5, 0.5], tmp_path / "x")
    narrow = tmp_path / "narrow"
    tiny.t5gemma(decoder=tiny.NARROW).save_pretrained(narrow)
    with pytest.raises(UserError, match="give checkpoints of one model"):
        average([two[0], narrow], [0.5, 0.5], tmp_path / "x")
    result = CliRunner().invoke(app, ["average", str(folder), "--last", "4", "--output", str(tmp_path / "x")])
    assert isinstance(result.exception, UserError) and "3 complete checkpoints" in str(result.exception)
    assert not (tmp_path / "x").exists()
