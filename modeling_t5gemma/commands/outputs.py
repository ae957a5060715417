"""Where the results of a command go: folders, and tables on standard output."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.staging import place_of

_PIPED_WIDTH = 160


def make_folder(option: str, given: Path) -> Path:
    """Make a folder for results and try to write there: before the work, which may take hours.

    Args:
        option: that it was given with, for messages.

    Returns:
        Where it is, ``~`` followed.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    folder = place_of(given, option)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file. Give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written ({error.strerror}). Give another folder.") from error
    return folder


def wide_console() -> Console:
    """Standard output; into a file or a pipe with more than 80 columns, which would cut numbers off."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_WIDTH)
    return console
