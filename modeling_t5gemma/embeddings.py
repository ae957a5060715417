"""The encoder as a sentence-transformers model (the ``embed`` extra).

sentence-transformers loads transformers' own class for a T5Gemma config and knows no ``AdaptedSeq2SeqConfig``, so the
encoder comes in as a module of ours::

    from modeling_t5gemma.embeddings import sentence_transformer

    model = sentence_transformer("my-checkpoint")
    vectors = model.encode(["one text", "another"])
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling
from transformers import AutoModelForTextEncoding, AutoTokenizer

import modeling_t5gemma  # noqa: F401  # registers the Auto classes


class T5GemmaTextEncoder(InputModule):
    """An encoder and its tokenizer; adds ``token_embeddings`` (B, S, D) to the features.

    Args:
        checkpoint: a folder or Hub id, of an encoder-decoder or of an encoder alone.
        max_seq_length: longer texts are cut to so many tokens; the config's max_position_embeddings by default.
        model_kwargs: for ``from_pretrained``, such as ``dtype``.
    """

    def __init__(
        self, checkpoint: str, max_seq_length: int | None = None, model_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.auto_model = AutoModelForTextEncoding.from_pretrained(checkpoint, **(model_kwargs or {}))
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        stack = self.auto_model.config.encoder
        self.max_seq_length = max_seq_length or stack.max_position_embeddings

    def get_embedding_dimension(self) -> int:
        """D, the width of a token's embedding."""
        return int(self.auto_model.config.encoder.hidden_size)

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        texts = self._prepend_prompt(inputs, prompt) if prompt else list(inputs)
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        encoded = self.auto_model(features["input_ids"], attention_mask=features["attention_mask"])
        return {**features, "token_embeddings": encoded.last_hidden_state}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.auto_model.save_pretrained(output_path)
        self.save_tokenizer(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> T5GemmaTextEncoder:
        return cls(model_name_or_path)


def sentence_transformer(
    checkpoint: str, pooling: str = "mean", max_seq_length: int | None = None, **kwargs: Any
) -> SentenceTransformer:
    """A sentence-transformers model on a checkpoint's encoder.

    Args:
        checkpoint: a folder or Hub id.
        pooling: "mean" over the real tokens, or "lasttoken" (the paper's classification head reads that one).
        max_seq_length: longer texts are cut.
        kwargs: for ``SentenceTransformer``, such as ``device``.
    """
    encoder = T5GemmaTextEncoder(checkpoint, max_seq_length)
    return SentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode=pooling)], **kwargs
    )
