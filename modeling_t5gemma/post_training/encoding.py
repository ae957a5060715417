"""Records to examples: every usable answer once, tokenised ahead and held on the disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..objectives import Tokens
from ..training.sources import import_datasets
from ..training.tokenizing import vocabulary_of
from .records import UNUSABLE, require_columns
from .rendering import Renderer, Text, UnusableRecord, check_order
from .settings import ColumnsSettings

# Of what is stored: a change of what records become needs another number, or old tokens are found again.
_VERSION = 4
_NAMED = 5
_TOO_LONG = "longer than max_source or max_target"


@dataclass(frozen=True, eq=False)
class Example:
    """A question and its answer, as ``mixture.Sample``.

    Attributes:
        source: int32, what the encoder reads, without ``<bos>``.
        target: int32, the answer with its end.
        where: "file:record" or "file:record/turn", from 1 on.
        continues: a decoder-only teacher would read the answer behind the question.
    """

    source: Tokens
    target: Tokens
    where: str
    continues: bool = True
    taught: None = None


class Examples(Sequence[Example]):
    """Examples on the disk.

    Attributes:
        lengths: int64 (examples, 2), tokens of source and target.
    """

    def __init__(self, table: Any, kept: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        self._table, self._kept, self.lengths = table, kept, lengths

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = self._table[int(self._kept[index])]
        return Example(row["source"].astype(np.int32), row["target"].astype(np.int32), str(row["where"]))


@dataclass(frozen=True)
class Report:
    """What became of the records.

    Attributes:
        records, examples: how many there were, and were made.
        skipped: how many answers (or whole records) for each reason.
        first_skipped: the first few, named.
        cut_sources, cut_targets: examples that lost tokens in the question, in the answer.
        cut_tokens: how many in all.
    """

    records: int
    examples: int
    skipped: dict[str, int]
    first_skipped: list[str]
    cut_sources: int
    cut_targets: int
    cut_tokens: int

    def __str__(self) -> str:
        told = f"{self.examples} examples of {self.records} records"
        if self.cut_tokens:
            told += f"; cut: {self.cut_sources} questions, {self.cut_targets} answers, {self.cut_tokens} tokens in all"
        if self.skipped:
            reasons = ", ".join(f"{count} for: {reason}" for reason, count in self.skipped.items())
            told += f"; skipped {reasons}; the first: {'; '.join(self.first_skipped)}"
        return told


@dataclass(frozen=True, eq=False)
class Encoded:
    """All examples of some records, those of one record beside each other."""

    table: Any
    kept: npt.NDArray[np.int64]
    records: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    report: Report

    def examples(self) -> Examples:
        """All of them.

        Raises:
            UserError: there are none.
        """
        self._check()
        return Examples(self.table, self.kept, self.lengths)

    def split(self, count: int) -> tuple[Examples, Examples]:
        """The examples without those of ``count`` evenly spread records, and those.

        Raises:
            UserError: nothing would be left.
        """
        self._check()
        records = np.unique(self.records)
        if not 0 <= count < len(records):
            raise UserError(
                f"{count} of {len(records)} usable records cannot be held out: at least one has to remain to train "
                "on. Give more records, or a smaller held_out."
            )
        chosen = records[np.arange(count, dtype=np.int64) * len(records) // max(1, count)]
        held = np.isin(self.records, chosen)
        train, rest = (Examples(self.table, self.kept[each], self.lengths[each]) for each in (~held, held))
        return train, rest

    def _check(self) -> None:
        if not len(self.kept):
            raise UserError(f"There are 0 good ones among the records: {self.report}.")


def encode_records(
    records: Any,
    renderer: Renderer,
    name: str,
    *,
    columns: ColumnsSettings | None = None,
    turns: Literal["all", "last"] = "all",
    longer: Literal["cut", "skip"] = "cut",
    processes: int = 1,
    max_bad: int = 100,
) -> Encoded:
    """Tokenise every answer. The result is kept in the cache of ``datasets``, and found there again.

    Args:
        records: a ``datasets.Dataset``.
        name: what error messages call them.
        columns, turns, longer: as in ``AnswerDataSettings``.
        max_bad: unusable records or answers that are skipped; those that are too long don't count.

    Raises:
        UserError: columns are missing, or there are too many bad records.
    """
    columns = _present(records, columns or ColumnsSettings(), name)
    encode = _Encode(renderer, name, columns, turns, longer)
    datasets = import_datasets()
    ids = datasets.List(datasets.Value("int32"))
    numbers = dict.fromkeys(("record", "source_length", "target_length", "source_cut", "target_cut"))
    features = datasets.Features(
        {
            "source": ids,
            "target": ids,
            "where": datasets.Value("string"),
            "reason": datasets.Value("string"),
            **{number: datasets.Value("int64") for number in numbers},
        }
    )
    table = records.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=features,
        num_proc=processes if processes > 1 else None,
        new_fingerprint=encode.fingerprint(records),
    ).with_format("numpy")
    facts = table.select_columns(["reason", *numbers])[:]
    good = np.array([not reason for reason in facts["reason"]], bool)
    report = _report(records, table, facts, good)
    bad = sum(count for reason, count in report.skipped.items() if reason != _TOO_LONG)
    if bad > max_bad:
        raise UserError(
            f"{name} has {bad} bad records or answers, and {good.sum()} good ones ({max_bad} bad ones are let pass, "
            f"max_bad). {report}."
        )
    lengths = np.stack([facts["source_length"][good], facts["target_length"][good]], axis=1)
    return Encoded(table, np.flatnonzero(good), facts["record"][good], lengths, report)


def turns_of(
    record: dict[str, Any], columns: ColumnsSettings, turns: Literal["all", "last"]
) -> Iterator[tuple[Text, Text, str]]:
    """The question and the answer of each turn, and a name for it: "/3" for the third message, "" for the only turn.

    Raises:
        UnusableRecord: there is none, or messages are out of order.
    """
    if columns.messages is not None:
        messages, first = record[columns.messages], 0
        if not isinstance(messages, list):
            raise UnusableRecord(f"{columns.messages} is {_kind(messages)}, not a list of messages")
    else:
        prompt, completion = record[columns.prompt], record[columns.completion]
        if isinstance(prompt, str) and isinstance(completion, str):
            yield prompt, completion, ""
            return
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise UnusableRecord(
                f"{columns.prompt} is {_kind(prompt)} and {columns.completion} {_kind(completion)}: not two texts or "
                "two lists of messages"
            )
        messages, first = [*prompt, *completion], len(prompt)
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise UnusableRecord(f"the last message is of {messages[-1]['role']}, so nobody answers it")
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= first]
    for number in answers if turns == "all" else answers[-1:]:
        yield messages[:number], [messages[number]], f"/{number + 1}"


class _Encode:
    """What ``datasets`` maps over batches of records: a row for each answer, or for what was skipped with a reason."""

    def __init__(
        self,
        renderer: Renderer,
        name: str,
        columns: ColumnsSettings,
        turns: Literal["all", "last"],
        longer: Literal["cut", "skip"],
    ) -> None:
        self.renderer, self.name, self.columns, self.turns, self.longer = renderer, name, columns, turns, longer

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for place, number in enumerate(numbers):
            record = {name: values[place] for name, values in batch.items()}
            where = f"{self.name}:{number + 1}"
            try:
                if record.get(UNUSABLE):
                    raise UnusableRecord(record[UNUSABLE])
                for prompt, answer, turn in turns_of(record, self.columns, self.turns):
                    rows.append({**self._row(prompt, answer, self._tools(record), where + turn), "record": number})
            except UnusableRecord as error:
                rows.append({**_skipped(where, str(error)), "record": number})
        return {name: [row[name] for row in rows] for name in _skipped("", "") | {"record": 0}}

    def _row(self, prompt: Text, answer: Text, tools: Any, where: str) -> dict[str, Any]:
        try:
            source = self.renderer.source(prompt, tools)
            target = self.renderer.answer(answer, source.prompt, tools)
        except UnusableRecord as error:
            return _skipped(where, str(error))
        if self.longer == "skip" and (source.cut or target.cut):
            return _skipped(where, _TOO_LONG)
        return {
            "source": source.ids,
            "target": target.ids,
            "where": where,
            "reason": "",
            "source_length": len(source.ids),
            "target_length": len(target.ids),
            "source_cut": source.cut,
            "target_cut": target.cut,
        }

    def _tools(self, record: dict[str, Any]) -> Any:
        return None if self.columns.tools is None else record[self.columns.tools]

    def fingerprint(self, records: Any) -> str:
        """Of the records and of all that decides what becomes of them."""
        renderer = self.renderer
        decides = [
            _VERSION,
            records._fingerprint,
            vocabulary_of(renderer.tokenizer, "").fingerprint,
            renderer.tokenizer.chat_template,
            [renderer.max_source, renderer.max_target, renderer.tools],
            [self.name, asdict(self.columns), self.turns, self.longer],
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _skipped(where: str, reason: str) -> dict[str, Any]:
    lengths = dict.fromkeys(("source_length", "target_length", "source_cut", "target_cut"), 0)
    none = np.zeros(0, np.int32)
    return {"source": none, "target": none, "where": where, "reason": reason, **lengths}


def _kind(value: Any) -> str:
    """What a column holds, in words."""
    if value is None:
        return "missing"
    words: dict[type, str] = {str: "a text", list: "a list"}
    return words.get(type(value), f"of type {type(value).__name__}")


def _present(records: Any, columns: ColumnsSettings, name: str) -> ColumnsSettings:
    """The columns that are there: with ``messages`` None, a pair.

    Raises:
        UserError: neither form is there, or both are.
    """
    found = set(records.column_names)
    pair = {columns.prompt, columns.completion} <= found
    messages = columns.messages if columns.messages in found else None
    if messages and pair:
        raise UserError(
            f"{name} has {messages!r}, and {columns.prompt!r} and {columns.completion!r} too: set columns.messages to "
            "null, or name other columns, to say which to take."
        )
    if not messages and not pair:
        if columns.messages is not None and not {columns.prompt, columns.completion} & found:
            wanted = f"{columns.messages!r}, nor {columns.prompt!r} and {columns.completion!r}"
            raise UserError(
                f"{name} has neither a column {wanted}. It has {', '.join(map(repr, records.column_names))}: name "
                "those to take (columns)."
            )
        require_columns(records, [columns.prompt, columns.completion], name)
    tools = columns.tools if columns.tools in found else None
    return ColumnsSettings(messages, columns.prompt, columns.completion, tools)


def _report(records: Any, table: Any, facts: dict[str, Any], good: npt.NDArray[np.bool_]) -> Report:
    bad = np.flatnonzero(~good)
    first = [table[int(row)] for row in bad[:_NAMED]]
    return Report(
        records=len(records),
        examples=int(good.sum()),
        skipped=dict(Counter(str(facts["reason"][row]) for row in bad)),
        first_skipped=[f"{row['where']}: {row['reason']}" for row in first],
        cut_sources=int((facts["source_cut"] > 0).sum()),
        cut_targets=int((facts["target_cut"] > 0).sum()),
        cut_tokens=int(facts["source_cut"].sum() + facts["target_cut"].sum()),
    )
