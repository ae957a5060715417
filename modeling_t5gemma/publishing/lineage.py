"""Where a checkpoint comes from, by the records that converter and trainers leave: bases, teachers, whose terms.

``conversion.json`` names the sources of a converted checkpoint, ``run.json`` the checkpoint that a run began as and
its teacher. A checkpoint of a run lies in the run's folder. From one record the way leads to the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conversion.documents import RECORD_FILE
from ..conversion.families import FAMILIES, family_of
from ..conversion.families.gemma import GEMMA_TERMS
from ..conversion.family import Legal
from ..errors import UserError
from ..io import hub
from ..io.text_files import read_json
from ..training.papers import local_path, run_of
from ..training.run_folder import RUN_FILE
from ..training.teacher_cache import INDEX as TEACHER_CACHE_INDEX
from .settings import Publication, is_repository


@dataclass
class Lineage:
    """What a checkpoint derives from.

    Attributes:
        bases: Hub repositories whose weights it goes back to.
        local: names of sources that were local files.
        teachers: Hub repositories or names of the models whose output it was trained on.
        legal: what has to accompany it; None if nothing.
        folders: local folders on the way, the checkpoint's own first: where papers may lie.
        runs: those of them that are of training runs, the latest first.
    """

    bases: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    legal: Legal | None = None
    folders: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)


def trace(given: Publication) -> Lineage:
    """Follow the records of a checkpoint.

    A student counts as its teacher's derivative: the Gemma terms define it so (section 1.1, "Model Derivatives").

    Raises:
        UserError: the records end before a model on the Hub, and the settings do not name one.
    """
    tracer = _Tracer()
    tracer.model(str(given.checkpoint))
    for run in given.runs:
        if not (run / RUN_FILE).is_file():
            raise UserError(f"--run {run} has no {RUN_FILE}. Give the output folder of a training run.")
        tracer.run(run)
    found = tracer.found
    for name in (*given.bases, *given.teachers):
        tracer.legal_by_name(name)
    if given.bases:
        found.bases = list(given.bases)
    elif given.from_scratch:
        if found.bases or found.local:
            raise UserError(
                f"{given.checkpoint} is not from scratch: its records name {', '.join(found.bases + found.local)}. "
                "Leave --from-scratch out."
            )
    elif tracer.lost or not found.bases:
        end = tracer.lost or found.local or [str(given.checkpoint)]
        raise UserError(
            f"The records of {given.checkpoint} end at {', '.join(dict.fromkeys(end))}, which is no Hub repository. "
            "Say what it derives from (--base OWNER/NAME, and --run FOLDER if a run trained it), or --from-scratch."
        )
    if given.teachers:
        found.teachers = list(given.teachers)
    elif tracer.lost_teachers:
        raise UserError(
            f"The teacher {', '.join(tracer.lost_teachers)} is no longer there, so nobody can tell whose terms hold. "
            "Name it: --teacher OWNER/NAME."
        )
    if found.legal is None and any(map(_is_licensed_as_gemma, filter(is_repository, found.bases + found.teachers))):
        found.legal = GEMMA_TERMS
    return found


def _is_licensed_as_gemma(repository: str) -> bool:
    """Whether the Hub has it under Gemma's licence, whatever its name; not where it cannot be asked."""
    try:
        return f"license:{GEMMA_TERMS.license}" in hub.tags(repository)
    except UserError:
        return False


def read_notice(path: Path) -> str:
    """The text of a notice.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} has to be passed on and cannot be read ({error}). Save it as UTF-8.") from error


class _Tracer:
    """Collects a lineage while it goes from record to record."""

    def __init__(self) -> None:
        self.found = Lineage()
        self.lost: list[str] = []
        self.lost_teachers: list[str] = []
        self._seen: set[Path] = set()

    def model(self, place: str) -> None:
        """Follow a model whose weights went into the checkpoint."""
        path = Path(place).expanduser()
        if not path.is_dir():
            if is_repository(place) and not path.exists():
                self._add(self.found.bases, place)
            else:
                self._add(self.lost, path.name)
            self.legal_by_name(path.name)
            return
        path = path.resolve()
        if path in self._seen:
            return
        self._seen.add(path)
        self._folder(path)
        run = run_of(path)
        if (path / RECORD_FILE).is_file():
            self._conversion(path / RECORD_FILE)
        if run is not None:
            self.run(run)
        elif not (path / RECORD_FILE).is_file():
            self._add(self.found.local if self._is_source(path) else self.lost, path.name)

    def run(self, folder: Path) -> None:
        """Follow what a run began as, and its teacher."""
        folder = folder.resolve()
        if folder in self.found.runs:
            return
        self.found.runs.append(folder)
        self._folder(folder)
        model = read_json(folder / RUN_FILE).get("model") or {}
        if isinstance(model, str):
            model = {"path": model}
        if place := model.get("path"):
            self.model(str(local_path(place, folder) or place))
        if place := model.get("teacher"):
            self._teacher(place, folder)
        if place := model.get("teacher_cache"):
            cache = local_path(place, folder)
            if cache is not None and (cache / TEACHER_CACHE_INDEX).is_file():
                self._teacher(read_json(cache / TEACHER_CACHE_INDEX)["teacher"], folder)
            else:
                self._add(self.lost_teachers, f"of the cache {place}")

    def legal_by_name(self, name: str) -> None:
        """Take the terms of a model that is known by its name alone: who calls it Gemma is asked for Gemma's."""
        if re.search("gemma", name, re.IGNORECASE):
            self.found.legal = GEMMA_TERMS

    def _teacher(self, place: str, run: Path) -> None:
        path = local_path(place, run)
        if path is None:
            self._add(self.found.teachers if is_repository(place) else self.lost_teachers, place)
            self.legal_by_name(place)
            return
        self.legal_by_name(path.name)
        if path.is_dir() and self._is_source(path):
            self._folder(path.resolve())
        self._add(self.found.teachers, path.name)

    def _conversion(self, path: Path) -> None:
        record = read_json(path)
        for side in ("encoder", "decoder"):
            stack = record.get(side)
            if not isinstance(stack, dict) or not {"source", "family"} <= stack.keys():
                raise UserError(
                    f"{path} does not say what the {side} was converted from. Put back the file that t5gemma convert "
                    "wrote, or remove it and give --base OWNER/NAME."
                )
            name, family = stack["source"], FAMILIES.get(stack["family"])
            self._add(self.found.bases if is_repository(name) else self.found.local, name)
            if family is not None and family.legal is not None:
                self.found.legal = family.legal
            self.legal_by_name(name)

    def _is_source(self, path: Path) -> bool:
        """Whether a folder holds a decoder-only model of a known family, whose terms are taken."""
        if not (path / "config.json").is_file():
            return False
        family = family_of(read_json(path / "config.json"))
        if family is not None:
            self.found.legal = family.legal or self.found.legal
        return family is not None

    def _folder(self, path: Path) -> None:
        self._add(self.found.folders, path)
        for notice in path.glob("NOTICE*"):
            if notice.is_file() and GEMMA_TERMS.notice in read_notice(notice):
                self.found.legal = GEMMA_TERMS

    @staticmethod
    def _add(names: list[Any], name: Any) -> None:
        if name not in names:
            names.append(name)
