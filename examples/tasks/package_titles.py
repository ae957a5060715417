"""The choices of ``package_titles.yaml``."""

from __future__ import annotations

from typing import Any

CHOICES = 10


def with_choices(dataset: Any) -> Any:
    """Add to each row ``choices``, its own title and those of the rows after it, and ``own``, the place of its own."""
    titles = dataset["completion"]

    def choose(row: dict[str, Any], number: int) -> dict[str, Any]:
        choices = [titles[(number + step) % len(titles)] for step in range(1, CHOICES)]
        own = number % CHOICES
        choices.insert(own, row["completion"])
        return {"choices": choices, "own": own}

    return dataset.map(choose, with_indices=True)
