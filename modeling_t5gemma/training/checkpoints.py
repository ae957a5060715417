"""Checkpoints of a run that are complete or don't count.

The Trainer writes a checkpoint file by file. A last file says that the others are on the disk: what lacks it was cut
short by a kill or a full disk, and is neither resumed from nor counted among those to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

COMPLETE_FILE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """The checkpoints in a folder.

    Attributes:
        last: the complete one of the latest step, or None.
        incomplete: those that were cut short.
    """

    last: Path | None
    incomplete: list[Path]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after.

    Raises:
        UserError: it has another name.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint} is not named checkpoint-STEP, as the checkpoints of a run are: name it so.")
    return int(match[1])


def find(output: Path) -> Found:
    """Look through a run's folder, which need not exist."""
    whole = complete_checkpoints(output)
    folders = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return Found(whole[-1] if whole else None, sorted(set(folders) - set(whole), key=step_of))


def complete_checkpoints(output: Path) -> list[Path]:
    """Those of a run's folder, the latest last."""
    folders = (path.parent for path in output.glob(f"checkpoint-*/{COMPLETE_FILE}"))
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=step_of)


def complete(checkpoint: Path, state: dict[str, Any]) -> None:
    """Declare a checkpoint complete, after everything in it has reached the disk.

    Args:
        state: what the run has to know to go on, for ``read_state``.
    """
    for path in checkpoint.rglob("*"):
        if path.is_file():
            _sync(path)
    partial = checkpoint / (COMPLETE_FILE + ".partial")
    partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    _sync(partial)
    partial.rename(checkpoint / COMPLETE_FILE)
    _sync(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``complete`` was given.

    Raises:
        UserError: this is no complete checkpoint.
    """
    path = checkpoint / COMPLETE_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} has no {COMPLETE_FILE}: it was cut short while it was written, or is no checkpoint of this "
            "trainer. Resume from another one."
        )
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def keep_last(output: Path, count: int | None) -> None:
    """Delete all complete checkpoints but the latest ``count`` (None: keep all).

    A checkpoint stops being complete before the first of its files goes, so that a kill leaves none that looks whole.
    """
    folders = complete_checkpoints(output)
    for folder in folders[: max(0, len(folders) - count)] if count is not None else []:
        (folder / COMPLETE_FILE).unlink()
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
