"""The command line: ``t5gemma COMMAND``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer

from modeling_t5gemma.commands.average import average_command
from modeling_t5gemma.commands.chat import chat
from modeling_t5gemma.commands.convert import convert_command
from modeling_t5gemma.commands.efficiency import efficiency
from modeling_t5gemma.commands.evaluate import evaluate
from modeling_t5gemma.commands.export import export_command
from modeling_t5gemma.commands.fill import fill
from modeling_t5gemma.commands.generate import generate
from modeling_t5gemma.commands.inspect import inspect
from modeling_t5gemma.commands.merge import merge
from modeling_t5gemma.commands.publish import publish
from modeling_t5gemma.commands.teacher_cache import teacher_cache
from modeling_t5gemma.commands.tokenize import tokenize
from modeling_t5gemma.commands.trim import trim_command
from modeling_t5gemma.commands.verify import verify
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.hub import limit_waits

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("convert")(convert_command(aliases_of="gemma2"))
app.command()(verify)
app.command()(inspect)
app.command()(tokenize)
app.command()(teacher_cache)
app.command("average")(average_command)
app.command()(merge)
app.command("trim")(trim_command)
app.command()(generate)
app.command()(chat)
app.command()(fill)
app.command()(efficiency)
app.command()(evaluate)
app.command("export")(export_command)
app.command()(publish)


@app.callback()
def commands() -> None:
    """Encoder-decoder models from pretrained decoder-only ones."""


def main() -> None:
    """Run ``t5gemma``: exit code 0, or 2 with one line on standard error for what the user can put right."""
    run(app)


def run_convert_script(aliases_of: str) -> None:
    """Run ``t5gemma convert`` alone, with the aliases of another family."""
    script = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    script.command()(convert_command(aliases_of))
    run(script)


def run(program: Callable[[], object]) -> None:
    """Run a program; an interruption or termination lets it clean up, and a ``UserError`` is told in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    limit_waits()
    try:
        program()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
