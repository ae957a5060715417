"""A conversation: its turns, and the model's next one."""

from __future__ import annotations

from collections.abc import Callable

from transformers import GenerationConfig, PreTrainedModel

from ..errors import UserError
from .batching import generate_ids
from .prompts import Messages, Prompts, longest_prompt
from .sampling import ends_of, pad_token
from .streaming import AnswerStreamer


class Conversation:
    """Turns of a user and a model, all of which the model reads for each answer.

    Args:
        config: how answers are generated; ``generation_config`` with the template's ``turn_ends``.
        system: a message before all others.

    Attributes:
        messages: so far.

    Raises:
        UserError: the chat template takes no such system message, or there is none.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, config: GenerationConfig, system: str | None = None
    ) -> None:
        self._model, self._prompts, self._config = model, prompts, config
        self._limit = longest_prompt(model, config.max_new_tokens)
        self._begin: Messages = [] if system is None else [{"role": "system", "content": system}]
        prompts.chat([*self._begin, {"role": "user", "content": "question"}])
        self.messages = [*self._begin]

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [*self._begin]

    def ask(self, question: str, write: Callable[[str], object]) -> str:
        """The answer, which Ctrl-C ends early; what there is of it is kept as the model's turn.

        Args:
            write: called with each finished word.

        Raises:
            UserError: the conversation is too long, or the template refuses it. It stays as it was.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = self._prompts.chat(asked)
        if len(ids) > self._limit:
            raise UserError(
                f"The conversation is {len(ids)} tokens long and the model reads at most {self._limit}. /clear begins "
                "a new one."
            )
        tokenizer = self._prompts.tokenizer
        streamer = AnswerStreamer(tokenizer, ends_of(self._config), write)
        pad = pad_token(self._model, tokenizer)
        try:
            generate_ids(self._model, [ids], pad, 1, generation_config=self._config, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
        answer: str = tokenizer.decode(streamer.ids, skip_special_tokens=True).strip()
        if answer:  # a template may refuse an empty turn for ever after
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer
