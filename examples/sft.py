"""Supervised fine-tuning on questions and answers: all weights, LoRA or QLoRA; encoder-decoder or decoder-only.

    python examples/sft.py --config examples/configs/sft_laptop.yaml --model.path MODEL --data.train.path FILE
    accelerate launch examples/sft.py --config examples/configs/sft_2b-2b.yaml --training.learning_rate 1e-5

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import torch
from jsonargparse import ArgumentParser
from transformers import Seq2SeqTrainingArguments

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.settings import (
    AnswerDataSettings,
    EvaluationSettings,
    LoraSettings,
    TuningSettings,
)
from modeling_t5gemma.post_training.sft_run import Settings, make_trainer
from modeling_t5gemma.training.launch import train
from modeling_t5gemma.training.run import save_adapted
from modeling_t5gemma.training.settings import DistillationSettings, ModelSettings


def parser() -> ArgumentParser:
    """The command line: --config FILE and every key of every section."""
    made = ArgumentParser(
        description=__doc__,
        usage="sft.py --config FILE [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    made.add_argument("--model", type=ModelSettings)
    made.add_argument("--data", type=AnswerDataSettings)
    made.add_argument("--lora", type=LoraSettings | None, default=None, help="train low-rank adapters alone")
    made.add_argument("--tuning", type=TuningSettings, default=TuningSettings())
    made.add_argument("--distillation", type=DistillationSettings, default=DistillationSettings())
    made.add_argument("--evaluation", type=EvaluationSettings, default=EvaluationSettings())
    made.add_argument("--training", type=Seq2SeqTrainingArguments)
    made.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint")
    # The Trainer refuses bf16 on a CPU that it was not told of.
    made.set_defaults({"training.use_cpu": not torch.accelerator.is_available()})
    return made


def settings_of(arguments: list[str] | None = None) -> tuple[Settings, str]:
    """The settings of a command line, and what to resume from.

    Raises:
        UserError: the training settings don't fit each other.
    """
    cli = parser()
    parsed = cli.parse_args(arguments)
    try:
        given = cli.instantiate(parsed)
    except (ValueError, ImportError) as error:
        raise UserError(f"The training settings don't fit: {error}") from error
    settings = Settings(
        given.model, given.data, given.training, given.distillation, given.tuning, given.evaluation, given.lora
    )
    return settings, given.resume


def main() -> None:
    """Train; exit code 0 when the last step was done, 143 or 130 when a signal ended the run before it."""
    settings, resume = settings_of()
    trainer = make_trainer(settings)
    train(trainer, resume)
    save_adapted(trainer, settings.model.path)


if __name__ == "__main__":
    run(main)
