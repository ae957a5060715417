"""Samples put together into rows of a fixed length, on the encoder's and the decoder's side at once.

Two-dimensional vector bin packing. A row is begun with the largest sample left, goes on with the one that lies best
along the room left (the dot product of Panigrahy et al., "Heuristics for Vector Bin Packing", 2011), and is finished
by the pair that fits best. The side that has fewer tokens in all is filled in that ratio, so that every row is like
what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import UserError

# A row is finished by a pair once it has room for fewer than so many samples of mean size. All pairs of so many
# candidates are tried.
_FINISH, _CANDIDATES = 3.0, 96
# The last rows share what is left evenly, rather than leave one nearly empty.
_SHARING = 8


def pack(lengths: npt.NDArray[np.int64], capacity: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Rows of samples, every sample in exactly one; the same rows for the same lengths.

    Takes time in proportion to the square of the number of samples.

    Args:
        lengths: tokens of each sample's source and target, (samples, 2).
        capacity: tokens of a row's sources and targets.

    Returns:
        The sample numbers of each row, int64; rows of large samples come first.

    Raises:
        UserError: a sample is larger than a row.
    """
    too_large = np.flatnonzero((lengths > np.array(capacity)).any(axis=1))
    if len(too_large):
        source, target = lengths[too_large[0]].tolist()
        raise UserError(
            f"Sample {too_large[0]} has {source} source and {target} target tokens, more than a row's {capacity[0]} "
            f"and {capacity[1]}. Give longer rows or a shorter window."
        )
    shares = lengths / np.array(capacity, np.float64)
    order = np.argsort(-shares.sum(axis=1), kind="stable")
    source, target = np.ascontiguousarray(shares[order].T)
    left = shares.sum(axis=0)
    planned = math.ceil(round(float(left.max(initial=0)), 9))
    rows: list[npt.NDArray[np.int64]] = []
    while len(order):
        goal = _goal(float(left[0]), float(left[1]), planned - len(rows))
        chosen = _fill(source, target, goal)
        rows.append(order[chosen])
        left -= (source[chosen].sum(), target[chosen].sum())
        order, source, target = (np.delete(values, chosen) for values in (order, source, target))
    return rows


def _goal(source: float, target: float, rows: int) -> tuple[float, float]:
    """How far to fill a row, when ``rows`` are to take what is left; in shares of the capacity."""
    parts = max(source, target, 1e-9)
    if 0 < rows <= _SHARING:
        parts = max(parts, float(rows))
    return source / parts, target / parts


def _fill(
    source: npt.NDArray[np.float64], target: npt.NDArray[np.float64], goal: tuple[float, float]
) -> Sequence[int]:
    """The samples of one row, of candidates in falling order of size; both sides in shares of the capacity."""
    chosen = [0]
    filled = [float(source[0]), float(target[0])]
    mean = float(source.mean()), float(target.mean())
    free_source = source.copy()
    free_source[0] = np.inf
    # Sums of shares are not exact: a row that is full to the last token must not count as too full.
    full = 1 + 1e-9
    while True:
        room = full - filled[0], full - filled[1]
        fits = (free_source <= room[0]) & (target <= room[1])
        wanted = max(goal[0] - filled[0], 0.0), max(goal[1] - filled[1], 0.0)
        if wanted[0] > _FINISH * mean[0] or wanted[1] > _FINISH * mean[1]:
            best = int(np.where(fits, source * wanted[0] + target * wanted[1], -1.0).argmax())
            picked = [best] if fits[best] else []
        else:
            picked = _finish(source, target, np.flatnonzero(fits), room, wanted)
        if not picked:
            return chosen
        for sample in picked:
            chosen.append(sample)
            filled = [filled[0] + float(source[sample]), filled[1] + float(target[sample])]
            free_source[sample] = np.inf


def _finish(
    source: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    candidates: npt.NDArray[np.int64],
    room: tuple[float, float],
    wanted: tuple[float, float],
) -> list[int]:
    """The sample or pair that comes nearest to what is wanted; none if nothing comes nearer than nothing."""
    if not len(candidates):
        return []
    if len(candidates) > _CANDIDATES:
        candidates = candidates[np.arange(_CANDIDATES) * len(candidates) // _CANDIDATES]
    sources, targets = source[candidates], target[candidates]
    sums, target_sums = sources[:, None] + sources, targets[:, None] + targets
    np.fill_diagonal(sums, sources)  # the diagonal is one sample alone
    np.fill_diagonal(target_sums, targets)
    distance = np.abs(sums - wanted[0]) + np.abs(target_sums - wanted[1])
    distance[(sums > room[0]) | (target_sums > room[1])] = np.inf
    first, second = divmod(int(distance.argmin()), len(candidates))
    if distance[first, second] >= wanted[0] + wanted[1]:
        return []
    return sorted({int(candidates[first]), int(candidates[second])})
