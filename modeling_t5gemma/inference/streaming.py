"""An answer as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import TextStreamer


class AnswerStreamer(TextStreamer):
    """Hands on the words of one row as they are finished, without the prompt and without the token that ends it.

    Args:
        ends: tokens that end a text.
        write: called with each piece of text.

    Attributes:
        ids: the new tokens so far, without an end.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._ends, self._write = set(ends), write

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        # The end may be an ordinary token to the tokenizer, which would spell it.
        tokens = [token for token in value.flatten().tolist() if token not in self._ends]
        if tokens:
            self.ids += tokens
            super().put(torch.tensor(tokens))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)
