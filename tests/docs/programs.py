"""The programs that the documentation names, as far as their command lines: found, parsed, not run.

A script is executed until it asks for its arguments. What it would have parsed them with is kept.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from functools import cache
from typing import Any

import jsonargparse
import pytest
import typer

from modeling_t5gemma import cli
from tests.docs.pages import ROOT


class _Asked(BaseException):
    """A program asks for its arguments."""

    def __init__(self, parser: Any) -> None:
        self.parser = parser


def _ask(parser: Any, *args: Any, **kwargs: Any) -> None:
    raise _Asked(parser)


@cache
def parser_of(script: str) -> Any:
    """The parser of a script: argparse's, jsonargparse's or a typer command."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path)])
        patch.syspath_prepend(str(path.parent))
        patch.setattr(cli, "run", lambda program: program())  # the real one takes over signals
        patch.setattr(typer.core.TyperCommand, "main", _ask)
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(kind, "parse_args", _ask)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Asked as asked:
            return asked.parser
    raise AssertionError(f"{script} takes no arguments")


@cache
def subcommands() -> dict[str, Any]:
    """The commands of ``t5gemma`` by name."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def options_of(parser: Any) -> set[str]:
    if isinstance(parser, argparse.ArgumentParser):
        return set(parser._option_string_actions)
    return {name for parameter in parser.params for name in (*parameter.opts, *parameter.secondary_opts)}


def parse(words: tuple[str, ...]) -> None:
    """Parse a command line as its program would.

    Raises:
        SystemExit: the program refuses it; what it says is on standard error.
    """
    program, *rest = words
    if program == "t5gemma":
        name, *rest = rest
        assert name in subcommands(), f"t5gemma has no command {name}"
        parser = subcommands()[name]
    else:
        parser = parser_of(program)
    if isinstance(parser, argparse.ArgumentParser):
        parser.parse_args(rest)
        return
    try:
        parser.make_context(program, rest)
    except Exception as error:  # of click, or of typer's copy of it
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        print(said, file=sys.stderr)
        raise SystemExit(2) from error
