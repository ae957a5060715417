"""Adapt a converted encoder-decoder: PrefixLM with distillation, UL2, stages.

    python examples/adapt.py --config examples/configs/adapt_laptop.yaml --model.path MODEL --model.teacher ORIGINAL
    accelerate launch examples/adapt.py --config examples/configs/adapt_2b-2b.yaml --training.learning_rate 1e-4

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from transformers import Seq2SeqTrainingArguments

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.checkpoints import find
from modeling_t5gemma.training.run import Settings, make_trainer, save_adapted
from modeling_t5gemma.training.settings import (
    DataSettings,
    DistillationSettings,
    ModelSettings,
    ObjectiveSettings,
    RecipeSettings,
)


def parser() -> ArgumentParser:
    """The command line: --config FILE and every key of every section."""
    made = ArgumentParser(
        description=__doc__,
        usage="adapt.py --config FILE [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    made.add_argument("--model", type=ModelSettings)
    made.add_argument("--data", type=DataSettings)
    made.add_argument(
        "--objective", type=ObjectiveSettings, default="prefix_lm", help="docs/training.md has the forms"
    )
    made.add_argument("--distillation", type=DistillationSettings, default=DistillationSettings())
    made.add_argument("--recipe", type=RecipeSettings, default=RecipeSettings())
    made.add_argument("--training", type=Seq2SeqTrainingArguments)
    made.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint")
    # The Trainer refuses bf16 on a CPU that it was not told of.
    made.set_defaults({"training.use_cpu": not torch.accelerator.is_available()})
    return made


def main() -> None:
    """Train; exit code 0 when the last step was done, 143 or 130 when a signal ended the run before it."""
    cli = parser()
    parsed = cli.parse_args()
    try:
        given = cli.instantiate(parsed)
    except (ValueError, ImportError) as error:
        raise UserError(f"The training settings don't fit: {error}") from error
    trainer = make_trainer(
        Settings(given.model, given.data, given.training, given.objective, given.distillation, given.recipe)
    )
    found = find(Path(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        for folder in found.incomplete:
            print(f"{folder} was cut short while it was written, and is left out.", file=sys.stderr)
        if given.resume == "auto" and found.last is not None:
            print(f"Going on from {found.last}.", file=sys.stderr)
    trainer.train(resume_from_checkpoint={"auto": True, "never": None}.get(given.resume, given.resume))
    if (received := trainer.signals.received) is not None:
        print(
            f"Stopped by {received.name} after step {trainer.state.global_step}. The same command goes on from there."
        )
        sys.exit(128 + received)
    save_adapted(trainer, given.model.path)


if __name__ == "__main__":
    run(main)
