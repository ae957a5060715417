"""Text files, whoever wrote them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

# The largest of a checkpoint's text files are its tokenizer's: Gemma 3's has 33 MB.
_LARGEST = 256 << 20
DEEPEST = 64
_AGAIN = "Download it again."


def decode(content: bytes) -> str:
    """UTF-8 without its byte order mark; lines end in \\n, whatever system wrote them.

    Raises:
        UnicodeDecodeError: it is something else.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def read_text(path: Path, remedy: str = _AGAIN) -> str:
    """The text of a regular file, as of ``decode``.

    Args:
        remedy: what to do about a file that is none, for the message.

    Raises:
        UserError: it is missing, no regular file (nothing is read of a pipe or a device), too large, or not UTF-8.
    """
    check_regular(path, remedy)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST >> 20} MB, which is no such file. {remedy}")
        return decode(content)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}). {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as ``read_text``, or it does not hold a JSON object, or one that is nested too deeply.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a character, which cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object. Download it again.")
    if not is_shallow(value):
        raise UserError(f"{path} is nested deeper than {DEEPEST} levels, which is no such file. Download it again.")
    return value


def check_regular(path: Path, remedy: str = _AGAIN) -> None:
    """Make sure that a path leads to a regular file.

    Args:
        remedy: as of ``read_text``.

    Raises:
        UserError: it is missing, a folder, a pipe or a device, or its name is none.
    """
    if os.path.isfile(path):  # False too where Path.is_file() raises: names too long, loops of links
        return
    if os.path.lexists(path):
        raise UserError(f"{path} is no regular file. {remedy}")
    remedy = "Give a folder that holds a whole checkpoint." if remedy == _AGAIN else remedy
    raise UserError(f"{path} is missing. {remedy}")


def check_own(path: Path) -> None:
    """Make sure that a file is its folder's own, to be passed on with it: a link may lead to anything of the user's.

    Raises:
        UserError: it is no regular file, or a link; those by which the Hub's cache keeps the files of a repository
            once are none.
    """
    check_regular(path)
    if path.is_symlink() and path.resolve().parent != path.parent.resolve().parents[1] / "blobs":
        raise UserError(f"{path} is a link, which is not followed here. Put the file itself in its place.")


def is_shallow(value: Any, levels: int = DEEPEST) -> bool:
    """Whether lists and dicts are nested at most so deep."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(is_shallow(each, levels - 1) for each in inner)
