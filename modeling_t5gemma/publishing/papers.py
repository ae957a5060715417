"""What has to accompany a derivative of Gemma: the notice, a copy of the terms, and that the weights were changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ..conversion.family import Legal
from ..errors import UserError
from ..io.text_files import check_own, read_text
from .lineage import Lineage, read_notice

_LICENCES = ("LICENSE*", "LICENCE*")


def write_papers(folder: Path, lineage: Lineage, terms: Path | None) -> str | None:
    """Write ``NOTICE``, the terms and the licences into a folder.

    The Gemma terms, section 3.1: whoever distributes a derivative gives a copy of the terms and the notice, says that
    files were modified, and passes on the use restrictions (the card does).

    Args:
        terms: the user's copy of the terms; None for one that lies beside the checkpoint or what it came from.

    Returns:
        The name of the file with the terms; None if nothing asks for them.

    Raises:
        UserError: the terms are asked for and there is no copy.
    """
    for path in _found(lineage.folders, _LICENCES):
        check_own(path)
        read_text(path)  # no pickle, whatever it is called
        shutil.copyfile(path, folder / path.name)
    legal = lineage.legal
    if legal is None:
        return None
    copied = _terms(lineage, legal, terms)
    shutil.copyfile(copied, folder / legal.terms_file)
    (folder / "NOTICE").write_text("\n\n".join(_notice(lineage, legal)) + "\n", encoding="utf-8")
    return legal.terms_file


def _terms(lineage: Lineage, legal: Legal, given: Path | None) -> Path:
    found = _found(lineage.folders, ("*TERMS*",)) if given is None else [given]
    whole = [path for path in found if _is_whole(path, legal)]
    if whole:
        return whole[0]
    if given is not None:
        raise UserError(f"--terms {given} is no copy of the Gemma terms. Save those at {legal.terms_url} as text.")
    who = ", ".join(dict.fromkeys([*lineage.bases, *lineage.local, *lineage.teachers]))
    raise UserError(
        f"This is a derivative of Gemma ({who}), and there is no copy of the Gemma terms to pass on with it. Save "
        f"those at {legal.terms_url} as a text file and give --terms FILE."
    )


def _is_whole(path: Path, legal: Legal) -> bool:
    """Whether a file holds the terms, and not only where they are: the converter writes such a place-holder."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return "gemma terms of use" in text.lower() and "prohibited use" in text.lower()


def _notice(lineage: Lineage, legal: Legal) -> list[str]:
    origins = " and ".join(dict.fromkeys([*lineage.bases, *lineage.local]))
    paragraphs = [legal.notice]
    if origins:
        paragraphs.append(f"The weights in this folder were modified: they derive from {origins}.")
    if lineage.teachers:
        paragraphs.append(f"They were trained on the output of {' and '.join(lineage.teachers)}.")
    for path in _found(lineage.folders, ("NOTICE*",)):
        paragraphs += read_notice(path).strip().split("\n\n")
    return list(dict.fromkeys(paragraphs))


def _found(folders: Iterable[Path], patterns: Iterable[str]) -> list[Path]:
    """Files of these names, one for each name: the nearest folder's."""
    paths: dict[str, Path] = {}
    for folder in folders:
        for pattern in patterns:
            for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
                paths.setdefault(path.name, path)
    return list(paths.values())
