"""Where the examples come from, and how they become tokens."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.lines import UnusableRecord, read_records
from ..errors import UserError
from ..training.sources import import_datasets
from .settings import HUB
from .tasks import Case, Row, Task, Text

# By the official name of a split, the Hub's.
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def read_cases(path: str, task: Task, split: str, revision: str | None = None) -> list[Case]:
    """The examples of a split.

    Args:
        path: a folder in the official format (BoolQ/train.jsonl), a local copy of the Hub's (boolq/train*.parquet), or
            a data set on the Hub, whose columns are those of aps/super_glue.
        split: train, val or test; labels of test are not read.

    Raises:
        UserError: the data is not there, a record lacks columns, or a label is out of range.
    """
    cases = [
        case
        for row, where in _rows(path, task, split, revision)
        for case in task.cases(row, where, labelled=split != "test")
    ]
    if not cases:
        raise UserError(f"The {split} split of {task.name} in {path} is empty. Give data with examples.")
    return cases


def has_test_split(path: str, task: Task) -> bool:
    """Whether there is something to predict for a submission; on the Hub there is."""
    return not Path(path).is_dir() or bool(_local_files(Path(path), task, "test"))


def _rows(path: str, task: Task, split: str, revision: str | None) -> Iterator[tuple[Row, str]]:
    if Path(path).is_dir():
        files = _local_files(Path(path), task, split)
        if not files:
            held = ", ".join(sorted(entry.name for entry in Path(path).iterdir())[:20]) or "nothing"
            raise UserError(
                f"{path} has neither {task.folder}/{split}.jsonl (the official format) nor "
                f"{task.name}/{SPLITS[split]}*.parquet (the Hub's). It holds {held}."
            )
        for file in files:
            yield from _json_lines(file) if file.suffix == ".jsonl" else _parquet(file)
        return
    if path.startswith((".", "/", "~")):
        raise UserError(f"{path} is no folder. Give one, or a data set on the Hub such as {HUB}.")
    rows = hub_rows(path, name=task.name, split=SPLITS[split], revision=revision)
    yield from ((row, f"{path} ({task.name}, {SPLITS[split]}), record {n}") for n, row in enumerate(rows, 1))


def _local_files(folder: Path, task: Task, split: str) -> list[Path]:
    official = folder / task.folder / f"{split}.jsonl"
    return [official] if official.is_file() else sorted((folder / task.name).glob(f"{SPLITS[split]}*.parquet"))


def _json_lines(file: Path) -> Iterator[tuple[Row, str]]:
    for row, where in read_records(file):
        if isinstance(row, UnusableRecord):  # without it the score would be another benchmark's
            raise UserError(f"{where} is {row}. Correct the line.")
        yield row, where


def _parquet(file: Path) -> Iterator[tuple[Row, str]]:
    rows = hub_rows("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
    yield from ((row, f"{file}, record {n}") for n, row in enumerate(rows, 1))


def hub_rows(path: str, **options: Any) -> Any:
    """The records of a data set on the Hub, or what else ``datasets.load_dataset`` reads.

    The data set ``super_glue`` itself is a script, which datasets 4 and later does not run; aps/super_glue has the
    same as parquet files.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return import_datasets().load_dataset(path, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{options.get('data_files', path)} cannot be read: {reason}. Give a folder in the official format, or a "
            f"data set of parquet files on the Hub such as {HUB}."
        ) from error


@dataclass(frozen=True, eq=False)
class Example:
    """An example as tokens.

    Attributes:
        ids: of each text, as the model reads them.
        label, key, where: as in ``Case``.
    """

    ids: tuple[list[int], ...]
    label: int | None
    key: tuple[int, ...]
    where: str

    @property
    def length(self) -> int:
        return max(map(len, self.ids))


@dataclass(frozen=True)
class InputForm:
    """How a model reads a text.

    Attributes:
        tokenizer: its own.
        bos: the beginning-of-sequence token to put before the text, or None.
        specials: let the tokenizer add the tokens that it adds by default, as for a decoder-only model.
        max_length: tokens that the model reads, those added included.
        pad: the padding token.
    """

    tokenizer: Any
    bos: int | None
    specials: bool
    max_length: int
    pad: int

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of some texts, however many."""
        # A text that spells a special token ("<pad>") gets ordinary tokens.
        made: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=self.specials, split_special_tokens=True
        )["input_ids"]
        return made if self.bos is None else [[self.bos, *ids] for ids in made]


def encode(cases: Sequence[Case], form: InputForm) -> tuple[list[Example], int]:
    """Tokens of cases, and how many of them were cut: too long ones lose the end of their passage.

    Raises:
        UserError: a text is too long without its passage too.
    """
    texts = [text for case in cases for text in case.texts]
    all_ids = form.ids([text.joined() for text in texts])
    examples, cut = [], 0
    place = 0
    for case in cases:
        ids = all_ids[place : place + len(case.texts)]
        place += len(case.texts)
        if any(len(each) > form.max_length for each in ids):
            cut += 1
            ids = [_cut(text, form, case.where) for text in case.texts]
        examples.append(Example(tuple(ids), case.label, case.key, case.where))
    return examples, cut


def _cut(text: Text, form: InputForm, where: str) -> list[int]:
    long = text.long
    while True:
        (ids,) = form.ids([text.joined(long)])
        if len(ids) <= form.max_length:
            return ids
        over = len(ids) - form.max_length
        # Cut between characters and read again: tokens at the border depend on what stands beside them.
        offsets = form.tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if not offsets:
            raise UserError(
                f"{where} has {len(ids)} tokens without its longest part, and the model reads {form.max_length}: "
                "raise data.max_length, or take a model that reads more."
            )
        long = long[: offsets[-over][0]] if over < len(offsets) else ""


def collate(examples: Sequence[Example], form: InputForm) -> dict[str, Any]:
    """A batch, padded on the right.

    Returns:
        input_ids and attention_mask, int64 (B, S) or with several texts (B, choices, S); labels int64 (B,), -1 without
        one; tokens, how many are real.
    """
    made = _padded([example.ids for example in examples], form.pad)
    tokens = int(made["attention_mask"].sum())
    labels = torch.tensor([-1 if example.label is None else example.label for example in examples])
    return {**made, "labels": labels, "tokens": tokens}


def _padded(texts: Sequence[Sequence[Sequence[int]]], pad: int) -> dict[str, torch.Tensor]:
    length = max(len(ids) for choices in texts for ids in choices)
    tokens = np.full((len(texts), len(texts[0]), length), pad, np.int64)
    mask = np.zeros_like(tokens)
    for row, choices in enumerate(texts):
        for choice, ids in enumerate(choices):
            tokens[row, choice, : len(ids)] = ids
            mask[row, choice, : len(ids)] = 1
    only = slice(None) if len(texts[0]) > 1 else 0
    return {
        "input_ids": torch.from_numpy(tokens[:, only]),
        "attention_mask": torch.from_numpy(mask[:, only]),
    }
