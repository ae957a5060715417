"""Prompts from a file, one a line, and the lines that answers are written as."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..data.lines import UnusableRecord, parse_text
from ..errors import UserError
from .prompts import Messages, Prompts

ANSWER = "generated"


@dataclass(frozen=True)
class Record:
    """A line.

    Attributes:
        where: file and line, for messages.
        prompt: a text, or messages whose answer is wanted.
        row: the columns of a line of JSON, None for plain text.
    """

    where: str
    prompt: str | Messages
    row: dict[str, Any] | None

    def answered(self, text: str) -> str:
        """The line to write: as it was with the answer beside it, or the answer alone. A line break in that is
        written as \\n, so that answers stay one a line."""
        if self.row is None:
            return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\\n")
        return json.dumps({**self.row, ANSWER: text}, ensure_ascii=False)


def read_records(lines: Iterable[bytes], name: str, *, of_json: bool, chat: bool) -> Iterator[Record]:
    """The records of a file.

    Args:
        name: for messages.
        of_json: each line is an object with a ``prompt`` (a text or messages) or ``messages``; else each is a text.
        chat: texts are what a user says to the assistant.

    Raises:
        UserError: a line is empty, is not UTF-8, or holds something else; names it.
    """
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number},"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not UTF-8 ({error.reason} at byte {error.start}). Convert the file."
            ) from error
        if "\0" in text:
            raise UserError(f"{where} has a NUL character: it is damaged, or UTF-16. Convert the file to UTF-8.")
        if not text.strip():
            raise UserError(f"{where} is empty. Remove it: each line gets an answer.")
        row = _row(text, where) if of_json else None
        prompt = text if row is None else _prompt(row, where)
        if isinstance(prompt, str) and chat:
            prompt = [{"role": "user", "content": prompt}]
        yield Record(where, prompt, row)


@dataclass
class Encoder:
    """Records to input ids.

    Attributes:
        limit: of input ids.
        truncate: shorten what is longer, texts at their beginning and messages in their middle.
        records, truncated: how many there were so far, and how many of them were shortened.
    """

    prompts: Prompts
    limit: int
    truncate: bool
    records: int = 0
    truncated: int = 0

    def __call__(self, record: Record) -> list[int]:
        """Input ids.

        Raises:
            UserError: it is too long, gives no tokens, or the chat template refuses it; names it.
        """
        self.records += 1
        chat = not isinstance(record.prompt, str)
        try:
            ids = self.prompts.chat(record.prompt) if chat else self.prompts.text(record.prompt)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{record.where} cannot be read: {error}") from error
        if not ids:
            raise UserError(f"{record.where} has no tokens. Remove it.")
        if len(ids) <= self.limit:
            return ids
        if not self.truncate:
            raise UserError(
                f"{record.where} is {len(ids)} tokens long and the model reads at most {self.limit}. Shorten it, or "
                "give --truncate."
            )
        self.truncated += 1
        return self.prompts.shortened(ids, self.limit, middle=chat)


def _row(text: str, where: str) -> dict[str, Any]:
    try:
        row = parse_text(text.encode())
    except UnusableRecord as error:
        raise UserError(f"{where} is {error}. Correct it.") from error
    if ANSWER in row:
        raise UserError(f"{where} has a column {ANSWER!r} already, where the answer goes. Rename it.")
    return row


def _prompt(row: dict[str, Any], where: str) -> str | Messages:
    columns = [name for name in ("prompt", "messages") if row.get(name) is not None]
    if len(columns) != 1:
        there = "both" if columns else f"neither, but {', '.join(row) or 'no column'}"
        raise UserError(f"{where} should have prompt or messages, and has {there}.")
    prompt = row[columns[0]]
    if isinstance(prompt, str) and columns == ["prompt"]:
        if not prompt.strip():
            raise UserError(f"{where} has an empty prompt. Remove it.")
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
        raise UserError(f"{where} has a {columns[0]} that is no list of messages with role and content.")
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with the assistant's answer, so there is none to give. Leave that message out.")
    return prompt


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
