"""``t5gemma trim``: a vocabulary of the size of the task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.trimming.trim import Trimmed, TrimOptions, trim


def trim_command(
    checkpoint: Annotated[str, typer.Argument(help="A folder; or a decoder-only model on the Hub.")],
    output: Annotated[Path, typer.Option(help="The folder to write, which must not exist.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="What it is for: a file, glob or folder of json, parquet or text; or a Hub data set."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Keep so many tokens, the most frequent ones; as many as needed if left out.", min=1),
    ] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Texts to tell of what becomes of them.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="That holds text, or messages; several with one option each. Default: text."),
    ] = None,
    sample_by: Annotated[
        Literal["document", "paragraph", "line"], typer.Option(help="What of a plain text file is one document.")
    ] = "document",
    like: Annotated[
        Path | None, typer.Option(help="Keep the tokens of this trimmed checkpoint: of a student, for its teacher.")
    ] = None,
    sentinels: Annotated[
        int | None, typer.Option(help="Keep so many <unusedN> (or <extra_id_N>); all if left out.", min=0)
    ] = None,
    max_bad: Annotated[int, typer.Option(help="Bad records to skip before it is an error.", min=0)] = 100,
    verify: Annotated[bool, typer.Option(help="Compare the logits of both models, too.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Keep the tokens that texts need. They are tokenised as before, every other text in smaller pieces."""

    def sources(paths: list[str] | None) -> tuple[TextSource, ...]:
        return tuple(
            TextSource(path, column=name, sample_by=sample_by) for path in paths or [] for name in column or ["text"]
        )

    options = TrimOptions(
        checkpoint, output, sources(text), size, sentinels, like, sources(held_out), max_bad, overwrite, verify
    )
    with tqdm(unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        done = trim(options, on_bytes=bar.update)
    for line in summary(output, done):
        typer.echo(line)


def summary(output: Path, done: Trimmed) -> list[str]:
    """What was done, a line each."""
    more = f", {done.kept - done.needed:,} of them to make it that many" if done.kept > done.needed else ""
    sizes = " to ".join(f"{count / 1e6:,.1f}" for count in done.nbytes)
    lines = [f"{output}: {done.kept:,} of {done.rows:,} tokens{more}; weights from {sizes} MB."]
    if done.dropped:
        lines.append(f"Left out, as the embedding has no row for it: {', '.join(done.dropped)}.")
    lines += [
        f"Of the {name}, {change}."
        for name, change in (("texts", done.of_texts), ("held-out text", done.held_out))
        if change
    ]
    if done.difference is not None:
        lines.append(f"Logits of kept tokens are {done.difference:.1e} of the largest apart from the whole model's.")
    return lines
