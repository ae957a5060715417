"""WMT23's test sets, for the harness: those that sacrebleu downloads."""

from __future__ import annotations

from typing import Any


def load(pair: str, **_: Any) -> dict[str, Any]:
    """The ``test`` split, with the columns ``source`` and ``target``.

    Args:
        pair: of languages, "en-de".
        _: whatever else the harness hands over.
    """
    from datasets import Dataset
    from sacrebleu.utils import get_reference_files, get_source_file

    places = {"source": get_source_file("wmt23", pair), "target": get_reference_files("wmt23", pair)[0]}
    columns = {}
    for name, place in places.items():
        with open(place, encoding="utf-8") as file:
            columns[name] = [line.rstrip("\n") for line in file]
    return {"test": Dataset.from_dict(columns)}
