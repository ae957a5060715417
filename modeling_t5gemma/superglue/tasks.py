"""The seven tasks, each cast as the classification of a text.

Texts have T5's form "name: value" (arXiv 1910.10683, appendix D), the passage first, so that a decoder-only model's
last token has read the question behind it. The order of the features is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError

Row = Mapping[str, Any]


class Text(NamedTuple):
    """A text in three pieces; one that is too long for the model loses the end of the middle one."""

    before: str
    long: str
    after: str

    def joined(self, long: str | None = None) -> str:
        return self.before + (self.long if long is None else long) + self.after


@dataclass(frozen=True)
class Case:
    """An example as text.

    Attributes:
        texts: one, or one for each choice.
        label: the number of its class; None in a test split.
        key: the official number, of MultiRC those of passage, question and answer.
        where: file and line, or data set and record.
    """

    texts: tuple[Text, ...]
    label: int | None
    key: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as on the command line, and of the configuration on the Hub.
        folder: its official folder; FOLDER.jsonl is the file to submit.
        labels: by class, as a submission has them.
        cast: the texts of a row.
        columns: what a row needs beside label and idx.
        metrics: those whose mean is the official score.
        choices: whether each text is a choice, and the class says which.
    """

    name: str
    folder: str
    labels: tuple[str | int, ...]
    cast: Callable[[Row], tuple[Text, ...]]
    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    choices: bool = False

    def label_of(self, value: Any, where: str) -> int:
        """The class that a label stands for, whether it is a name, true or false, or a class already.

        Raises:
            UserError: it is none of this task's.
        """
        names = [str(label).lower() for label in self.labels]
        if isinstance(value, bool) and "true" in names:
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return value
        if isinstance(value, str) and value.lower() in names:
            return names.index(value.lower())
        raise UserError(
            f"{where}: the label of {self.name} is {value!r}; it can be one of {', '.join(map(str, self.labels))}, or "
            f"its number from 0 to {len(names) - 1}. Correct the record."
        )

    def cases(self, row: Row, where: str, *, labelled: bool) -> Iterator[Case]:
        """The cases of a record, in the official nested format or flat as on the Hub.

        Args:
            labelled: whether a label is needed, as in training and development data.

        Raises:
            UserError: columns are missing or of the wrong kind, or the label is out of range.
        """
        flatten = {"multirc": _answers, "wsc": _spans}.get(self.name, _itself)
        for flat in flatten(row, where):
            needed = (*self.columns, "idx", *(("label",) if labelled else ()))
            require(flat, needed, where)
            for name in self.columns:
                if not isinstance(flat[name], int if name.endswith("_index") else str):
                    raise UserError(f"{where}: {name} is {flat[name]!r}, of the wrong kind. Correct the record.")
            label = self.label_of(flat["label"], where) if labelled else None
            idx = flat["idx"]
            key = tuple(int(idx[name]) for name in _MULTIRC_KEY) if isinstance(idx, Mapping) else (int(idx),)
            try:
                texts = self.cast(flat)
            except IndexError as error:
                raise UserError(f"{where}: {error}. Correct the record.") from error
            yield Case(texts, label, key, where)


def require(row: Any, names: tuple[str, ...], where: str) -> None:
    """Make sure that a record has these columns.

    Raises:
        UserError: with those it has.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is no object with columns, but {type(row).__name__}. Correct the record.")
    if missing := [name for name in names if name not in row]:
        raise UserError(
            f"{where} has no column {', '.join(map(repr, missing))}. It has {', '.join(map(repr, row)) or 'none'}: "
            "give files in the official SuperGLUE format, or the Hub's."
        )


_MULTIRC_KEY = ("paragraph", "question", "answer")


def _itself(row: Row, where: str) -> Iterator[Row]:
    yield row


def _answers(row: Row, where: str) -> Iterator[Row]:
    """A record for each answer, from a passage with its questions."""
    if "passage" not in row:
        yield row
        return
    require(row["passage"], ("text", "questions"), where)
    require(row, ("idx",), where)
    for question in row["passage"]["questions"]:
        require(question, ("question", "answers", "idx"), where)
        for answer in question["answers"]:
            require(answer, ("text", "idx"), where)
            key = dict(zip(_MULTIRC_KEY, (row["idx"], question["idx"], answer["idx"])))
            flat = {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": key,
            }
            yield {**flat, "label": answer["label"]} if "label" in answer else flat


def _spans(row: Row, where: str) -> Iterator[Row]:
    if isinstance(row, Mapping) and isinstance(row.get("target"), Mapping):
        yield {**{name: value for name, value in row.items() if name != "target"}, **row["target"]}
    else:
        yield row


def _boolq(row: Row) -> tuple[Text, ...]:
    return (Text("boolq passage: ", row["passage"], f" question: {row['question']}"),)


def _cb(row: Row) -> tuple[Text, ...]:
    return (Text("cb premise: ", row["premise"], f" hypothesis: {row['hypothesis']}"),)


def _copa(row: Row) -> tuple[Text, ...]:
    asked = f" question: {row['question']} choice: "
    return tuple(Text("copa premise: ", row["premise"], asked + row[choice]) for choice in ("choice1", "choice2"))


def _multirc(row: Row) -> tuple[Text, ...]:
    without_html = re.sub(r"</?\w[^<>]*>", "", re.sub(r"<br\s*/?>", " ", row["paragraph"]))
    paragraph = " ".join(without_html.split())
    return (Text("multirc paragraph: ", paragraph, f" question: {row['question']} answer: {row['answer']}"),)


def _rte(row: Row) -> tuple[Text, ...]:
    return (Text("rte premise: ", row["premise"], f" hypothesis: {row['hypothesis']}"),)


def _wic(row: Row) -> tuple[Text, ...]:
    sentences = f"wic sentence1: {row['sentence1']} sentence2: "
    return (Text(sentences, row["sentence2"], f" word: {row['word']}"),)


def _wsc(row: Row) -> tuple[Text, ...]:
    """The noun between ``*`` and the pronoun between ``#``, as T5 marks them; spans count words."""
    words = row["text"].split()
    marks: list[tuple[int, int, str]] = []
    for span, mark in (("span1", "*"), ("span2", "#")):
        begin, length = row[f"{span}_index"], len(row[f"{span}_text"].split())
        if begin < 0 or begin + length > len(words) or not length:
            raise IndexError(f"{span} is at word {begin}, {length} long, and the text has {len(words)} words")
        marks += [(begin, 0, mark), (begin + length, -1, mark)]
    # From the last place on, so that the earlier ones keep their numbers; where one span ends and the other begins,
    # the beginning goes in first.
    for place, _, mark in sorted(marks, reverse=True):
        words.insert(place, mark)
    return (Text("wsc text: ", " ".join(words), ""),)


BOOLEAN = ("false", "true")
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "BoolQ", BOOLEAN, _boolq, ("passage", "question")),
        Task(
            "cb",
            "CB",
            ("entailment", "contradiction", "neutral"),
            _cb,
            ("premise", "hypothesis"),
            metrics=("accuracy", "f1"),
        ),
        Task("copa", "COPA", (0, 1), _copa, ("premise", "choice1", "choice2", "question"), choices=True),
        Task("multirc", "MultiRC", (0, 1), _multirc, ("paragraph", "question", "answer"), metrics=("f1a", "em")),
        Task("rte", "RTE", ("entailment", "not_entailment"), _rte, ("premise", "hypothesis")),
        Task("wic", "WiC", BOOLEAN, _wic, ("word", "sentence1", "sentence2")),
        # jiant, the benchmark's own toolkit, capitalises these two alone of what it submits.
        Task(
            "wsc", "WSC", ("False", "True"), _wsc, ("text", "span1_index", "span1_text", "span2_index", "span2_text")
        ),
    )
}


def tasks_named(names: str) -> list[Task]:
    """Tasks from "all" or names with commas between them.

    Raises:
        UserError: there is no such task.
    """
    wanted = list(TASKS) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in TASKS]:
        raise UserError(f"There is no task {', '.join(unknown)}: give all or some of {', '.join(TASKS)}.")
    return [TASKS[name] for name in dict.fromkeys(wanted)]
