"""What is to be published, and what only the user can say about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # looked up when it is imported

from ..errors import UserError
from ..training.papers import local_path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What a run's paths may end in and no repository does.
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".gguf", ".safetensors")
# ISO 639-1 to 639-3, and the Hub's two words for what is no language.
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")


@dataclass(frozen=True)
class Publication:
    """Settings of ``t5gemma publish``.

    Attributes:
        checkpoint: an encoder-decoder's folder.
        repository: OWNER/NAME on the Hub.
        runs: folders of the runs that trained it, beyond the one that it lies in.
        bases: Hub repositories that its weights derive from, instead of those that its records name.
        teachers: models whose output it was trained on, instead of those that the runs name.
        from_scratch: it derives from no other model.
        terms: a copy of the terms that a derivative has to carry.
        license: the Hub's identifier; left out, what the terms ask for.
        languages, datasets: for the card's metadata, the second beside those that the runs name.
        evaluations: files of results, see ``results.read_results``.
        hardware: what it was trained on, for the card.
        public: whether everybody sees the repository.
    """

    checkpoint: Path
    repository: str
    runs: tuple[Path, ...] = ()
    bases: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    from_scratch: bool = False
    terms: Path | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    evaluations: tuple[Path, ...] = ()
    hardware: str | None = None
    public: bool = False

    def __post_init__(self) -> None:
        if not self.checkpoint.is_dir():
            raise UserError(f"{self.checkpoint} is no folder. Give a checkpoint's (hf download fetches one).")
        for option, names in (("The repository", (self.repository,)), ("--base", self.bases)):
            for name in names:
                check_repository(option, name)
        for dataset in self.datasets:
            if not _is_allowed(dataset):  # some data sets have no owner
                raise UserError(f"--dataset {dataset!r} is not the name of a data set of the Hub. Give OWNER/NAME.")
        if not all(teacher.strip() for teacher in self.teachers):
            raise UserError("--teacher is empty. Give OWNER/NAME, or leave it out.")
        for language in self.languages:
            if not _LANGUAGE.fullmatch(language):
                raise UserError(
                    f"--language {language!r} is no ISO 639 code. Give two or three small letters, as en, or "
                    "multilingual."
                )
        if self.from_scratch and self.bases:
            raise UserError("--from-scratch and --base contradict each other. Give one of them.")


def check_repository(option: str, name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: it is not OWNER/NAME as the Hub allows them.
    """
    if not (is_repository(name) and _is_allowed(name)):
        raise UserError(f"{option} {name!r} is not the name of a Hub repository. Give OWNER/NAME.")


def _is_allowed(name: str) -> bool:
    """Whether the Hub allows this as the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_repository(name: str) -> bool:
    """Whether this is written as the Hub's repositories are, OWNER/NAME, and does not look like a file."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.startswith(".") and not name.endswith(_FILES)


def on_hub(name: str, run: Path) -> bool:
    """Whether what a run names is a Hub repository, as far as can be told without a network."""
    return is_repository(name) and local_path(name, run) is None
