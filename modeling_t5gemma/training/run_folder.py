"""An output folder belongs to one run: one process at a time, and the settings it was begun with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import UserError
from .checkpoints import complete_checkpoints

RUN_FILE = "run.json"
# What may differ between two parts of one run: where it runs and what it reports, not what it computes.
_FREE = ("logging", "report", "save", "eval", "disable_tqdm", "run_name", "dataloader", "push", "hub", "local_rank",
         "output_dir", "ddp", "fsdp", "deepspeed", "accelerator", "torch_compile", "project", "trackio",
         "per_device", "gradient_accumulation", "do_", "use_cpu")  # fmt: skip

# Keys of settings, at any depth, whose values are left out of what is written.
_SECRET = re.compile(
    r"(^|_)(api_?key|password|secret|credentials?|(hub|hf|auth|access|bearer|api)_?token)$", re.IGNORECASE
)
_HELD: dict[Path, int] = {}


def describe(settings: Any, free: Collection[str] = ("data.workers",)) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON, without secrets.

    Args:
        settings: a dataclass of sections.
        free: sections and "section.key" that decide nothing.
    """
    sections = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in free}
    told = {name: _plain(section) for name, section in sections.items()}
    for place in free:
        section, _, key = place.partition(".")
        if key and told.get(section):
            told[section].pop(key)
    made: dict[str, Any] = _without_secrets(json.loads(json.dumps(told, default=str)))
    return made


def hold(output: Path) -> None:
    """Keep other processes from running in a folder, which is made, until this one ends.

    Raises:
        UserError: another one runs there, or it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"training.output_dir {output} cannot be made: {error.strerror}.") from error
    place = output.resolve()
    if place in _HELD:  # an earlier run of this process, which is over
        os.close(_HELD.pop(place))
    _HELD[place] = descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            return  # a file system without locks
        raise UserError(
            f"Another run is at work in {output}. Wait until it has ended, or give training.output_dir another folder."
        ) from error


def claim(output: Path, wanted: dict[str, Any], writes: bool) -> None:
    """Mark a folder as this run's, and keep others out while it lasts.

    Args:
        wanted: from ``describe``.
        writes: whether this process writes the mark.

    Raises:
        UserError: another run is at work there, it holds checkpoints of a run with other settings, is what the run
            begins as, or cannot be made.
    """
    keep_apart(output, wanted["model"]["path"])
    if writes:
        hold(output)
    path = output / RUN_FILE
    if path.exists() and complete_checkpoints(output) and (changed := _changed(read_run(output), wanted)):
        raise UserError(
            f"{output} holds a run with another {', '.join(changed)}. Give training.output_dir another folder, or "
            "remove this one to begin anew."
        )
    if writes:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def read_run(output: Path) -> dict[str, Any]:
    """What ``claim`` has written.

    Raises:
        UserError: it is damaged.
    """
    path = output / RUN_FILE
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise UserError(
            f"{path} is damaged: it should have the settings of the run whose checkpoints lie beside it. Remove it to "
            "take them for this run's, or give training.output_dir another folder."
        )
    return held


def keep_apart(output: Path, begun: str) -> None:
    """Refuse to write where the checkpoint stands that a run begins as.

    Raises:
        UserError: it is the same folder.
    """
    if output.resolve() == Path(begun).resolve():
        raise UserError(
            f"training.output_dir is {output}, which the run begins as and would overwrite. Give it another folder."
        )


def _plain(section: Any) -> Any:
    if isinstance(section, TrainingArguments):
        return {name: value for name, value in section.to_dict().items() if not name.startswith(_FREE)}
    return asdict(section) if is_dataclass(section) and not isinstance(section, type) else section


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(each) for each in value]
    if isinstance(value, dict):
        return {key: "(left out)" if _SECRET.search(key) else _without_secrets(each) for key, each in value.items()}
    return value


def _changed(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    changed = []
    for section, values in wanted.items():
        before = held.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            changed += [f"{section}.{key}" for key in values if values[key] != before.get(key, values[key])]
        elif values != before:
            changed.append(section)
    return changed
