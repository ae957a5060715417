"""The texts that a vocabulary is trimmed to, and what a smaller vocabulary makes of a text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.sources import BadRecord, BadRecords, Record, TextSource
from ..training.tokenizing import encode
from .byte_pairs import Counts

_AT_ONCE = 256  # records; a fast tokenizer takes them in parallel
# Conversations for what a template writes around any message; one that it refuses is passed over.
_TURNS: tuple[list[dict[str, str]], ...] = tuple(
    [{"role": role, "content": "text"} for role in roles]
    for roles in (("user",), ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user"))
)


@dataclass(frozen=True)
class Change:
    """What a smaller vocabulary makes of texts.

    Attributes:
        tokens: of the larger one.
        changed: share of them that are no longer a token, at their place.
        longer: how much longer the texts become, 0.01 for a hundredth.
    """

    tokens: int
    changed: float
    longer: float

    def __str__(self) -> str:
        return f"{self.changed:.2%} of {self.tokens:,} tokens change, and it becomes {self.longer:.2%} longer"


def rendered(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str | None:
    """Messages as the chat template writes them; None without one, or if it refuses them."""
    if not tokenizer.chat_template:
        return None
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # a template is a program: what it raises can be anything
        return None
    return text


def template_texts(tokenizer: Any) -> list[str]:
    """What a chat template writes around messages."""
    written = (rendered(tokenizer, turns, add_generation_prompt=turns[-1]["role"] == "user") for turns in _TURNS)
    return [text for text in written if text]


def read(sources: Iterable[TextSource], tokenizer: Any, max_bad: int) -> Iterator[str]:
    """The texts of all sources; messages in a column are read as the tokenizer's chat template writes them.

    Raises:
        UserError: as ``TextSource.texts``.
    """
    bad = BadRecords(max_bad)
    for source in sources:
        yield from (record.text for record in _Texts(**vars(source), tokenizer=tokenizer).texts(bad))


def count(tokenizer: Any, texts: Iterable[str]) -> Counts:
    """How often each token is one of the texts', int64 (tokens,).

    A text that spells a special token is counted with that, as a prompt has it, and without, as training does.
    """
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    special = np.array(tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder), np.int64)
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _AT_ONCE)):
        rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        spelling = [text for text, row in zip(batch, rows) if np.isin(row, special).any()]
        for ids in (*rows, *encode(tokenizer, spelling)):
            counts += np.bincount(np.array(ids, np.int64), minlength=len(counts))
    return counts


def compare(before: Any, after: Any, texts: Iterable[str]) -> Change:
    """What a tokenizer makes of texts, beside another."""
    old = new = same = 0
    for text in texts:
        spans = [Counter(_spans(tokenizer, text)) for tokenizer in (before, after)]
        old, new = old + spans[0].total(), new + spans[1].total()
        same += (spans[0] & spans[1]).total()
    return Change(old, 1 - same / max(old, 1), new / max(old, 1) - 1)


@dataclass(frozen=True)
class _Texts(TextSource):
    """As ``TextSource``, but a column may also hold messages."""

    tokenizer: Any = None

    def _text(self, text: Any, where: str) -> Record | BadRecord:
        if isinstance(text, list) and all(isinstance(message, dict) for message in text):
            # Where the template takes no answer without its question, each message stands for itself.
            written = rendered(self.tokenizer, text)
            text = "\n".join(str(message.get("content")) for message in text) if written is None else written
        return super()._text(text, where)


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int, str]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    return [(start, end, word) for (start, end), word in zip(found["offset_mapping"], words)]
