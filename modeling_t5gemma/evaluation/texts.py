"""The harness's texts as ids: contexts, continuations, and whole texts cut into sources and targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import UserError
from ..inference.prompts import Messages, Prompts, longest_prompt
from ..text.rules import unbegun
from .scoring import Pair


@dataclass(frozen=True)
class Texts:
    """How texts become what a model reads.

    Attributes:
        chat: whether contexts are conversations that the chat template has written.
        beginning: what stands for an empty context, ``<bos>``.
    """

    model: PreTrainedModel
    prompts: Prompts
    chat: bool
    beginning: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, *, chat: bool) -> Texts:
        """Those of a model.

        Raises:
            UserError: it has neither ``<bos>`` nor ``<eos>``, or conversations are asked for and there is no template.
        """
        config = model.config.decoder if model.config.is_encoder_decoder else model.config.get_text_config()
        named = (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id)
        beginning = next((token for token in named if token is not None), None)
        if beginning is None:
            raise UserError(f"The tokenizer of {tokenizer.name_or_path} has neither <bos> nor <eos>. Set bos_token.")
        if chat and not tokenizer.chat_template:
            raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no chat template. Give --no-chat.")
        return cls(model, Prompts.of(model, tokenizer), chat, int(beginning))

    def conversation(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The chat template's text. Where it refuses a system message, that goes before the first question.

        Args:
            add_generation_prompt: let the assistant's turn begin; else the last message is the assistant's, and its
                turn goes on.

        Raises:
            UserError: the template refuses the messages.
        """
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text = self.prompts.rendered(messages, **ending)
        except UserError:
            if [message["role"] for message in messages[:2]] != ["system", "user"]:
                raise
            system, first, *others = messages
            joined = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            text = self.prompts.rendered([joined, *others], **ending)
        return text

    def context(self, text: str) -> list[int]:
        """What an encoder reads, or what a decoder-only model's row begins with; ``<bos>`` for an empty text."""
        return self.prompts.text(text) or [self.beginning]

    def plain(self, text: str) -> list[int]:
        """The ids of a text alone; special tokens that it spells are special tokens."""
        ids: list[int] = self.prompts.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def pair(self, context: str, continuation: str) -> Pair:
        """A context, and the continuation that is scored.

        White space at a context's end belongs to the word behind it, as everywhere in the harness, and the two are cut
        where their common text's tokens are: " Paris" is the one token that it was in training. Where a token would
        stand across the cut, and in conversations, whose answers are tokenised by themselves in training too, both
        are tokenised apart. Nothing is put behind the continuation: an end is scored where the text spells it.
        """
        if self.chat:
            return Pair(tuple(self.context(context)), tuple(self.plain(continuation)))
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        source, whole = self.context(kept), self.context(kept + continuation)
        if whole[: len(source)] == source:
            return Pair(tuple(source), tuple(whole[len(source) :]))
        return Pair(tuple(source), tuple(self.plain(continuation)))

    def fitted(self, source: list[int], new_tokens: int, what: str) -> list[int]:
        """A source that leaves room for so many tokens: cut at its beginning, behind a ``<bos>``.

        Args:
            what: for messages; "An answer may have".

        Raises:
            UserError: there is no room for them.
        """
        try:
            limit = longest_prompt(self.model, new_tokens)
        except UserError as error:
            raise UserError(f"{what} {new_tokens} tokens, more than the model has positions for.") from error
        return self.prompts.shortened(source, limit, middle=False)

    def blocks(self, text: str, block: int) -> Iterator[Pair]:
        """A text cut into targets of ``block`` tokens, so that every token is scored once, and their sources: all that
        is before them and fits, ``<bos>`` alone before the first.

        A decoder-only model's scores don't depend on the cuts, as long as the text fits. An encoder-decoder's do: its
        encoder sees nothing of a block and its decoder nothing else. It cuts a text of less than two blocks in half.
        """
        ids = self.plain(unbegun(self.prompts.tokenizer, text))
        if not self.prompts.decoder_only:
            block = max(1, min(block, -(-len(ids) // 2)))
        for start in range(0, len(ids), block):
            target = ids[start : start + block]
            source = [self.beginning, *ids[:start]] if self.prompts.decoder_only else self.prompts.source(ids[:start])
            yield Pair(tuple(self.fitted(source or [self.beginning], len(target), "A block has")), tuple(target))

    def how_cut(self, block: int) -> str:
        """How ``blocks`` cuts, to stand beside its results."""
        if self.prompts.decoder_only:
            return "each token given all before it that fit"
        return (
            f"each block of {block} tokens (or half of a shorter text) in the decoder, given all before it that fit "
            "into the encoder, the first given <bos> alone"
        )
