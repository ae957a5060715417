"""The encoder as a sentence-transformers model (the ``embed`` extra).

sentence-transformers loads transformers' own class for a T5Gemma config and knows no ``AdaptedSeq2SeqConfig``, so the
encoder comes in as a module of ours::

    from modeling_t5gemma.embeddings import sentence_transformer

    model = sentence_transformer("my-checkpoint")
    vectors = model.encode(["one text", "another"])
    model.save("my-embeddings")
    again = SentenceTransformer("my-embeddings", trust_remote_code=True)

sentence-transformers asks for ``trust_remote_code`` for every module that is not its own; this one is imported from
the installed package. The model goes into ``mteb.evaluate`` as it is. examples/embed.py trains one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling
from transformers import AutoModelForTextEncoding, AutoTokenizer

import modeling_t5gemma  # noqa: F401  # registers the Auto classes

from .errors import UserError
from .io.checkpoints import check_files, locate, told
from .text.rules import unbegun, with_rows, with_rule

POOLINGS = ("mean", "lasttoken")


class T5GemmaTextEncoder(InputModule):
    """An encoder and its tokenizer; adds ``token_embeddings`` (B, S, D) to the features.

    Texts are padded on the right. They begin with ``<bos>`` where the tokenizer puts one, as in training.

    Args:
        checkpoint: a folder or Hub id, of an encoder-decoder or of an encoder alone.
        max_seq_length: longer texts are cut to so many tokens; the config's max_position_embeddings by default.
        model_kwargs: for ``from_pretrained``, such as ``dtype``.
        hub_kwargs: for the model's and the tokenizer's ``from_pretrained``, such as ``revision``.

    Raises:
        UserError: the checkpoint has no such encoder, max_seq_length is more than it was made for, or there is no
            ``<bos>`` where one is needed.
    """

    config_file_name = "sentence_bert_config.json"  # config.json is the encoder's
    config_keys = ["max_seq_length"]  # noqa: RUF012

    def __init__(
        self,
        checkpoint: str,
        max_seq_length: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        hub_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        hub_kwargs = hub_kwargs or {}
        if os.path.isdir(checkpoint):
            check_files(Path(checkpoint, hub_kwargs.get("subfolder") or ""))
        safely = {"trust_remote_code": False, **hub_kwargs}
        with told(f"The encoder of {checkpoint} cannot be loaded", "Give an encoder-decoder, or an encoder of one"):
            self.auto_model = AutoModelForTextEncoding.from_pretrained(
                checkpoint, use_safetensors=True, **safely, **(model_kwargs or {})
            )
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, **safely)
        if not hasattr(self.auto_model.config, "encoder"):
            raise UserError(
                f"{checkpoint} is a {self.auto_model.config.model_type}. Give an encoder-decoder of this package, or "
                "an encoder of one."
            )
        config = self.auto_model.config
        longest = config.encoder.max_position_embeddings
        self.max_seq_length = longest if max_seq_length is None else max_seq_length
        if not 2 <= self.max_seq_length <= longest:
            raise UserError(f"max_seq_length is {max_seq_length}; {checkpoint} was made for 2 to {longest} tokens.")
        self.tokenizer = with_rule(with_rows(tokenizer, config.encoder.vocab_size), config)

    def get_embedding_dimension(self) -> int:
        """D, the width of a token's embedding."""
        return int(self.auto_model.config.encoder.hidden_size)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, max_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Texts to ``input_ids`` and ``attention_mask``, int64 (B, S).

        Args:
            inputs: strings. An empty one has no tokens but ``<bos>``.
            prompt: stands before each.
            max_length: instead of max_seq_length.
        """
        texts = [unbegun(self.tokenizer, (prompt or "") + text) for text in inputs]
        rows = self.tokenizer(texts, truncation=True, max_length=max_length or self.max_seq_length)["input_ids"]
        shape = len(rows), max(1, *map(len, rows))
        ids = torch.full(shape, self.auto_model.config.encoder.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def count_longer(self, texts: Sequence[str]) -> int:
        """How many texts are cut."""
        rows = self.tokenizer([unbegun(self.tokenizer, text) for text in texts], verbose=False)["input_ids"]
        return sum(len(row) > self.max_seq_length for row in rows)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        encoded = self.auto_model(features["input_ids"], attention_mask=features["attention_mask"])
        return {**features, "token_embeddings": encoded.last_hidden_state}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.auto_model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> T5GemmaTextEncoder:
        place: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        saved = cls.load_config(model_name_or_path, cache_folder=cache_folder, **place)
        return cls(
            model_name_or_path, **saved, model_kwargs=model_kwargs, hub_kwargs={**place, "cache_dir": cache_folder}
        )


def sentence_transformer(
    checkpoint: str,
    pooling: str = "mean",
    max_seq_length: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """A sentence-transformers model on a checkpoint's encoder.

    Args:
        checkpoint: a folder or Hub id.
        pooling: "mean" over the real tokens, or "lasttoken" (the paper's classification head reads that one).
        max_seq_length: longer texts are cut.
        model_kwargs: for the encoder's ``from_pretrained``, such as ``dtype``.
        kwargs: for ``SentenceTransformer``, such as ``device`` or ``prompts``.

    Raises:
        UserError: for another pooling, or what ``T5GemmaTextEncoder`` refuses.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling is {pooling!r}; it can be one of {POOLINGS}.")
    encoder = T5GemmaTextEncoder(str(locate(checkpoint)), max_seq_length, model_kwargs)
    return SentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode=pooling)], **kwargs
    )
