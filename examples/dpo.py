"""Train on preferences (DPO, IPO): all weights or LoRA.

    python examples/dpo.py --config examples/configs/dpo_laptop.yaml --model.path MODEL --data.train.path FILE
    accelerate launch examples/dpo.py --config examples/configs/dpo_2b-2b.yaml --dpo.beta 0.05

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.post_training.preference_run import make_dpo_trainer
from modeling_t5gemma.post_training.settings import DpoRun
from modeling_t5gemma.training import script
from modeling_t5gemma.training.launch import train
from modeling_t5gemma.training.run import save_adapted


def settings_of(arguments: list[str] | None = None) -> tuple[DpoRun, str]:
    """The settings of a command line, and what to resume from."""
    return script.settings_of(DpoRun, __doc__, arguments)


def main() -> None:
    """Train; exit code 0 when the last step was done, 143 or 130 when a signal ended the run before it."""
    settings, resume = settings_of()
    trainer = make_dpo_trainer(settings)
    train(trainer, resume)
    save_adapted(trainer, settings.model.path)


if __name__ == "__main__":
    run(main)
