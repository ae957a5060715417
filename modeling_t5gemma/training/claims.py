"""An output folder belongs to one run: the settings it was begun with."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import UserError
from .checkpoints import find

RUN_FILE = "run.json"
# What may differ between two parts of one run: where it runs and what it reports, not what it computes.
_FREE = ("logging", "report", "save", "eval", "disable_tqdm", "run_name", "dataloader", "push", "hub", "local_rank",
         "output_dir", "ddp", "fsdp", "deepspeed", "accelerator", "torch_compile", "project", "trackio",
         "per_device", "gradient_accumulation", "do_", "use_cpu")  # fmt: skip


def describe(settings: Any, free: Collection[str] = ("data.workers",)) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON.

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
    made: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return made


def claim(output: Path, wanted: dict[str, Any], writes: bool) -> None:
    """Mark a folder as this run's.

    Args:
        wanted: from ``describe``.
        writes: whether this process writes the mark.

    Raises:
        UserError: it holds checkpoints of a run with other settings, is what the run begins as, or cannot be made.
    """
    keep_apart(output, wanted["model"]["path"])
    path = output / RUN_FILE
    if path.exists() and find(output).last is not None:
        held = json.loads(path.read_text(encoding="utf-8"))
        if changed := _changed(held, wanted):
            raise UserError(
                f"{output} holds a run with another {', '.join(changed)}. Give training.output_dir another folder, or "
                "remove this one to begin anew."
            )
    if writes:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"training.output_dir {output} cannot be made: {error.strerror}.") from error
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


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
        return {
            name: value
            for name, value in section.to_dict().items()
            if not name.startswith(_FREE) and not name.endswith("_token")
        }
    return asdict(section) if is_dataclass(section) and not isinstance(section, type) else section


def _changed(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    changed = []
    for section, values in wanted.items():
        before = held.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            changed += [f"{section}.{key}" for key in values if values[key] != before.get(key, values[key])]
        elif values != before:
            changed.append(section)
    return changed
