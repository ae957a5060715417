"""What a model reads: texts and messages to token ids, and how many of them there may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..cross_attention import kind_of
from ..errors import UserError
from ..text.messages import check_written, with_plain_content
from ..text.rules import source_begin, source_ids, turn_ends

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """Texts and messages to input ids.

    An encoder reads what it was trained on: a source without special tokens, behind ``<bos>`` where its tokenizer puts
    one. A decoder-only model reads what its tokenizer makes. A text that begins with ``<bos>`` already, as a chat
    template writes it, gets no second one.

    Attributes:
        tokenizer: the model's.
        begin: what an encoder's input begins with, or None.
        decoder_only: whether there is no encoder.
    """

    tokenizer: Any
    begin: int | None
    decoder_only: bool

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> Prompts:
        """Those of a model.

        Raises:
            UserError: as ``source_begin``.
        """
        if not model.config.is_encoder_decoder:
            return cls(tokenizer, None, decoder_only=True)
        return cls(tokenizer, source_begin(tokenizer, model.config), decoder_only=False)

    def text(self, text: str) -> list[int]:
        """A text as it is; special tokens that it spells are special tokens."""
        if self.decoder_only:
            bos = self.tokenizer.bos_token
            return self._tokens(text, add_special_tokens=not (bos and text.startswith(bos)))
        return source_ids(self.tokenizer, text, self.begin)

    def chat(self, messages: Messages) -> list[int]:
        """Messages as the chat template writes them, up to where the assistant's answer begins.

        Raises:
            UserError: there is no template, or it refuses them or does not write them whole.
        """
        text = self.rendered(messages, add_generation_prompt=True)
        check_written(text, messages, self._applied)
        if self.decoder_only:
            return self._tokens(text, add_special_tokens=False)
        return source_ids(self.tokenizer, text, self.begin)

    def source(self, ids: Sequence[int]) -> list[int]:
        """Tokens of an encoder's source, behind what its input begins with."""
        return [*ids] if self.begin is None else [self.begin, *ids]

    def rendered(
        self, messages: Messages, *, add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        """The chat template's text.

        Args:
            add_generation_prompt: let the assistant's turn begin.
            continue_final_message: leave the last message's turn open.

        Raises:
            UserError: there is no template, or it refuses the messages.
        """
        self._check_template()
        messages = with_plain_content(messages)
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # a template is a program: what it raises can be anything
            raise UserError(f"The chat template refuses the messages: {' '.join(str(error).split())}") from error
        return text

    def _applied(self, messages: Messages) -> str | None:
        try:
            return self.rendered(messages, add_generation_prompt=True)
        except UserError:
            return None

    def turn_ends(self) -> list[int]:
        """The token that ends the assistant's turn in the chat template (Gemma's ``<end_of_turn>``), if one does.

        Raises:
            UserError: there is no template, or it refuses a question and an answer.
        """
        self._check_template()
        return turn_ends(self.tokenizer)

    def shortened(self, ids: list[int], limit: int, *, middle: bool) -> list[int]:
        """At most ``limit`` ids, among them a ``<bos>`` at the beginning.

        Args:
            middle: leave out the middle, since instruction and question of a conversation stand at its ends; else the
                beginning, since a text goes on from its end.
        """
        if len(ids) <= limit:
            return ids
        first = int(ids[0] == self.tokenizer.bos_token_id)
        head = first + (limit - first + 1) // 2 if middle else first
        return [*ids[:head], *ids[len(ids) - (limit - head) :]]

    def _check_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no chat template: it is no chat model's. "
                "`t5gemma generate` continues plain text."
            )

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids


def longest_prompt(model: PreTrainedModel, max_new_tokens: int) -> int:
    """The most input ids that leave room for so many new ones.

    A decoder whose positions begin at 0 has all of them for itself; one that, like a decoder-only model, counts on
    where the input ends has not.

    Raises:
        UserError: there is no room for so many new tokens.
    """
    config = model.config
    if not config.is_encoder_decoder:
        source, target, together = None, config.get_text_config().max_position_embeddings, True
    else:
        source, target = config.encoder.max_position_embeddings, config.decoder.max_position_embeddings
        together = kind_of(config.decoder).continues
    if max_new_tokens >= target:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} is more than the model's {target} positions have room for. Ask for "
            "fewer."
        )
    left = target - max_new_tokens
    if source is None:
        return left
    return min(source, left) if together else source
