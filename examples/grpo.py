"""Train on rewards of sampled answers (GRPO, DAPO, Dr. GRPO): all weights or LoRA.

    python examples/grpo.py --config examples/configs/grpo_laptop.yaml --model.path MODEL --data.train.path FILE
    accelerate launch examples/grpo.py --config examples/configs/grpo_2b-2b.yaml --grpo.num_generations 16

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import torch
from jsonargparse import ArgumentParser
from transformers import Seq2SeqTrainingArguments

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.grpo import GrpoSettings
from modeling_t5gemma.post_training.preference_run import (
    GrpoRun,
    PolicySettings,
    PromptDataSettings,
    make_grpo_trainer,
)
from modeling_t5gemma.post_training.settings import LoraSettings
from modeling_t5gemma.training.launch import train
from modeling_t5gemma.training.run import save_adapted
from modeling_t5gemma.training.settings import ModelSettings


def parser() -> ArgumentParser:
    """The command line: --config FILE and every key of every section."""
    made = ArgumentParser(
        description=__doc__,
        usage="grpo.py --config FILE [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    made.add_argument("--model", type=ModelSettings)
    made.add_argument("--data", type=PromptDataSettings)
    made.add_argument("--grpo", type=GrpoSettings, default=GrpoSettings())
    made.add_argument("--tuning", type=PolicySettings, default=PolicySettings())
    made.add_argument("--lora", type=LoraSettings | None, default=None, help="train low-rank adapters alone")
    made.add_argument("--training", type=Seq2SeqTrainingArguments)
    made.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint")
    # The Trainer refuses bf16 on a CPU that it was not told of.
    made.set_defaults({"training.use_cpu": not torch.accelerator.is_available()})
    return made


def settings_of(arguments: list[str] | None = None) -> tuple[GrpoRun, str]:
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
    return GrpoRun(given.model, given.data, given.training, given.grpo, given.tuning, given.lora), given.resume


def main() -> None:
    """Train; exit code 0 when the last step was done, 143 or 130 when a signal ended the run before it."""
    settings, resume = settings_of()
    trainer = make_grpo_trainer(settings)
    train(trainer, resume)
    save_adapted(trainer, settings.model.path)


if __name__ == "__main__":
    run(main)
