"""The command line of a training script: --config FILE, and every key of every section of its settings."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from jsonargparse import ArgumentParser
from transformers import Seq2SeqTrainingArguments

from ..errors import UserError
from .checks import check_yaml

S = TypeVar("S")


def parser(settings: type, description: str) -> ArgumentParser:
    """A parser with a section for each field of a dataclass, and --resume.

    Args:
        description: the script's docstring.
    """
    made = ArgumentParser(
        description=description,
        usage=f"{Path(sys.argv[0]).name} --config FILE [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    hints = get_type_hints(settings, localns={"TrainingArguments": Seq2SeqTrainingArguments})
    for section in dataclasses.fields(settings):
        options: dict[str, Any] = {"type": hints[section.name], **section.metadata}
        if section.default_factory is not dataclasses.MISSING:
            options["default"] = section.default_factory()
        elif section.default is not dataclasses.MISSING:
            options["default"] = section.default
        made.add_argument(f"--{section.name}", **options)
    made.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint")
    made.set_defaults(on_this_machine())
    return made


def on_this_machine() -> dict[str, Any]:
    """Defaults of transformers' training arguments: the Trainer refuses bf16 on a CPU that it was not told of."""
    return {"training.use_cpu": not torch.accelerator.is_available()}


def settings_of(settings: type[S], description: str, arguments: list[str] | None = None) -> tuple[S, str]:
    """The settings of a command line, and what to resume from.

    Args:
        arguments: instead of those of the process.

    Raises:
        UserError: the training settings don't fit each other.
    """
    given = instantiate(parser(settings, description), arguments)
    sections = {section.name: getattr(given, section.name) for section in dataclasses.fields(settings)}  # type: ignore[arg-type]
    return settings(**sections), given.resume


def instantiate(cli: ArgumentParser, arguments: list[str] | None = None) -> Any:
    """Parse, and make the objects of the sections.

    Raises:
        UserError: transformers refuses the training settings.
    """
    for file in _configs(sys.argv[1:] if arguments is None else arguments):
        check_yaml(file)
    parsed = cli.parse_args(arguments)
    try:
        return cli.instantiate(parsed)
    except (ValueError, ImportError) as error:
        raise UserError(f"The training settings don't fit: {error}") from error


def _configs(arguments: list[str]) -> list[Path]:
    """The files that a command line names with --config."""
    joined = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    apart = [after for word, after in itertools.pairwise(arguments) if word == "--config"]
    return [path for name in joined + apart if (path := Path(name)).is_file()]
