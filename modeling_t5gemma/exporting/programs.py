"""A model as two programs without a cache object: the encoder, and one step of the decoder.

Both kinds of cross-attention look alike from outside. The encoder's program returns the keys and values that each
decoder layer attends to: with separate cross-attention those that the layer's own projections make of the encoder's
output, with layerwise those of the paired encoder layer. The step takes them, and a cache of so many slots as the
caller made; it changes nothing and returns the one new column, which the caller puts in its place.

Shapes: B batch, S source length, L decoder layers, G key/value heads, H head_dim, C slots of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from ..cross_attention import kind_of
from ..stacks import T5GemmaEncoderOutput
from .decoding import Decoding

ENCODER_INPUTS = ("input_ids", "attention_mask")
ENCODER_OUTPUTS = ("cross_keys", "cross_values")
STEP_INPUTS = ("input_ids", "slot", "attention_mask", "cross_keys", "cross_values", "keys", "values")
STEP_OUTPUTS = ("logits", "new_keys", "new_values")
# Sizes of the inputs that are traced. 0 and 1 would be taken for constants, and equal ones for each other.
_ROWS, _SOURCE, _SLOTS = 2, 5, 7


def make_programs(model: Any, decoding: Decoding) -> tuple[ExportedProgram, ExportedProgram]:
    """The encoder's and the step's program, for any batch, source length and number of slots.

    Attention is written out in torch's own operators, so that the programs run where this package is not installed:
    scores are dense, B x N x S x S in the encoder.
    """
    capped = any(stack.attn_logit_softcapping is not None for stack in (model.config.encoder, model.config.decoder))
    model.set_attn_implementation("eager" if capped else "sdpa")
    rows, source, slots = Dim("batch"), Dim("source"), Dim("slots")
    ids = torch.ones(_ROWS, _SOURCE, dtype=torch.long)
    cross = {1: rows, 3: source}
    own = {1: rows, 3: slots}
    with torch.no_grad():
        encoder = _Encoder(model)
        encoder_program = torch.export.export(
            encoder, (ids, torch.ones_like(ids)), dynamic_shapes=({0: rows, 1: source}, {0: rows, 1: source})
        )
        cache = empty_cache(decoding, _ROWS, _SLOTS)
        step_program = torch.export.export(
            _Step(model),
            (ids[:, :1], torch.zeros(1, dtype=torch.long), torch.ones_like(ids), *encoder(ids, ids), *cache),
            dynamic_shapes=({0: rows}, None, {0: rows, 1: source}, cross, cross, own, own),
        )
    return encoder_program, step_program


def empty_cache(decoding: Decoding, rows: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (L, B, G, C, H) of nothing decoded yet."""
    shape = (decoding.layers, rows, decoding.heads, slots, decoding.head_dim)
    dtype = getattr(torch, decoding.dtype)
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


class _Encoder(nn.Module):
    """The encoder, and what the decoder makes of its output once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder
        decoder = model.model.decoder
        self.pairs = decoder.config.cross_attention_map
        projects = kind_of(decoder.config).weights
        self.cross_attention: Any = nn.ModuleList(layer.cross_attn for layer in decoder.layers if projects)
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (B, S) twice, the mask 1 where a token is no padding, to keys and values (L, B, G, S, H)."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if self.pairs is None:
            pairs = [layer.key_values(encoded.last_hidden_state) for layer in self.cross_attention]
        else:
            pairs = [encoded.key_values[layer] for layer in self.pairs]
        return torch.stack([keys for keys, _ in pairs]), torch.stack([values for _, values in pairs])


class _Step(nn.Module):
    """The decoder and its head, for one token a row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        slot: torch.Tensor,
        attention_mask: torch.Tensor,
        cross_keys: torch.Tensor,
        cross_values: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next token's logits.

        Args:
            input_ids: int64 (B, 1), the tokens decoded last.
            slot: int64 (1,), how many were decoded before them.
            attention_mask: int64 (B, S), the source's.
            cross_keys, cross_values: (L, B, G, S, H), from the encoder's program.
            keys, values: (L, B, G, C, H), of the tokens before; slots from ``slot`` on are not read.

        Returns:
            Logits (B, V), and keys and values (L, B, G, 1, H) for the slot.
        """
        own = [_Slots(k, v, slot) for k, v in zip(keys.unbind(0), values.unbind(0), strict=True)]
        cross = list(zip(cross_keys.unbind(0), cross_values.unbind(0), strict=True))
        cache = EncoderDecoderCache(Cache(layers=own), Cache(layers=[_held(*pair) for pair in cross]))
        cache.is_updated = dict.fromkeys(range(len(own)), True)
        # Of the encoder's output itself nothing is read but its length.
        shape = (cross_keys.shape[1], cross_keys.shape[3], 1)
        encoded = T5GemmaEncoderOutput(
            last_hidden_state=cross_keys.new_zeros(shape), attention_mask=attention_mask, key_values=tuple(cross)
        )
        decoded = self.decoder(
            input_ids=input_ids, past_key_values=cache, encoder_outputs=encoded, use_cache=True
        ).last_hidden_state
        new_keys, new_values = zip(*(layer.new for layer in own), strict=True)
        return self.lm_head(decoded)[:, -1], torch.stack(new_keys), torch.stack(new_values)


class _Slots(StaticLayer):
    """A layer's cache that is left as it is: what is new is kept apart."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, slot
        self.is_initialized = True
        self.new: tuple[torch.Tensor, torch.Tensor]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = key_states, value_states
        slot = self.cumulative_length
        return self.keys.index_copy(2, slot, key_states), self.values.index_copy(2, slot, value_states)


def _held(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
