"""How long the windows of an objective can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import UserError
from .combining import Mixture
from .denoising import SpanCorruption
from .example import Objective


def longest_window(objective: Objective, source_length: int, target_length: int) -> int:
    """The most tokens of a window whose longest source and target fit.

    Raises:
        UserError: not even the shortest window fits.
    """

    def fits(window: int) -> bool:
        source, target = objective.lengths(window)
        return source <= source_length and target <= target_length

    shortest = objective.shortest()
    if not fits(shortest):
        source, target = objective.lengths(shortest)
        raise UserError(
            f"A source of {source_length} tokens and a target of {target_length} are too short for {objective.name}: "
            f"its shortest window, of {shortest} tokens, takes {source} and {target}. Allow longer ones."
        )
    # No objective drops a token, so a window is no longer than its source and target together.
    return _last(fits, shortest, source_length + target_length)


def check_window(objective: Objective, window: int) -> None:
    """Refuse a window that an objective cannot take.

    Raises:
        UserError: the window is too short, or needs more spans than there are sentinels.
    """
    if window < objective.shortest():
        raise UserError(
            f"A window of {window} tokens is too short for {objective.name}, which needs {objective.shortest()}. "
            "Take longer windows."
        )
    corruptions = [part for part in _parts(objective) if isinstance(part, SpanCorruption)]

    def fits(length: int) -> bool:
        return all(part.sentinels_needed(length) <= len(part.sentinels) for part in corruptions)

    if fits(window):
        return
    worst = max(corruptions, key=lambda part: part.sentinels_needed(window) - len(part.sentinels))
    shortest = objective.shortest()
    shorter = f"take windows of at most {_last(fits, shortest, window)} tokens, " if fits(shortest) else ""
    raise UserError(
        f"{objective.name}: a window of {window} tokens has {worst.sentinels_needed(window)} spans with the denoiser "
        f"{worst.name}, and there are {len(worst.sentinels)} sentinels. Give more `sentinels`, {shorter}or choose "
        "denoisers with longer spans or a lower rate."
    )


def _parts(objective: Objective) -> Iterator[Objective]:
    """The objectives that are no mixtures."""
    if isinstance(objective, Mixture):
        for part in objective.objectives:
            yield from _parts(part)
    else:
        yield objective


def _last(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from ``low`` (which fits) to ``high`` that fits, where all that fit come before the others."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
