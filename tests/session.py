"""What all workers of one test session share: a folder, and what is made in it once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "T5GEMMA_TEST_SESSION"
BEGINS_HERE = _VARIABLE not in os.environ  # workers of pytest-xdist inherit it
if BEGINS_HERE:
    _folder = tempfile.TemporaryDirectory(prefix="t5gemma-tests-")  # removed when this process ends
    os.environ[_VARIABLE] = _folder.name
SESSION = Path(os.environ[_VARIABLE])


def made_once(recipe: str, make: Callable[[Path], object]) -> Path:
    """The folder that ``make(folder)`` has filled, by the first worker that asked for this recipe.

    The recipe says all that goes into it: equal ones name the same folder. Nobody may change what is in it.
    """
    folder = SESSION / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=SESSION))
            make(unfinished)
            unfinished.rename(folder)
    return folder
