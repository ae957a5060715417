"""A folder that appears whole or not at all.

The checkpoint is written into a hidden sibling of the output and gets its name in one rename, after everything is on
the disk. A process that is killed leaves only that sibling, which the next conversion to the same output removes: a
live one holds a lock on its folder, a dead one cannot.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling_t5gemma.errors import UserError

_PARTIAL, _REPLACED = ".partial", ".replaced"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_SAID = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing file")
_NOT_HERE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(output: Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``output`` when the block ends well and vanishes when it does not.

    Args:
        overwrite: replace a checkpoint that is at ``output``; the two change places in one step.
        needed: bytes that will be written, to refuse a disk that is too small before the first one.

    Raises:
        UserError: ``output`` exists (or with ``overwrite`` is no checkpoint), the disk is full, or the place cannot be
            written to.
    """
    output = place_of(output)
    check_output(output, overwrite=overwrite)
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(output)
            _check_room(output, needed)
            folder, lock = _make_partial(output)
        except OSError as error:
            raise UserError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from error
        try:
            yield folder
            _flush(folder)
            _publish(folder, output, overwrite=overwrite)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except BaseException as error:
        for parent in missing:  # deepest first; one that is not empty stays
            try:
                parent.rmdir()
            except OSError:
                break
        if is_full(error):
            raise UserError(
                f"No room left for {output}: {_gigabytes(needed)} are needed. Free space or choose another --output."
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_HERE:
            raise UserError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from error
        raise


def place_of(given: Path, option: str = "--output") -> Path:
    """Where a path leads that a user gave for a result: ``~`` and links followed; nothing need be there yet.

    Raises:
        UserError: nothing can be there: the name is too long or not in this system's encoding, its links go round,
            there is no such user.
    """
    shown = os.fsencode(given).decode(errors="replace")
    try:
        str(given).encode()  # or it could not be printed or written into a record when the work is done
        place = given.expanduser().resolve()
        os.path.lexists(place)
        place.exists()
    except UnicodeEncodeError as error:
        raise UserError(f"{option} {shown} is not in this system's encoding. Choose another name.") from error
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {shown} can be no file or folder ({why}). Choose another.") from error
    return place


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full: safetensors and torch have kinds of their own for it."""
    no_room = isinstance(error, OSError) and error.errno in _NO_ROOM
    return no_room or any(words in str(error) for words in _NO_ROOM_SAID)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is in the way.

    Raises:
        UserError: it exists and is not to be replaced, or is not a checkpoint and so may hold anything.
    """
    if not place_of(output).exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists. Choose another --output, or give --overwrite to replace it.")
    if not (place_of(output) / "config.json").is_file():
        raise UserError(f"{output} is not a checkpoint, so --overwrite leaves it alone. Remove it yourself.")


def check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Refuse an output whose replacement would take what it is made of with it.

    Args:
        sources: paths; one that is not here, as a repository on the Hub, cannot be lost.

    Raises:
        UserError: it is one of the sources, or holds it.
    """
    output = place_of(output)
    for source in sources:
        found = source.expanduser().resolve()
        if found.exists() and (output == found or output in found.parents):
            raise UserError(f"--output {output} is or holds {source}, which would be lost. Choose another.")


def remove_leftovers(output: Path) -> None:
    """Remove what killed conversions to ``output`` left, and put a checkpoint back that was being replaced."""
    for sibling in output.parent.glob(f".{_escaped(output.name)}.*"):
        if sibling.suffix == _REPLACED and not output.exists():
            sibling.rename(output)
        elif sibling.suffix in (_PARTIAL, _REPLACED) and not _is_locked(sibling):
            shutil.rmtree(sibling, ignore_errors=True)


def _make_partial(output: Path) -> tuple[Path, int]:
    folder = output.parent / f".{output.name}.{secrets.token_hex(4)}{_PARTIAL}"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    # On a file system without locks the folder counts as alive for ever, and no other run removes it.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, lock


def _is_locked(folder: Path) -> bool:
    """Whether a live process holds the folder; where nobody can tell, yes."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            f"No room for {output}: {_gigabytes(needed)} are needed and {_gigabytes(free)} are free. Free space or "
            "choose another --output."
        )


def _flush(folder: Path) -> None:
    """Have every file and the folder itself on the disk: a rename may reach it before what it renames."""
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(folder: Path, output: Path, *, overwrite: bool) -> None:
    check_output(output, overwrite=overwrite)
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        # Two steps where the file system cannot do it in one. A kill between them leaves both checkpoints under hidden
        # names, and remove_leftovers puts the old one back.
        replaced = folder.with_suffix(_REPLACED)
        output.rename(replaced)
        folder.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
