"""Preferences and prompts from records to tokens, and batches in which one source serves several answers.

Shapes: R sources, G answers to each, S and T tokens of the longest source and answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from ..collators import Layout, collate
from ..errors import UserError
from ..training.evaluation import HeldOutPair
from .records import UNUSABLE, require_columns
from .rendering import Ids, Messages, Renderer, Text, UnusableRecord


class Example(Protocol):
    """What a record becomes; ``cut`` are the tokens that were left out."""

    @property
    def cut(self) -> int: ...


Made = TypeVar("Made", bound=Example)
Some = TypeVar("Some")


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """A question and two answers.

    Attributes:
        source, chosen, rejected: int32 tokens, without ``<bos>``; answers with their end.
        where: names the record.
        number: of the pair among those of a run.
        cut: tokens that were left out of the three.
    """

    source: Ids
    chosen: Ids
    rejected: Ids
    where: str
    number: int = 0
    cut: int = 0


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question whose answers are to be sampled.

    Attributes:
        source: int32 tokens, without ``<bos>``.
        prompt: the question as it was given, a string or messages.
        columns: what else the record has, for reward functions.
        where: names the record.
        cut: tokens of the question that were left out.
    """

    source: Ids
    prompt: Text
    columns: dict[str, Any]
    where: str
    cut: int = 0


@dataclass
class Loaded:
    """What became of records that cannot all be used.

    Attributes:
        skipped: how many were left out, by reason.
        first: some of them, with their reasons.
        cut: how many lost tokens to the limits.
        cut_tokens: how many those lost in all.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    cut: int = 0
    cut_tokens: int = 0

    def __str__(self) -> str:
        """In one line; empty when every record is used as it is."""
        reasons = ", ".join(f"{count} ({reason})" for reason, count in self.skipped.most_common())
        parts = [f"skipped {reasons}, the first: {'; '.join(self.first)}"] if self.skipped else []
        parts += [f"cut {self.cut}, {self.cut_tokens} tokens in all"] if self.cut else []
        return "; ".join(parts)


def load_pairs(records: Any, renderer: Renderer, what: str, max_bad: int) -> tuple[list[PreferencePair], Loaded]:
    """Pairs from records with the columns prompt, chosen and rejected: strings, or messages in each. Where chosen and
    rejected are whole conversations, what they begin with alike is the prompt, whatever the column prompt has, as TRL
    reads them. A plain string beside messages is what the user, or the assistant, says. A column tools has the JSON
    schemas of the functions that may be called.

    Args:
        records: a ``datasets.Dataset``.
        what: its name.
        max_bad: records that may be skipped: an answer is empty, roles are out of order, both answers are the same.

    Raises:
        UserError: a column is missing, too many records are unusable, or all.
    """
    require_columns(records, ["chosen", "rejected"], what)

    def make(record: dict[str, Any], where: str) -> PreferencePair:
        prompt, *answers = _parts(record)
        tools = record.get("tools")
        source = renderer.source(prompt, tools)
        chosen, rejected = (renderer.answer(answer, source.prompt, tools) for answer in answers)
        if np.array_equal(chosen.ids, rejected.ids):
            raise UnusableRecord("both answers are the same")
        cut = source.cut + chosen.cut + rejected.cut
        return PreferencePair(source.ids, chosen.ids, rejected.ids, where, cut=cut)

    return _made(records, make, what, max_bad)


def load_prompts(records: Any, renderer: Renderer, what: str, max_bad: int) -> tuple[list[Prompt], Loaded]:
    """Prompts from records with the column prompt, a string or messages, and maybe tools; arguments and errors as of
    ``load_pairs``."""
    require_columns(records, ["prompt"], what)

    def make(record: dict[str, Any], where: str) -> Prompt:
        prompt = record.pop("prompt")
        source = renderer.source(_text(prompt, "prompt"), record.get("tools"))
        return Prompt(source.ids, prompt, record, where, source.cut)

    return _made(records, make, what, max_bad)


def held_out(examples: Sequence[Some], count: int) -> tuple[list[Some], list[Some]]:
    """Those to train on, and ``count`` to measure on, evenly spread; the same ones every time.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not 0 <= count < len(examples):
        raise UserError(f"{count} of {len(examples)} examples cannot be held out: at least one has to remain.")
    kept = {n * len(examples) // count for n in range(count)}
    return [e for n, e in enumerate(examples) if n not in kept], [examples[n] for n in sorted(kept)]


def collate_answers(sources: Sequence[Ids], answers: Sequence[Sequence[Ids]], layout: Layout) -> dict[str, Any]:
    """A batch that encodes each source once for all its answers, of which every source has the same number.

    Returns:
        int64 tensors: input_ids, attention_mask (R, S); decoder_input_ids, decoder_attention_mask, labels (R * G, T),
        the answers to one source after each other.
    """
    (count,) = {len(own) for own in answers}
    pairs = [[HeldOutPair(source, answer)] for source, own in zip(sources, answers) for answer in own]
    made = collate(pairs, layout, None)
    return {**made, **{name: made[name][::count] for name in ("input_ids", "attention_mask")}}


def _made(
    records: Iterable[dict[str, Any]], make: Callable[[dict[str, Any], str], Made], what: str, max_bad: int
) -> tuple[list[Made], Loaded]:
    made: list[Made] = []
    loaded = Loaded()
    for number, record in enumerate(records, 1):
        where = f"{what}:{number}"
        try:
            row = dict(record)
            if reason := row.pop(UNUSABLE, None):
                raise UnusableRecord(reason)
            example = make(row, where)
        except UnusableRecord as error:
            loaded.skipped[str(error)] += 1
            if len(loaded.first) < 3:
                loaded.first.append(f"{where} ({error})")
            if loaded.skipped.total() > max_bad:
                raise UserError(
                    f"More than {max_bad} records of {what} cannot be used, the first: {'; '.join(loaded.first)}. "
                    "Mend them, or raise data.max_bad."
                ) from error
            continue
        made.append(example)
        loaded.cut += example.cut > 0
        loaded.cut_tokens += example.cut
    if not made:
        raise UserError(f"{what} has nothing to train on: {loaded or 'it is empty'}.")
    return made, loaded


def _parts(record: dict[str, Any]) -> tuple[Text, Text, Text]:
    chosen, rejected = (_text(record[name], name) for name in ("chosen", "rejected"))
    given = record.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = _alike(chosen, rejected)
        if same or given is None:
            return chosen[:same], chosen[same:], rejected[same:]
    if given is None:
        raise UnusableRecord("no prompt beside answers that are plain strings")
    prompt = _text(given, "prompt")
    if all(isinstance(each, str) for each in (prompt, chosen, rejected)):
        return prompt, chosen, rejected
    return _said(prompt, "user"), _said(chosen, "assistant"), _said(rejected, "assistant")


def _said(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _alike(chosen: Messages, rejected: Messages) -> int:
    """How many messages both begin with; at most all but the last of each, as that is the answer."""
    for number, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1])):
        if one != other:
            return number
    return min(len(chosen), len(rejected)) - 1


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    raise UnusableRecord(f"{name} is neither a string nor messages")
