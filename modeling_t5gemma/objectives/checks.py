"""What values of objectives can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError


def check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise UserError(f"rate is {rate}; it must be above 0 and below 1.")


def check_weight(weight: float, key: str = "weight") -> None:
    if not 0 < weight < math.inf:
        raise UserError(f"{key} is {weight}; it must be above 0 and finite.")


def check_ids(ids: Sequence[Any], what: str) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < 2**31:
            raise UserError(f"{what} holds {shown(token)}; it must be a list of token ids.")
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise UserError(f"{what} holds {twice} more than once. Each id marks one span: remove the repetition.")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
