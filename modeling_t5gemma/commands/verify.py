"""``t5gemma verify``: the measured differences as a table."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from modeling_t5gemma.conversion.verification import ALLOWED_FLOORS, Check, Verification, measure


def verify(
    source: Annotated[str, typer.Argument(help="What was converted: alias, Hub repository, folder or .gguf file.")],
    converted: Annotated[str, typer.Argument(help="The folder that it was converted to.")],
) -> None:
    """Prove with numbers that a converted checkpoint computes what its source does. Exit code 1 if it does not."""
    logging.disable_progress_bar()
    verification = measure(source, converted)
    Console().print(verification_table(verification))
    if not verification.passed:
        raise typer.Exit(1)


def verification_table(verification: Verification) -> Table:
    """A row for every check: largest absolute difference, noise floor, verdict."""
    table = Table(
        title="Converted checkpoint against its source",
        caption="noise: how far the source's own output moves when its embeddings change by one rounding error; "
        f"{ALLOWED_FLOORS} times that is allowed",
        box=SIMPLE,
    )
    table.add_column("check", no_wrap=True)
    table.add_column("tokens")
    for heading in ("difference", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for check in verification.checks:
        table.add_row(check.name, check.note, *_numbers(check), _verdict(check))
    return table


def _numbers(check: Check) -> tuple[str, str]:
    return ("", "") if check.difference is None else (f"{check.difference:.1e}", f"{check.floor:.1e}")


def _verdict(check: Check) -> str:
    if check.skipped:
        return "skipped"
    return "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
