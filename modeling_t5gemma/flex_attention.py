"""torch's FlexAttention behind the door: the pattern as a block mask, the softcap as a score modifier.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head_dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from .masks import AttentionPattern, reach


def flex_attention(
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention as in ``attention.attention``: (B, N, T, H)."""

    def cap(score: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return torch.tanh(score / softcap) * softcap

    # The kernel needs contiguous inputs on some devices; projections come transposed.
    out: torch.Tensor = _kernel(q_BNTH.device.type)(
        q_BNTH.contiguous(),
        k_BGSH.contiguous(),
        v_BGSH.contiguous(),
        score_mod=None if softcap is None else cap,
        block_mask=pattern.derive("flex", lambda: _block_mask(pattern)),
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BGSH.shape[1],
    )
    return out


@cache
def _kernel(device: str) -> Any:
    """Compiled where compiling pays; on the CPU the uncompiled reference, which is exact but dense."""
    return torch_flex_attention if device == "cpu" else torch.compile(torch_flex_attention, dynamic=False)


def _block_mask(pattern: AttentionPattern) -> BlockMask | None:
    if pattern.sees_everything:
        return None
    tensors = (pattern.query_positions, pattern.key_positions, pattern.key_valid, pattern.query_segments)
    rows = max(len(tensor) for tensor in tensors if tensor is not None)

    def see(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        def at(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return table[b, index] if table.shape[0] > 1 else table[0, index]

        distance = at(pattern.query_positions, t) - at(pattern.key_positions, s)
        seen = distance >= 0 if pattern.causal else distance == distance
        if pattern.window is not None:
            seen = seen & (distance.abs() <= reach(pattern.window))
        if pattern.key_valid is not None:
            seen = seen & at(pattern.key_valid, s)
        if pattern.query_segments is not None and pattern.key_segments is not None:
            seen = seen & (at(pattern.query_segments, t) == at(pattern.key_segments, s))
        return seen

    length, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    return create_block_mask(see, rows, None, length, keys, device=str(pattern.key_positions.device))
