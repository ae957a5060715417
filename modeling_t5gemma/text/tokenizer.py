"""The tokenizer of an encoder-decoder, which says by itself what begins, pads and ends a text of its checkpoint."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


class Seq2SeqTokenizer(PreTrainedTokenizerFast):
    """Sources begin with ``<bos>`` or not, as the files say, and have no end; targets (``text_target``) begin
    with nothing, since the model puts its start token there, and end with ``<eos>``. Both are padded on the right.

    All of it but targets is in the saved files, which transformers reads as a plain fast tokenizer where this package
    is not imported.
    """

    padding_side = "right"
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    _of_sources: Any = None

    @property
    def begins(self) -> bool:
        """Whether sources begin with ``<bos>``."""
        return bool(self.backend_tokenizer.encode("").ids)

    def _switch_to_target_mode(self) -> None:
        if self._of_sources is None:
            self._of_sources = self.backend_tokenizer.post_processor
        end = self.eos_token
        self.backend_tokenizer.post_processor = TemplateProcessing(
            single=["$A", end], pair=["$A", "$B", end], special_tokens=[(end, self.eos_token_id)]
        )

    def _switch_to_input_mode(self) -> None:
        if self._of_sources is not None:
            self.backend_tokenizer.post_processor, self._of_sources = self._of_sources, None


def like(tokenizer: Any, backend: Tokenizer, cls: type[Any], without: Container[str] = (), **changes: Any) -> Any:
    """A fast tokenizer of class ``cls`` on ``backend``, and in all else like another.

    Args:
        without: words that are no special tokens any more.
        changes: arguments of ``cls`` that are not like the other's.
    """
    kept = {
        "extra_special_tokens": [token for token in tokenizer.extra_special_tokens if str(token) not in without],
        **{role: token for role, token in tokenizer.special_tokens_map.items() if token not in without},
        **{
            name: getattr(tokenizer, name)
            for name in ("chat_template", "padding_side", "model_max_length", "model_input_names", "name_or_path")
        },
    }
    return cls(tokenizer_object=backend, **{**kept, **changes})
