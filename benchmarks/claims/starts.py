"""Beginnings of separate cross-attention that the converter does not have.

Shapes: N tokens, D width of the decoder, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import Gemma2ForCausalLM, PreTrainedModel

from .text import BOS, Ids

FITTED_ON = 64  # windows
RIDGE = 1e-2  # of the mean squared entry of the encoder's output


@torch.no_grad()
def silence(model: PreTrainedModel) -> None:
    """Cross-attention adds nothing until the gains of the norms after it, 1 + weight, have moved from 0."""
    for layer in model.model.decoder.layers:
        layer.post_cross_attn_layernorm.weight.fill_(-1)


@torch.no_grad()
def fit_keys_and_values(model: PreTrainedModel, source: Gemma2ForCausalLM, windows: Ids) -> None:
    """Make keys and values of cross-attention from the encoder's output that are close to those of self-attention.

    Ridge regression takes the encoder's output of a text to what the source's layer projects its keys and values from
    on the same text. In the rest, cross-attention remains the copy of self-attention that it was; it has no RoPE.
    """
    ids = torch.from_numpy(windows.astype(np.int64))
    encoded = model.model.encoder(input_ids=ids).last_hidden_state.flatten(0, 1).double()
    gram = encoded.T @ encoded
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    for layer, states in zip(model.model.decoder.layers, _projected_from(source, ids)):
        map_ED = torch.linalg.solve(gram, encoded.T @ states.flatten(0, 1).double())
        for projection in (layer.cross_attn.k_proj, layer.cross_attn.v_proj):
            projection.weight.copy_((map_ED @ projection.weight.double().T).T)


def _projected_from(source: Gemma2ForCausalLM, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """The normed input of each layer's self-attention, (B, L, D); the first token, <bos>, is left out."""
    begun = torch.cat([torch.full((len(ids), 1), BOS), ids], dim=1)
    hidden = source.model(input_ids=begun, use_cache=False, output_hidden_states=True).hidden_states
    for layer, states in zip(source.model.layers, hidden):
        yield layer.input_layernorm(states)[:, 1:]
