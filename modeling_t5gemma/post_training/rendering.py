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

from ..data.lines import UnusableRecord as UnusableRecord
from ..errors import UserError
from ..text.messages import check_written, plain, with_plain_content
from ..text.rules import source_ids, turn_ends

Messages = list[dict[str, Any]]
Text = str | Messages
Ids = npt.NDArray[np.int32]

_COUNTS = 1 << 14
# Stands before an answer that comes without its question.
_SOME_QUESTION: Messages = [{"role": "user", "content": "?"}]
_BEFORE: dict[str, set[str | None]] = {
    "system": {None},
    "developer": {None},
    "user": {None, "system", "developer", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


@dataclass(frozen=True, eq=False)
class Rendered:
    """Attributes:
    ids: int32 tokens, without ``<bos>``.
    cut: how many more there were; of turns that are left out, in what they say.
    prompt: of a question, without the turns that are left out.
    """

    ids: Ids
    cut: int
    prompt: Text | None = None


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
        self._turns = 1
        self._counts: dict[str, int] = {}  # each answer of a conversation counts its oldest messages again

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
            return self._fitted(ids, len(ids), prompt)
        check_order([*prompt, {"role": "assistant", "content": ""}])
        if not _says(prompt[-1]):
            raise UnusableRecord("empty question")
        recent = self._recent(prompt, tools)
        text = self._question(recent, tools)
        check_written(text, recent, lambda changed: self._applied(changed, tools, add_generation_prompt=True))
        left_out = len(prompt) - len(recent)
        first = next(number for number, message in enumerate(prompt) if message["role"] == "user")
        cut = sum(self._count(plain(message.get("content")) or "") for message in prompt[first : first + left_out])
        ids = self._tokens(text)
        return self._fitted(ids, len(ids) + cut, recent)

    def answer(self, answer: Text, prompt: Text | None = None, tools: Any = None) -> Rendered:
        """What the decoder has to say: a plain string and the end of the sequence, or the assistant's message as the
        chat template writes it.

        Args:
            answer: a string, or a list of one message of the assistant.
            prompt: the question, on which a template may make the answer depend: ``Rendered.prompt``, which of a long
                conversation is short. Some other if left out.
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
        check_written(
            whole[len(question) :],
            answer,
            lambda changed: self._applied([*before, *changed], tools, add_generation_prompt=False, behind=question),
        )
        ids, begin = self._tokens(whole), self._tokens(question)
        if np.array_equal(ids[: len(begin)], begin):
            return ids[len(begin) :]
        # Characters on both sides of the border make one token together. Whoever generates starts at the border.
        return self._tokens(whole[len(question) :])

    def _recent(self, prompt: Messages, tools: Any) -> Messages:
        """What stands before the first turn, and the latest turns that there is room for, at least one. What is older
        is not rendered: a long conversation has many questions."""
        turns = [number for number, message in enumerate(prompt) if message["role"] == "user"]

        def fits(count: int) -> bool:
            text = self._question([*prompt[: turns[0]], *prompt[turns[-count] :]], tools)
            return len(self._tokens(text)) <= self.max_source

        few, many, step = 1, len(turns) + 1, 1  # taken as fitting, and as not fitting
        likely = [self._turns, self._turns + 1]  # the next question of a conversation has room for as many
        while many - few > 1:
            count = likely.pop(0) if likely else min(few + step, (few + many) // 2)
            if few < count < many:
                few, many, step = (count, many, 2 * step) if fits(count) else (few, count, step)
        self._turns = few
        return [*prompt[: turns[0]], *prompt[turns[-few] :]]

    def _count(self, text: str) -> int:
        if text not in self._counts:
            if len(self._counts) == _COUNTS:
                self._counts.clear()
            self._counts[text] = len(self._tokens(text))
        return self._counts[text]

    def _question(self, prompt: Messages, tools: Any) -> str:
        return self._apply(prompt, tools, add_generation_prompt=True)

    def _applied(self, messages: Messages, tools: Any, *, add_generation_prompt: bool, behind: str = "") -> str | None:
        """As ``_apply``, what stands behind a text that it begins with; None where the template refuses it."""
        try:
            return self._apply(messages, tools, add_generation_prompt=add_generation_prompt)[len(behind) :]
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
            _without_none(with_plain_content(messages)),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _tokens(self, text: str) -> Ids:
        """Without ``<bos>``, which a template may have written and the layout of a batch puts before it."""
        return np.array(source_ids(self.tokenizer, text, None), np.int32)

    def _fitted(self, ids: Ids, whole: int, prompt: Text) -> Rendered:
        if len(ids) > self.max_source:
            tail = self.max_source // 2
            ids = np.concatenate([ids[: self.max_source - tail], ids[len(ids) - tail :]])
        return Rendered(ids, whole - len(ids), prompt)


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


def _says(message: dict[str, Any]) -> bool:
    """Whether a message says or calls something."""
    content = plain(message.get("content"))
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls") or message.get("function_call"))


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
