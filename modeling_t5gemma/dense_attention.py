"""Attention with all scores at once: a step of decoding, where a query or a few meet all the keys so far.

A step is many small operations, so what counts is how few they are: query heads that share a key/value head are one
product, keys in two places are not copied together, and softcap * tanh(s / softcap) is a sigmoid as in
``blocked_attention``, which says why.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head_dim; P pairs of a row and a key/value
head, U the queries of all heads that share one (N / G * T).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import AttentionPattern


def dense_attention(
    q_BNTH: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    pattern: AttentionPattern,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention as in ``attention.attention``, over keys and values that lie in one place or several.

    Scores, softmax and sums are float32 (float64 for float64 inputs) whatever the inputs are.

    Args:
        q_BNTH: queries (B, N, T, H).
        parts: keys and values, each (B, G, S', H); the pattern's S keys are those of all parts, in this order.

    Returns:
        (B, N, T, H) in the dtype of the queries. A query that sees no key gives 0.
    """
    rows, heads, queries, width = q_BNTH.shape
    pairs = rows * parts[0][0].shape[1]
    dtype = torch.float64 if q_BNTH.dtype == torch.float64 else torch.float32
    factor = scale if softcap is None else -2 * scale / softcap
    q_PUH = (q_BNTH.to(dtype) * factor).reshape(pairs, -1, width)
    k_PSH, v_PSH = ([x.to(dtype).reshape(pairs, -1, width) for x in each] for each in zip(*parts))
    scores = [torch.bmm(q_PUH, k.mT) for k in k_PSH]
    logits_PUS = scores[0] if len(scores) == 1 else torch.cat(scores, dim=2)
    if softcap is not None:
        logits_PUS = logits_PUS.sigmoid_() * (-2 * softcap)
    hidden = pattern.hidden()
    if hidden is None:
        p_PUS = logits_PUS.softmax(dim=2)
    else:
        logits_BNTS = logits_PUS.view(rows, heads, queries, -1).masked_fill(hidden, torch.finfo(dtype).min)
        # A row that sees nothing is uniform after the softmax; it has to be 0.
        p_PUS = logits_BNTS.softmax(dim=3).masked_fill(hidden, 0.0).view_as(logits_PUS)
    first, *others = zip(p_PUS.split([v.shape[1] for v in v_PSH], dim=2), v_PSH)
    out_PUH = torch.bmm(*first)
    for other in others:
        out_PUH = torch.baddbmm(out_PUH, *other)
    return out_PUH.view(q_BNTH.shape).to(q_BNTH.dtype)
