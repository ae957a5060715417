"""The files of a repository, put together in a folder of small files and of links to the weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..conversion.convert import hub_code_files
from ..conversion.documents import RECORD_FILE
from ..io.safetensors_files import weight_files
from ..io.text_files import check_own, read_json
from ..objectives import SENTINELS_FILE
from .card import make_card
from .contents import carried, check_secrets
from .lineage import trace
from .papers import write_papers
from .recipe import read_recipe
from .results import read_results, write_eval_results
from .settings import Publication
from .validation import Validated, validate

# Written once, beside the converted checkpoint or the run's output; they hold for what was trained from it.
_INHERITED = (RECORD_FILE, SENTINELS_FILE)
# Where a checkpoint lay on somebody's disk, which tells others nothing.
_LOCAL_KEYS = ("_name_or_path", "_model_name_or_path")


@dataclass(frozen=True)
class Repository:
    """What is to be uploaded.

    Attributes:
        folder: with links to the large files.
        validated: what was proved of the checkpoint.
        card: ``README.md``.
    """

    folder: Path
    validated: Validated
    card: str

    def files(self) -> dict[str, int]:
        """The bytes of each file by its name."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in sorted(paths)}


@contextmanager
def prepared(given: Publication) -> Iterator[Repository]:
    """A repository's files, until the block ends.

    Raises:
        UserError: the checkpoint is not fit to be published, something has to accompany it and is not there, or its
            origin is not known.
    """
    checkpoint = given.checkpoint
    lineage = trace(given)  # before anything is loaded, which takes longer
    with tempfile.TemporaryDirectory(prefix="publish-") as name:
        folder = Path(name)
        terms = write_papers(folder, lineage, given.terms)
        recipes = [read_recipe(run, checkpoint) for run in lineage.runs]
        # Of several runs the last one's text is what the model was last measured on.
        results = [result for path in given.evaluations for result in read_results(path)]
        results += recipes[0].held_out if recipes else []
        write_eval_results(folder, results)
        others = carried(checkpoint)
        for path in (checkpoint / "config.json", *weight_files(checkpoint)):
            check_own(path)
        validated = validate(checkpoint)
        nearest = {path.name: path for name in _INHERITED for path in _in(reversed(lineage.folders), name)}
        card = make_card(given, validated, lineage, recipes, results, terms, has_record=RECORD_FILE in nearest)
        card.save(folder / "README.md")
        _write_config(folder, checkpoint, validated)
        for path in (*others, *nearest.values()):
            check_own(path)
            shutil.copyfile(path, folder / path.name)
        check_secrets(path for path in sorted(folder.rglob("*")) if path.is_file())
        for path in (*validated.weights, *(hub_code_files() if validated.needs_code else ())):
            (folder / path.name).symlink_to(path.resolve())
        yield Repository(folder, validated, str(card))


def _in(folders: Iterable[Path], name: str) -> list[Path]:
    return [folder / name for folder in folders if (folder / name).is_file()]


def _write_config(folder: Path, checkpoint: Path, validated: Validated) -> None:
    """The config without local paths; its ``auto_map`` names the code beside it, or is none."""
    config = read_json(checkpoint / "config.json")
    config.pop("auto_map", None)
    for part in (config, config["encoder"], config["decoder"]):
        for key in _LOCAL_KEYS:
            part.pop(key, None)
    if validated.needs_code:
        config["auto_map"] = validated.config.auto_map
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
