"""What every training script does with its trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from .checkpoints import find
from .resumable import ResumableTrainer


def train(trainer: ResumableTrainer, resume: str) -> None:
    """Train to the last step, or until a signal: then the process ends with exit code 128 + its number.

    Args:
        resume: "auto" goes on from the last complete checkpoint, "never" begins anew, else a checkpoint's folder.
    """
    found = find(Path(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        for folder in found.incomplete:
            print(f"{folder} was cut short while it was written, and is left out.", file=sys.stderr)
        if resume == "auto" and found.last is not None:
            print(f"Going on from {found.last}.", file=sys.stderr)
    trainer.train(resume_from_checkpoint={"auto": True, "never": None}.get(resume, resume))
    if (received := trainer.signals.received) is not None:
        print(
            f"Stopped by {received.name} after step {trainer.state.global_step}. The same command goes on from there."
        )
        sys.exit(128 + received)
