"""Several checkpoints on a command line."""

from __future__ import annotations

from pathlib import Path

from modeling_t5gemma.errors import UserError


def labelled(checkpoints: list[str]) -> dict[str, str]:
    """The checkpoints by a short name: the last part of their path where that tells them apart.

    Raises:
        UserError: one is given twice.
    """
    names = [Path(path).name for path in checkpoints]
    labels = names if len(set(names)) == len(names) else checkpoints
    if len(set(labels)) < len(labels):
        raise UserError(f"A checkpoint is given twice: {', '.join(checkpoints)}. Give each once.")
    return dict(zip(labels, checkpoints))
