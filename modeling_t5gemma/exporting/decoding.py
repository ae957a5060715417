"""What a program that decodes with an export has to know, beside the export."""

from __future__ import annotations

from dataclasses import dataclass

from ..inference.loading import Checkpoint
from ..inference.sampling import ends_of, generation_config, pad_token


@dataclass(frozen=True)
class Decoding:
    """Of one export.

    Attributes:
        start: the token that decoding begins with.
        ends: the tokens that end a text.
        pad: what fills a batch.
        layers, heads, head_dim: of the decoder's self-attention cache; heads are those of keys and values.
        dtype: of the cache, as torch names it.
    """

    start: int
    ends: list[int]
    pad: int
    layers: int
    heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str) -> Decoding:
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        config = model.config.decoder
        return cls(
            start=model.decoder_start_token_id(),
            ends=ends_of(generation_config(model, tokenizer, max_new_tokens=1)),
            pad=pad_token(model, tokenizer),
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )
