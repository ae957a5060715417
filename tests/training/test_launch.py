"""What a training script does with its trainer, where to begin above all."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from modeling_t5gemma import cli
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.checkpoints import COMPLETE_FILE, complete, find
from modeling_t5gemma.training.launch import train
from tests.training.test_trainer import losses, make


class Rates(TrainerCallback):
    """The learning rate that each step was made with."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.found.append(optimizer.param_groups[0]["lr"])


def test_a_run_begins_where_it_is_told(tmp_path):
    whole = make(tmp_path / "whole", steps=4)
    train(whole, "never")
    assert closing_loss(whole) == np.mean(losses(whole))
    assert find(tmp_path / "whole").last.name == "checkpoint-4"
    half, last = tmp_path / "whole" / "checkpoint-2", tmp_path / "whole" / "checkpoint-4"
    again = make(tmp_path / "again", steps=4)
    train(again, str(half))
    assert [folder.name for folder in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-4"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (last, tmp_path / "again" / "checkpoint-4")]
    assert weights[0] == weights[1]
    assert closing_loss(again) == closing_loss(whole)


def closing_loss(trainer) -> float:
    """The mean over all steps of a run, which is told at its end."""
    return pytest.approx(trainer.state.log_history[-1]["train_loss"])


def test_what_is_over_is_not_trained_on(tmp_path):
    """Killed behind its last step, or started once more."""
    first = make(tmp_path, steps=4)
    train(first, "auto")
    weights = (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes()
    again = make(tmp_path, steps=4)
    train(again, "auto")
    again.save_model()
    assert closing_loss(again) == closing_loss(first)
    assert again.state.global_step == 4 and (tmp_path / "model.safetensors").read_bytes() == weights
    assert find(tmp_path).last.name == "checkpoint-4"


def test_an_optimizer_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"training.optim is adamw_bnb_8bit: .*bitsandbytes"):
        train(make(tmp_path, steps=4, optim="adamw_bnb_8bit"), "auto")


@pytest.mark.parametrize(
    "resume, words",
    [
        ("never", "up to checkpoint-4, and --resume never begins before it"),
        ("{run}/checkpoint-2", "begins before it. Leave --resume out"),
        ("{run}/checkpoint-3", COMPLETE_FILE),
        ("{run}/renamed", "not named checkpoint-STEP"),
    ],
)
def test_beginning_before_what_is_there_is_refused(resume, words, tmp_path):
    train(make(tmp_path, steps=4), "auto")
    (tmp_path / "renamed").mkdir()
    complete(tmp_path / "renamed", {"position": 0, "sum_of_losses": 0.0})
    with pytest.raises(UserError, match=words):
        train(make(tmp_path, steps=4), resume.format(run=tmp_path))
    assert find(tmp_path).last.name == "checkpoint-4" and (tmp_path / "checkpoint-2" / COMPLETE_FILE).exists()


def test_after_a_loss_that_is_not_finite_it_goes_on_with_a_lower_learning_rate(tmp_path):
    """The learning rate of a checkpoint would win over that of the settings, in silence."""
    trainer = make(tmp_path / "high", steps=4, lr_scheduler_type="constant")

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.model.decoder.norm.weight.fill_(float("nan"))

    trainer.add_callback(Poison())
    last = tmp_path / "high" / "checkpoint-2"
    with pytest.raises(UserError, match=f"The loss of step 4 is nan .*--resume {last}, with another"):
        train(trainer, "auto")
    lower, rates = make(tmp_path / "low", steps=4, lr_scheduler_type="constant"), Rates()
    lower.args.learning_rate = 1e-4
    lower.add_callback(rates)
    train(lower, str(last))
    assert rates.found == pytest.approx([1e-4, 1e-4])


def test_an_interruption_is_no_traceback(capsys):
    handler = signal.getsignal(signal.SIGTERM)

    def interrupted():
        raise KeyboardInterrupt

    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(interrupted)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"
