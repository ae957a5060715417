"""What becomes of a run whose checkpoints were damaged, are being written by another run, or should not be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.settings import GrpoRun, GrpoSettings
from modeling_t5gemma.training.checkpoints import COMPLETE_FILE, find
from modeling_t5gemma.training.resumable import Diverged
from modeling_t5gemma.training.run_folder import RUN_FILE, claim, describe
from tests.training.test_trainer import losses, make


@pytest.fixture(autouse=True, scope="module")
def _no_curves():
    """Drawing them takes longer than the training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_t5gemma.training.curves.draw", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with two checkpoints, and its losses."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make(folder, steps=4)
    trainer.train()
    return folder, losses(trainer)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, {"format": "pt"})


def back_to_step_0(file: Path) -> None:
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "global_step": 0}))


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")
DAMAGE = [
    *((file, how) for file in (*FILES, COMPLETE_FILE) for how in (truncate, change_a_byte)),
    *((file, Path.unlink) for file in FILES),
    ("model.safetensors", drop_a_tensor),
    ("trainer_state.json", back_to_step_0),
    ("optimizer.pt", replace_by_a_pipe),
    (COMPLETE_FILE, lambda file: file.write_text("{}")),
    (COMPLETE_FILE, lambda file: file.write_text("[]")),
    (COMPLETE_FILE, lambda file: file.write_text("[" * 100_000)),
]


@pytest.mark.parametrize("file, damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, run, file, damage):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(run[0] / name, tmp_path / name)
    damage(tmp_path / "checkpoint-4" / file)
    found = find(tmp_path)
    assert found.last == tmp_path / "checkpoint-2" and list(found.damaged) == [tmp_path / "checkpoint-4"]
    assert file in found.damaged[tmp_path / "checkpoint-4"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, run, capsys):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-3").mkdir()  # of which a kill left this
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    again = make(tmp_path, steps=4)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == run[1] and find(tmp_path).last.name == "checkpoint-4"
    told = capsys.readouterr().err
    assert "checkpoint-4 is damaged: optimizer.pt is missing. It is set aside as checkpoint-4.damaged." in told
    assert "checkpoint-3 was cut short" in told and not (tmp_path / "checkpoint-3").exists()


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_in_silence(tmp_path, run):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    truncate(tmp_path / "checkpoint-2" / "optimizer.pt")
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(UserError, match=r"checkpoint-2 is damaged: optimizer.pt has \d+ bytes in place of"):
            make(tmp_path, steps=4).train(resume_from_checkpoint=resume)
    assert (tmp_path / "checkpoint-2" / COMPLETE_FILE).exists()


def test_weights_that_an_update_spoils_are_not_saved(tmp_path):
    trainer = make(tmp_path, steps=2, optim="sgd", max_grad_norm=0.0, save_strategy="no")
    trainer.args.learning_rate = 1e38
    with pytest.raises(Diverged, match=r"The loss of step 2 is nan|After step \d, weights are infinite"):
        trainer.train()
        trainer.save_model()
    trainer.model.model.decoder.norm.weight.data.fill_(torch.inf)
    with pytest.raises(Diverged, match=r"weights are infinite or no numbers\. The last good checkpoint: none yet"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_folder_is_one_process_s(tmp_path):
    wanted = {"model": {"path": "base"}}
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="Another run is at work in"):
            claim(tmp_path, wanted, writes=True)
        other.communicate(b"\n")
    claim(tmp_path, wanted, writes=True)
    claim(tmp_path, wanted, writes=True)  # a second run of the same process


def test_a_damaged_record_of_a_run_is_told(tmp_path, run):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    for content in ("", "[]", "{", "[" * 100_000):
        (tmp_path / RUN_FILE).write_text(content)
        with pytest.raises(UserError, match=r"run.json is damaged"):
            claim(tmp_path, {"model": {"path": "base"}}, writes=True)


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    trainer = make(tmp_path, steps=2, hub_token="hf_SECRET")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-2" / "training_args.bin").exists()
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hf_SECRET" in file.read_bytes()]
    assert os.environ["HF_TOKEN"] == "hf_SECRET"  # where the Hub's client looks


def test_no_secret_is_described():
    rewards = [{"function": "judge.py:score", "arguments": {"api_key": "SECRET", "model": "judge"}}]
    described = describe(GrpoRun(None, None, None, GrpoSettings(rewards=rewards)), free=())
    assert "SECRET" not in json.dumps(described) and "judge.py:score" in json.dumps(described)
