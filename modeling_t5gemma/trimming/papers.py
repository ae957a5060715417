"""What a trimmed checkpoint says of itself: record, kept ids, card, notice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..conversion.documents import write_notice
from ..conversion.families import family_of
from ..io.text_files import read_json
from ..training.tokenizing import vocabulary_of
from .source import Source
from .texts import Change

TRIM_FILE, KEPT_FILE = "trim.json", "kept_ids.json"


def write_papers(
    folder: Path,
    source: Source,
    kept: Sequence[int],
    *,
    name: str,
    texts: Sequence[str],
    of_texts: Change | None,
    held_out: Change | None,
) -> None:
    """Write ``trim.json`` and ``kept_ids.json``, and add to ``README.md`` and ``NOTICE``.

    Args:
        folder: with what the source has of them.
        kept: the source's ids of the new tokens, in their order.
        name: of the checkpoint, for a card that there is none of yet.
        texts: names of those that it was trimmed to.
        of_texts, held_out: what became of a sample of them, and of others.
    """
    before: dict[str, Any] = {}
    original = list(kept)
    if (source.folder / KEPT_FILE).is_file():  # so that the ids lead back to the vocabulary before any trimming
        before = read_json(source.folder / TRIM_FILE)
        first: list[int] = json.loads((source.folder / KEPT_FILE).read_text(encoding="utf-8"))
        original = [first[index] for index in kept]
    record = {
        "source": source.name,
        "tokens": [source.rows, len(kept)],
        "texts": list(texts),
        "of_texts": of_texts and asdict(of_texts),
        "held_out": held_out and asdict(held_out),
        "vocabulary": before.get("vocabulary") or vocabulary_of(source.tokenizer, "").fingerprint,
    }
    (folder / TRIM_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / KEPT_FILE).write_text(json.dumps(original) + "\n", encoding="utf-8")
    what = f"{len(kept):,} of {source.rows:,} tokens"
    change = f"their vocabulary was trimmed to {what}"
    legal = family.legal if (family := family_of(source.config)) is not None else None
    if (notice := folder / "NOTICE").is_file():
        told = notice.read_text(encoding="utf-8").rstrip()
        notice.write_text(f"{told}\n\nThe weights in this folder were modified: {change}.\n", encoding="utf-8")
    elif legal is not None:
        write_notice(folder, legal, change)
    card = folder / "README.md"
    told = card.read_text(encoding="utf-8").rstrip() if card.is_file() else f"# {name}"
    origin = f" It was trimmed to {', '.join(texts)}." if texts else ""
    lost = f" Of held-out text {held_out}." if held_out else ""
    card.write_text(
        f"{told}\n\n## Vocabulary\n\nThe vocabulary has {what} (`t5gemma trim`); every other text is spelled in "
        f"smaller pieces.{origin}{lost} `{KEPT_FILE}` lists the old ids of its tokens in the order of the new ones.\n",
        encoding="utf-8",
    )
