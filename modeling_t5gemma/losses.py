"""Losses that take what they need by name."""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORED = -100


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not ``IGNORED``, in nats.

    Rows with an ignored label are dropped before anything is cast to float32: at 256,000 words each costs 1 MB.

    Args:
        logits: float (..., V), already aligned with the labels.
        labels: int64 (...).
        num_items_in_batch: what to divide the sum by instead of this batch's own number of labels, so that
            micro-batches of an accumulated batch weigh by their tokens.

    Returns:
        float32 scalar; 0 with a graph when every label is ignored.
    """
    kept = labels != IGNORED
    total = F.cross_entropy(logits[kept].float(), labels[kept].to(logits.device), reduction="sum")
    count = kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(total.device)
    return total / count
