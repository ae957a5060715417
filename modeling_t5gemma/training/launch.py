"""What every training script does with its trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UserError
from .checkpoints import find, read_state, step_of
from .resumable import Diverged, ResumableTrainer


def train(trainer: ResumableTrainer, resume: str) -> None:
    """Train to the last step, or until a signal: then the process ends with exit code 128 + its number.

    Args:
        resume: "auto" goes on from the last complete checkpoint, "never" begins anew, else a checkpoint's folder.

    Raises:
        UserError: the output folder has checkpoints that lie behind where this would begin; or as ``trainer.train``.
    """
    output = Path(trainer.args.output_dir)
    found = find(output)
    begins = None if resume == "auto" else 0 if resume == "never" else _step_of(Path(resume))
    if begins is not None and found.last is not None and begins < step_of(found.last):
        # Those behind it would be taken for this run's: for its last, and for those to keep.
        raise UserError(
            f"{output} has checkpoints up to {found.last.name}, and --resume {resume} begins before it. Leave "
            "--resume out to go on from there, give training.output_dir another folder, or remove the later "
            "checkpoints."
        )
    if trainer.is_world_process_zero() and resume == "auto" and found.last is not None:
        print(f"Going on from {found.last}.", file=sys.stderr)
    try:
        trainer.train(resume_from_checkpoint={"auto": True, "never": None}.get(resume, resume))
    except Diverged as error:
        if (last := find(output).last) is None:
            raise
        raise UserError(
            f"{error} To go on from that checkpoint with other settings: --resume {last}, with another "
            "training.output_dir."
        ) from error
    if (received := trainer.signals.received) is not None:
        same = "The same command" + ("" if resume == "auto" else " without --resume")
        print(f"Stopped by {received.name} after step {trainer.state.global_step}. {same} goes on from there.")
        sys.exit(128 + received)


def _step_of(checkpoint: Path) -> int:
    read_state(checkpoint)
    return step_of(checkpoint)
