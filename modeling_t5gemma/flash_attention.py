"""FlashAttention 2 and 3 behind the door: rows laid end to end without padding, two lists of lengths.

The kernels align the last query of a sequence with its last key and know no mask, so everything a pattern says becomes
a layout: padding is left out, each packed document is a sequence of its own, queries and keys have their own lengths.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head_dim; P, K real queries and keys in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from .masks import AttentionPattern, reach

_MODULES = {2: "flash_attn", 3: "flash_attn_interface"}


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a batch are.

    Attributes:
        queries, keys: int64 (P,) and (K,), indices into the flattened (B * T) and (B * S), sequence after sequence.
        query_ends, key_ends: int32 (sequences + 1,), cumulative lengths.
        longest_query, longest_key: the greatest lengths.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


def flash_attention(
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float,
    softcap: float | None,
    dropout: float = 0.0,
    version: int = 2,
    kernel: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention as in ``attention.attention``: (B, N, T, H), 0 for queries that are padding.

    Args:
        kernel: a function with the signature of ``flash_attn_varlen_func``, instead of the installed one.
    """
    rows, heads, length, width = q_BNTH.shape
    layout = pattern.derive(f"flash{rows}", lambda: make_layout(pattern, rows))
    q_PNH, k_KGH, v_KGH = (
        x.transpose(1, 2).flatten(0, 1)[index]
        for x, index in ((q_BNTH, layout.queries), (k_BGSH, layout.keys), (v_BGSH, layout.keys))
    )
    beyond = -1 if pattern.window is None else reach(pattern.window)
    options = {"dropout_p": dropout} if version == 2 else {}
    out_PNH = (kernel or import_module(_MODULES[version]).flash_attn_varlen_func)(
        q_PNH,
        k_KGH,
        v_KGH,
        cu_seqlens_q=layout.query_ends,
        cu_seqlens_k=layout.key_ends,
        max_seqlen_q=layout.longest_query,
        max_seqlen_k=layout.longest_key,
        softmax_scale=scale,
        causal=pattern.causal,
        window_size=(beyond, 0 if pattern.causal else beyond),
        softcap=softcap or 0.0,
        **options,
    )
    out = q_BNTH.new_zeros((rows * length, heads, width)).index_copy(0, layout.queries, out_PNH)
    return out.unflatten(0, (rows, length)).transpose(1, 2)


def make_layout(pattern: AttentionPattern, rows: int) -> Layout:
    """The layout of a pattern for a batch of ``rows``."""
    query_positions = pattern.query_positions.expand(rows, -1)
    key_positions = pattern.key_positions.expand(rows, -1)
    queries_real = torch.ones_like(query_positions, dtype=torch.bool)
    keys_real = torch.ones_like(key_positions, dtype=torch.bool)
    if pattern.query_valid is not None:
        queries_real = queries_real & pattern.query_valid
    if pattern.key_valid is not None:
        keys_real = keys_real & pattern.key_valid
    if pattern.causal:
        # The slots of a static cache that are not written yet come after every query.
        keys_real = keys_real & (key_positions <= query_positions.amax(1, keepdim=True))
    row = torch.arange(rows, device=query_positions.device)[:, None]
    query_sequence, key_sequence, sequences = row.expand_as(query_positions), row.expand_as(key_positions), rows
    if pattern.query_segments is not None and pattern.key_segments is not None:
        documents = int(max(pattern.query_segments.amax(), pattern.key_segments.amax())) + 1
        query_sequence = row * documents + pattern.query_segments
        key_sequence = row * documents + pattern.key_segments
        sequences = rows * documents
    queries, query_ends, longest_query = _lay(query_sequence, queries_real, sequences)
    keys, key_ends, longest_key = _lay(key_sequence, keys_real, sequences)
    return Layout(queries, keys, query_ends, key_ends, longest_query, longest_key)


def _lay(sequence: torch.Tensor, real: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Flat indices of the real tokens by sequence, their order kept; cumulative lengths; the greatest length."""
    index = real.flatten().nonzero()[:, 0]
    of_token = sequence.flatten()[index]
    lengths = torch.bincount(of_token, minlength=sequences)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return index[of_token.argsort(stable=True)], ends, int(lengths.max())
