"""The texts that an export is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..inference.loading import Checkpoint
from ..inference.prompts import Prompts, longest_prompt
from ..io.text_files import read_text
from ..text.rules import source_ids

NEW_TOKENS = 32
_SHORTEST = 4
# Ours, so that every export can be measured: plain prose, each of a length that no window cuts.
TEXTS = (
    "A lighthouse keeper wrote down the weather every evening. After forty years the notebooks filled a whole shelf, "
    "and a student from the city came to read them, because nobody else had measured the wind on that coast for so "
    "long.",
    "To make bread you need flour, water, salt and yeast. Mix them in a bowl until no dry flour is left, cover the "
    "dough with a cloth and let it rest in a warm place. After an hour it will have doubled in size and can be shaped "
    "into a loaf.",
    "The committee met on Tuesday to discuss the new bridge. Three members wanted to build it of steel, two preferred "
    "wood, and the chairman said that no decision could be made before the engineers had finished their report on the "
    "river bed.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it weighs less. This is "
    "why it takes longer to cook an egg there, although the water is boiling all the time.",
    "When you install a package, the package manager first looks for everything that it depends on. If one of these "
    "is missing or too old, it is fetched as well, and only then are the files unpacked and put in their places.",
    "She opened the letter slowly. It had been sent from a town that she had never heard of, by a man whose name "
    "she did not know, and yet the first line began as if they had been friends since they were children.",
    "In the first half neither team scored a goal. After the break the visitors changed their whole attack, and "
    "within ten minutes they had the ball in the net twice; the second goal was not counted.",
    "The museum has a collection of old clocks. Some of them still work, and every hour on the hour they strike one "
    "after another, since no two of them have ever agreed on what time it is.",
)


@dataclass(frozen=True)
class Sample:
    """A text cut in half.

    Attributes:
        source: what the encoder reads, with what its input begins with.
        target: how the text goes on.
    """

    source: list[int]
    target: list[int]


def read_texts(path: Path) -> list[str]:
    """A text a line.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    lines = read_text(path, "--texts takes a file with a text a line.").split("\n")
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--texts {path} has no text. Give a file with a text a line.")
    return texts


def halves(checkpoint: Checkpoint, texts: Iterable[str]) -> list[Sample]:
    """Texts as a PrefixLM model was trained on them: half in, half out. What the model has no room for is cut off.

    Raises:
        UserError: a text is too short to be cut in two.
    """
    prompts = Prompts.of(checkpoint.model, checkpoint.tokenizer)
    limit = longest_prompt(checkpoint.model, NEW_TOKENS)
    samples = []
    for text in texts:
        ids = source_ids(checkpoint.tokenizer, text, None)[:limit]
        if len(ids) < _SHORTEST:
            raise UserError(
                f"A text to measure on has {len(ids)} tokens ({text!r}): give {_SHORTEST} or more, half of which are "
                "encoded and half scored."
            )
        samples.append(Sample(prompts.source(ids[: len(ids) // 2]), ids[len(ids) // 2 :]))
    return samples
