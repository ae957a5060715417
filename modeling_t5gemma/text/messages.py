"""What messages say, and whether a chat template wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.lines import UnusableRecord

Messages = list[dict[str, Any]]
# What a message says, by the names that public sets give it; a template may leave out any other key.
_CALLS = ("tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "thinking")


def with_plain_content(messages: Messages) -> Messages:
    """Messages whose content is a text, as of ``plain``."""
    return [{**each, "content": plain(each["content"])} if "content" in each else each for each in messages]


def plain(content: Any) -> Any:
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


def check_written(text: str, messages: Messages, render: Callable[[Messages], str | None]) -> None:
    """Refuse messages of which a chat template left something out. A content is looked for in the text; what is not
    found there as it is may have been changed, so it counts as written where the text is another without it.

    Args:
        text: what the template made of the messages.
        render: does so again, with other ones; None where it refuses them.

    Raises:
        UnusableRecord: names what.
    """
    place = 0
    for number, message in enumerate(messages):
        content = plain(message.get("content"))
        found = text.find(content.strip(), place) if content else 0
        place = max(place, found)
        # Templates leave out the thoughts of earlier turns on purpose.
        thoughts = _THOUGHTS if len(messages) == 1 and message["role"] == "assistant" else ()
        for key in (*(("content",) if found < 0 else ()), *_CALLS, *thoughts):
            if not message.get(key):
                continue
            without = {**message, key: "" if key == "content" else None}
            if text == render([*messages[:number], without, *messages[number + 1 :]]):
                raise UnusableRecord(f"{key} of {message['role']}, for which the chat template has no place")
