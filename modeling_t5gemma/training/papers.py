"""What goes with weights wherever they go: terms and notices, code of a model type of our own, a run's settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from .run_folder import RUN_FILE

# What a checkpoint says about its licence.
LEGAL = ("NOTICE*", "LICENSE*", "*TERMS*")
# And the code that one of our own model type carries.
PAPERS = (*LEGAL, "*.py")


def copy_papers(checkpoint: str, output: Path) -> None:
    """Copy terms and notices, and code, of a checkpoint that is a local folder."""
    for path in _papers(Path(checkpoint)):
        shutil.copyfile(path, output / path.name)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a folder is the output or a checkpoint of."""
    for folder in (checkpoint, checkpoint.parent) if checkpoint.name.startswith("checkpoint-") else (checkpoint,):
        if (folder / RUN_FILE).is_file():
            return folder
    return None


def local_path(name: str, run: Path) -> Path | None:
    """Where something lies that a run names, None if it is nowhere here: from the current folder or from one that the
    run lies in, since ``run.json`` has paths as they were typed."""
    places = (home / Path(name).expanduser() for home in (Path(), *run.resolve().parents))
    return next((place for place in places if place.exists()), None)


def papers_of_run(checkpoint: Path) -> list[Path]:
    """What has to accompany weights made of a run's checkpoint: the run's settings, which tell where it comes from,
    and the papers of the run or of the local checkpoint that it began as. Nothing where there was no run."""
    run = run_of(checkpoint)
    if run is None:
        return []
    return [run / RUN_FILE, *(_papers(run) or _papers(_begun(run)))]


def legal_papers(checkpoint: Path) -> list[Path]:
    """Terms and notices that hold for a checkpoint's weights: those beside it, or else beside its run, or else beside
    the local checkpoint that the run began as."""
    run = run_of(checkpoint)
    places = [checkpoint] if run is None else [checkpoint, run, _begun(run)]
    return next((found for place in places if (found := _papers(place, LEGAL))), [])


def _begun(run: Path) -> Path:
    place = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["model"]["path"]
    return local_path(place, run) or Path(place)


def _papers(folder: Path, patterns: Sequence[str] = PAPERS) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
