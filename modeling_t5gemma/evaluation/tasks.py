"""The harness's tasks by name: what they consist of, where their data comes from, how they are made.

A task is made with the harness's own configuration. What is changed are few-shot counts and, for local data, where the
data set lies: in ``FOLDER/DATASET/CONFIG/SPLIT.jsonl`` (``FOLDER/aps/super_glue/boolq/validation.jsonl``), or
``FOLDER/DATASET/SPLIT.jsonl`` where the data set has no configurations, each line with the columns that the Hub's has.
"""

from __future__ import annotations

import difflib
import functools
import logging
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training.sources import import_datasets

OWN_TASKS = "files"
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Leaf:
    """A single task of the harness.

    Attributes:
        name: it is registered by.
        config: as its file has it, functions by name.
        changes: of its configuration, by the groups that it is in.
    """

    name: str
    config: Mapping[str, Any]
    changes: Mapping[str, Any]

    @property
    def unsafe(self) -> bool:
        """Whether it runs code that the model writes."""
        return bool(self.config.get("unsafe_code"))

    @property
    def dataset(self) -> str:
        """Its data set, to read."""
        path, name = self._place
        return f"{path} ({name})" if name else path

    @property
    def _place(self) -> tuple[str, str]:
        """Data set and configuration; the task's own name where it has a function in place of a data set."""
        return str(self.config.get("dataset_path") or self.name), str(self.config.get("dataset_name") or "")

    @property
    def process_docs(self) -> tuple[Path, str] | None:
        """The file and the name of the function that its rows go through, where it is in a file beside the task's."""
        where = Path(self.config.get("process_docs") or "")
        module, _, name = where.name.rpartition(".")
        file = where.parent / f"{module.replace('.', '/')}.py"
        return (file, name) if name and file.is_file() else None

    def local_files(self, folder: Path) -> dict[str, str]:
        """The file of each split that it uses.

        Raises:
            UserError: one is missing.
        """
        place = folder.joinpath(*self._place)
        used = {self.config[key] for key in _SPLITS if self.config.get(key)}
        found = {split: place / f"{split}.jsonl" for split in sorted(used)}
        for path in found.values():
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: {self.name} reads {self.dataset}. Put that split there, a JSON object a line "
                    "with the columns that the data set has on the Hub, or leave --data out."
                )
        return {split: str(path.resolve()) for split, path in found.items()}


class Tasks:
    """All tasks by name: the harness's, this package's, and those of more folders.

    The harness's thousands of files are read when a name needs them.

    Args:
        include: folders with the user's own tasks, as the harness's ``--include_path``.

    Raises:
        UserError: the harness is not installed.
    """

    def __init__(self, include: Sequence[Path] = ()) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise UserError(
                f"lm-evaluation-harness is missing ({error}): pip install modeling_t5gemma[evaluate]"
            ) from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own files
        for folder in include:
            if not folder.is_dir():
                raise UserError(f"--include {folder} is no folder. Give one with YAML files of tasks.")
        self._folders = (own_tasks(), *include)
        self._manager = TaskManager(include_path=list(self._folders), include_defaults=False)
        self._whole = False

    def entry(self, name: str) -> Any:
        """What the harness has under a name.

        Raises:
            UserError: there is nothing.
        """
        if name not in self._manager.task_index and not self._whole:
            self._manager, self._whole = _all_tasks(self._folders), True
        found = self._manager.task_index.get(name)
        if found is None:
            close = ", ".join(difflib.get_close_matches(name, self._manager.all_tasks, 4))
            raise UserError(
                f"There is no task {name}. {f'Close to it are {close}. ' if close else ''}Give pt, it, or names that "
                "`lm_eval ls tasks` lists."
            )
        return found

    def leaves(self, name: str, changes: Mapping[str, Any] | None = None) -> Iterator[Leaf]:
        """The single tasks of a task, a group or a tag.

        Args:
            changes: of their configuration.

        Raises:
            UserError: there is no such task.
        """
        entry, changes = self.entry(name), dict(changes or {})
        if entry.kind.name == "TAG":
            for each in sorted(entry.tags):
                yield from self.leaves(each, changes)
        elif entry.kind.name == "GROUP":
            yield from self._members(entry.cfg, changes)
        else:
            yield Leaf(name, entry.cfg, changes)

    def _members(self, group: Mapping[str, Any], changes: Mapping[str, Any]) -> Iterator[Leaf]:
        """Of a group, whose own keys beyond those of every group are changes of all its members."""
        common = {key: value for key, value in group.items() if key not in _group_keys()}
        changes = {**common, **changes}
        for member in group["task"]:
            if isinstance(member, str):
                yield from self.leaves(member, changes)
                continue
            nested = member.get("group")
            if nested is not None and isinstance(member.get("task"), list):
                yield from self._members(member, changes)
                continue
            own = {key: value for key, value in member.items() if key not in ("group", "task")}
            yield from self.leaves(nested or member["task"], {**changes, **own})

    def make(self, leaf: Leaf, data: Path | None) -> Any:
        """The harness's task, its data read.

        Args:
            data: a folder of local data in place of the Hub.

        Raises:
            UserError: the data cannot be reached or read, or the task needs a library that is missing.
        """
        changes: dict[str, Any] = {"task": leaf.name, **leaf.changes}
        if (process := leaf.process_docs) is not None:
            changes["process_docs"] = _processed_once(*process)
        if data is not None:
            changes |= {
                "custom_dataset": None,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": leaf.local_files(data)},
            }
        import_datasets()  # without its progress bars
        try:
            # In a group of its own, since the harness changes the configuration of a group's members alone.
            return self._manager.load({"group": f"{leaf.name} alone", "task": [changes]})["tasks"][leaf.name]
        except ModuleNotFoundError as error:
            raise UserError(f"{leaf.name} needs a library that is missing ({error}): pip install it.") from error
        except Exception as error:  # builders of data sets raise anything
            told = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
            if data is not None:
                raise UserError(
                    f"{leaf.name} cannot read its local data ({type(error).__name__}: {told}). Compare the columns "
                    f"with those of {leaf.dataset} on the Hub."
                ) from error
            raise UserError(
                f"The data set {leaf.dataset} of {leaf.name} cannot be read ({type(error).__name__}: {told}). Go "
                "online (HF_HUB_OFFLINE unset, logged in if it is gated), or give local files: --data FOLDER."
            ) from error


def own_tasks() -> Path:
    """The folder of this package's tasks and groups."""
    return Path(str(files("modeling_t5gemma.evaluation"))) / OWN_TASKS


def _processed_once(module: Path, function: str) -> Callable[[Any], Any]:
    """A task's ``process_docs``, called once for each split, in a module that was just read.

    The harness calls it whenever it looks at a split, and some shuffle with a generator that the module holds (GPQA's
    choices). Questions would then be asked in one order and marked in another.
    """
    found: dict[int, Any] = {}

    def processed(split: Any) -> Any:
        if id(split) not in found:
            found[id(split)] = runpy.run_path(str(module))[function](split)
        return found[id(split)]

    return processed


@functools.cache
def _all_tasks(folders: tuple[Path, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders))


@functools.cache
def _group_keys() -> frozenset[str]:
    from lm_eval.config.group import GroupConfig

    return frozenset(field.name for field in fields(GroupConfig))
