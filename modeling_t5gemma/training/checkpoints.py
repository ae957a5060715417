"""Checkpoints of a run that are whole or don't count.

The Trainer writes a checkpoint file by file. A last file says that the others are on the disk, and what they were:
what lacks it was cut short by a kill or a full disk, and what no longer is as it says was damaged since. Neither is
resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError

COMPLETE_FILE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_HASHED = 2**26  # bytes up to which a file's content is compared, not its size and tensors alone


class Damaged(UserError):
    """A checkpoint is not as it was saved."""


@dataclass(frozen=True)
class Found:
    """The checkpoints in a folder.

    Attributes:
        last: the whole one of the latest step, or None.
        cut_short: those that were never finished, or that are partly removed.
        damaged: those of later steps than ``last`` that are not as they were saved, and why.
    """

    last: Path | None
    cut_short: list[Path]
    damaged: dict[Path, str]


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
    folders = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    complete = complete_checkpoints(output)
    cut_short = sorted(set(folders) - set(complete), key=step_of)
    damaged = {}
    for checkpoint in reversed(complete):
        try:
            read_state(checkpoint)
        except Damaged as error:
            damaged[checkpoint] = str(error)
        else:
            return Found(checkpoint, cut_short, damaged)
    return Found(None, cut_short, damaged)


def complete_checkpoints(output: Path) -> list[Path]:
    """Those of a run's folder that were finished, the latest last."""
    folders = (path.parent for path in output.glob(f"checkpoint-*/{COMPLETE_FILE}"))
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=step_of)


def complete(checkpoint: Path, state: dict[str, Any]) -> None:
    """Declare a checkpoint complete, after everything in it has reached the disk.

    Args:
        state: what the run has to know to go on, for ``read_state``.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    record = {**state, "files": {str(path.relative_to(checkpoint)): _facts(path) for path in files}}
    partial = checkpoint / (COMPLETE_FILE + ".partial")
    partial.write_text(json.dumps({**record, "digest": _digest(record)}) + "\n", encoding="utf-8")
    _sync(partial)
    partial.rename(checkpoint / COMPLETE_FILE)
    _sync(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``complete`` was given, of a checkpoint whose files still are those.

    Raises:
        Damaged: they are not.
        UserError: this is no complete checkpoint.
    """
    path = checkpoint / COMPLETE_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} has no {COMPLETE_FILE}: it was cut short while it was written, or is no checkpoint of this "
            "trainer. Resume from another one."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record.pop("digest") == _digest(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{checkpoint} is damaged: its {COMPLETE_FILE} is not as it was written.")
    for name, before in record.pop("files").items():
        if what := _damage(checkpoint / name, before):
            raise Damaged(f"{checkpoint} is damaged: {name} {what}.")
    state: dict[str, Any] = record
    return state


def tidy(found: Found) -> list[str]:
    """Put out of a run's way what it cannot go on from. Returns what was done, in lines for people."""
    lines = []
    for folder in found.cut_short:
        shutil.rmtree(folder)
        lines.append(f"{folder} was cut short while it was written or removed, and is removed.")
    for folder, why in found.damaged.items():
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        lines.append(f"{why} It is set aside as {aside.name}.")
    return lines


def keep_last(output: Path, count: int | None) -> None:
    """Delete all complete checkpoints but the latest ``count`` (None: keep all).

    A checkpoint stops being complete before the first of its files goes, so that a kill leaves none that looks whole.
    """
    folders = complete_checkpoints(output)
    for folder in folders[: max(0, len(folders) - count)] if count is not None else []:
        (folder / COMPLETE_FILE).unlink()
        shutil.rmtree(folder)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    """What a file is known by, as JSON: its size, its tensors, and the content of one that is quickly read."""
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            facts["tensors"] = {name: [own.get_dtype(), *own.get_shape()] for name, own in slices.items()}
    if facts["bytes"] <= _HASHED:
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def _damage(path: Path, before: dict[str, Any]) -> str | None:
    """What has become of a file since, None for nothing."""
    if not path.is_file():
        return "is missing"
    try:
        now = _facts(path)
    except SafetensorError as error:
        return f"cannot be read ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if now["bytes"] != before["bytes"]:
        return f"has {now['bytes']} bytes in place of {before['bytes']}"
    return None if now == before else "has another content"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
