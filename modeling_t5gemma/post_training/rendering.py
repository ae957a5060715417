"""Questions and answers to tokens: what an encoder reads, and what its decoder has to say.

Both together are what a decoder-only model with the same chat template would read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..text.rules import source_ids, turn_ends

Messages = list[dict[str, Any]]
Text = str | Messages
Ids = npt.NDArray[np.int32]

# What a message says, by the names that public sets give it; a template may leave out any other key.
_SAID = ("content", "tool_calls", "function_call", "reasoning_content", "thinking")
# Stands before an answer that comes without its question.
_SOME_QUESTION: Messages = [{"role": "user", "content": "?"}]
_BEFORE: dict[str, set[str | None]] = {
    "system": {None},
    "developer": {None},
    "user": {None, "system", "developer", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


class UnusableRecord(UserError):
    """A record that nothing can be learnt from; its text is the reason, for counting."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """Attributes:
    ids: int32 tokens, without ``<bos>``.
    cut: how many more there were.
    """

    ids: Ids
    cut: int


class Renderer:
    """Renders questions and answers, which are plain strings or lists of messages.

    Plain strings are tokenised as they are. Messages go through the tokenizer's chat template; an answer is what the
    template adds to its question when the assistant's message is appended, so it ends with the end of the turn.

    Args:
        tokenizer: with a chat template where there are messages.
        max_source: tokens that an encoder reads at most. Of a longer question the oldest turns are left out (the
            system message stays), and what is longer still loses tokens in the middle: instruction and question
            stand at the ends (arXiv 2308.14508, section 4.1).
        max_target: tokens of an answer; a longer one loses its end.
        tools: JSON schemas (or their JSON text) of the functions that every question may call.
    """

    def __init__(self, tokenizer: Any, *, max_source: int, max_target: int, tools: Any = None) -> None:
        if max_source < 2 or max_target < 1:
            raise UserError(f"max_source ({max_source}) begins at 2, max_target ({max_target}) at 1.")
        self.tokenizer, self.max_source, self.max_target, self.tools = tokenizer, max_source, max_target, tools
        self._eos = np.array([tokenizer.eos_token_id], np.int32)

    def source(self, prompt: Text, tools: Any = None) -> Rendered:
        """What the encoder reads.

        Args:
            prompt: messages end where the assistant's turn begins.
            tools: of this question, instead of those of all.

        Raises:
            UnusableRecord: it is empty, or messages that the chat template refuses or does not write whole.
            UserError: there is no chat template.
        """
        if isinstance(prompt, str):
            ids = self._tokens(prompt)
            if not prompt.strip() or not len(ids):
                raise UnusableRecord("empty question")
            return self._fitted(ids, len(ids))
        check_order([*prompt, {"role": "assistant", "content": ""}])
        if not _says(prompt[-1]):
            raise UnusableRecord("empty question")
        text = self._question(prompt, tools)
        self._check_written(text, prompt, tools)
        ids = self._tokens(text)
        whole = len(ids)
        while len(ids) > self.max_source and (shorter := _without_oldest_turn(prompt)) is not None:
            prompt = shorter
            ids = self._tokens(self._question(prompt, tools))
        return self._fitted(ids, whole)

    def answer(self, answer: Text, prompt: Text | None = None, tools: Any = None) -> Rendered:
        """What the decoder has to say: a plain string and the end of the sequence, or the assistant's message as the
        chat template writes it.

        Args:
            answer: a string, or a list of one message of the assistant.
            prompt: the question, uncut, on which a template may make the answer depend; some other if left out.
            tools: as in ``source``.

        Raises:
            UnusableRecord: it is empty, or the template writes something else than the question and then the whole
                answer.
            UserError: there is no chat template.
        """
        if isinstance(answer, str):
            if not answer.strip():
                raise UnusableRecord("empty answer")
            ids = np.concatenate([self._tokens(answer), self._eos])
        else:
            ids = self._tokens_of_answer(answer, prompt, tools)
        return Rendered(ids[: self.max_target], max(0, len(ids) - self.max_target))

    def target(self, answer: Text, prompt: Text | None = None, tools: Any = None) -> Ids:
        """``answer`` without the number of tokens that were cut."""
        return self.answer(answer, prompt, tools).ids

    def ends(self) -> list[int]:
        """Tokens that generation stops at: the end of the sequence, and with a chat template the end of a turn."""
        turn = turn_ends(self.tokenizer) if self.tokenizer.chat_template else []
        return list(dict.fromkeys([int(self._eos[0]), *turn]))

    def _tokens_of_answer(self, answer: Messages, prompt: Text | None, tools: Any) -> Ids:
        if len(answer) != 1 or answer[0].get("role") != "assistant":
            roles = [message.get("role") for message in answer]
            raise UnusableRecord(f"an answer is one message of the assistant, not of {roles}")
        if not _says(answer[0]):
            raise UnusableRecord("empty answer")
        before = _SOME_QUESTION if prompt is None else prompt
        if isinstance(before, str):
            raise UnusableRecord("a plain question with an answer in messages")
        question = self._question(before, tools)
        whole = self._apply([*before, *answer], tools, add_generation_prompt=False)
        if not whole.startswith(question):
            raise UnusableRecord("the chat template changes the question when it is answered")
        for key in _SAID:
            without = [{**answer[0], key: "" if key == "content" else None}]
            if answer[0].get(key) and whole == self._applied([*before, *without], tools, add_generation_prompt=False):
                raise UnusableRecord(f"{key} of the assistant, for which the chat template has no place")
        ids, begin = self._tokens(whole), self._tokens(question)
        if np.array_equal(ids[: len(begin)], begin):
            return ids[len(begin) :]
        # Characters on both sides of the border make one token together. Whoever generates starts at the border.
        return self._tokens(whole[len(question) :])

    def _question(self, prompt: Messages, tools: Any) -> str:
        return self._apply(prompt, tools, add_generation_prompt=True)

    def _check_written(self, text: str, prompt: Messages, tools: Any) -> None:
        """Refuse a question of which the template left something out.

        Raises:
            UnusableRecord: names what.
        """
        place = 0
        for number, message in enumerate(prompt):
            content = _plain(message.get("content"))
            found = text.find(content.strip(), place) if isinstance(content, str) else -1
            place = max(place, found)
            for key in ("content", "tool_calls", "function_call"):
                if not message.get(key) or (key == "content" and found >= 0):
                    continue
                without = {**message, key: "" if key == "content" else None}
                changed = [*prompt[:number], without, *prompt[number + 1 :]]
                if text == self._applied(changed, tools, add_generation_prompt=True):
                    raise UnusableRecord(f"{key} of {message['role']}, for which the chat template has no place")

    def _applied(self, messages: Messages, tools: Any, *, add_generation_prompt: bool) -> str | None:
        """As ``_apply``; None where the template refuses it."""
        try:
            return self._apply(messages, tools, add_generation_prompt=add_generation_prompt)
        except UnusableRecord:
            return None

    def _apply(self, messages: Messages, tools: Any, *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"The tokenizer {self.tokenizer.name_or_path} has no chat template, so it cannot render messages. "
                "Give one (data.chat_template), or questions and answers that are plain strings."
            )
        tools = _parsed(tools if tools is not None else self.tools)
        try:
            text = self._template(messages, tools, add_generation_prompt)
            if tools and text == self._template(messages, None, add_generation_prompt):
                raise UnusableRecord("tools, for which the chat template has no place")
        except UserError:
            raise
        except Exception as error:  # a template is a program: what it raises can be anything
            raise UnusableRecord(f"the chat template refuses it ({' '.join(str(error).split())})") from error
        return text

    def _template(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            _without_none(_with_plain_content(messages)),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _tokens(self, text: str) -> Ids:
        """Without ``<bos>``, which a template may have written and the layout of a batch puts before it."""
        return np.array(source_ids(self.tokenizer, text, None), np.int32)

    def _fitted(self, ids: Ids, whole: int) -> Rendered:
        if len(ids) > self.max_source:
            tail = self.max_source // 2
            ids = np.concatenate([ids[: self.max_source - tail], ids[len(ids) - tail :]])
        return Rendered(ids, whole - len(ids))


def check_order(messages: Messages) -> None:
    """Refuse messages whose roles are unknown or out of order.

    Raises:
        UnusableRecord: names the message, from 1 on.
    """
    if not messages:
        raise UnusableRecord("no messages")
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _BEFORE:
            raise UnusableRecord(f"message {number} has the role {role!r}, which is none of {', '.join(_BEFORE)}")
        if before not in _BEFORE[role]:
            raise UnusableRecord(f"roles out of order: message {number} is of {role}, after {before or 'nothing'}")
        before = role


def _without_oldest_turn(prompt: Messages) -> Messages | None:
    """From the second user's message on, behind what stands before the first; None when there is only one."""
    users = [number for number, message in enumerate(prompt) if message["role"] == "user"]
    return None if len(users) < 2 else [*prompt[: users[0]], *prompt[users[1] :]]


def _says(message: dict[str, Any]) -> bool:
    """Whether a message says or calls something."""
    content = _plain(message.get("content"))
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls") or message.get("function_call"))


def _with_plain_content(messages: Messages) -> Messages:
    return [{**each, "content": _plain(each["content"])} if "content" in each else each for each in messages]


def _plain(content: Any) -> Any:
    """Content in parts ({"type": "text", "text": ...}) as one text: many templates write the list itself.

    Raises:
        UnusableRecord: a part is no text.
    """
    if not isinstance(content, list):
        if content is None or isinstance(content, str):
            return content
        raise UnusableRecord(f"content is of type {type(content).__name__}, neither a text nor parts")
    for part in content:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UnusableRecord(f"content with a part that is no text ({kind})")
    return "".join(part["text"] for part in content)


def _without_none(value: Any) -> Any:
    """Without the keys that are None: a table of records gives every message all keys that any of them has."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value


def _parsed(tools: Any) -> Sequence[Any] | None:
    if not isinstance(tools, str):
        return _without_none(tools) or None
    try:
        return json.loads(tools) or None
    except ValueError as error:
        raise UnusableRecord(f"tools are not valid JSON ({error})") from error
