"""Adapt a converted encoder-decoder: PrefixLM with distillation, UL2, stages.

    python examples/adapt.py --config examples/configs/adapt_laptop.yaml --model.path MODEL --model.teacher ORIGINAL
    accelerate launch examples/adapt.py --config examples/configs/adapt_2b-2b.yaml --training.learning_rate 1e-4

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.training import script
from modeling_t5gemma.training.launch import train
from modeling_t5gemma.training.run import make_trainer, save_adapted
from modeling_t5gemma.training.settings import AdaptSettings


def settings_of(arguments: list[str] | None = None) -> tuple[AdaptSettings, str]:
    """The settings of a command line, and what to resume from."""
    return script.settings_of(AdaptSettings, __doc__, arguments)


def main() -> None:
    """Train; exit code 0 when the last step was done, 143 or 130 when a signal ended the run before it."""
    settings, resume = settings_of()
    trainer = make_trainer(settings)
    train(trainer, resume)
    save_adapted(trainer, settings.model.path)


if __name__ == "__main__":
    run(main)
