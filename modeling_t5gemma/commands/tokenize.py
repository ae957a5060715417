"""``t5gemma tokenize``: text into token shards, with progress."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from tqdm import tqdm

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.training.tokenizing import Tokenized, tokenize_source

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def tokenize(
    source: Annotated[str, typer.Argument(help="A file, glob or folder of json, parquet or text; or a Hub data set.")],
    tokenizer: Annotated[str, typer.Option(help="The model's: a folder or a Hub repository.")],
    output: Annotated[Path, typer.Option(help="Folder to make, or to go on with after a stop.")],
    column: Annotated[str, typer.Option(help="Which holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Of a Hub data set.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a Hub data set without storing it.")] = False,
    sample_by: Annotated[
        Literal["document", "paragraph", "line"], typer.Option(help="What of a plain text file is one document.")
    ] = "document",
    processes: Annotated[int | None, typer.Option(help="That tokenize. Default: one a core.", min=1)] = None,
    shard_tokens: Annotated[str, typer.Option(help="Tokens of a shard (100M, 500K): held in memory.")] = "100M",
    max_bad: Annotated[int, typer.Option(help="Bad records to skip before it is an error.", min=0)] = 100,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Tokenize text once, for long runs: memory-mapped shards. Run it again to go on after a stop."""
    text = TextSource(
        source, name=name, split=split, column=column, streaming=streaming, revision=revision, sample_by=sample_by
    )
    documents_done: int | None = None
    with tqdm(unit=" tokens", unit_scale=True, desc="tokenize", disable=quiet) as bar:

        def advance(documents: int, tokens: int) -> None:
            nonlocal documents_done
            if documents_done is None:  # the first call tells what an earlier run wrote: the rate is that of this one
                documents_done, bar.initial = 0, tokens
                bar.reset()
            else:
                bar.update(tokens)
            documents_done += documents
            bar.set_postfix(documents=documents_done, refresh=False)

        done = tokenize_source(
            text,
            tokenizer,
            output,
            processes=processes or os.cpu_count() or 1,
            shard_tokens=parse_count(shard_tokens),
            max_bad=max_bad,
            progress=advance,
        )
    Console(quiet=quiet).print(summary(output, done), highlight=False, soft_wrap=True, markup=False)


def parse_count(text: str) -> int:
    """A number of tokens such as 500000, 500K, 100M or 2G.

    Raises:
        UserError: it is no such number, or less than 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGB]?)", text.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise UserError(f"--shard-tokens {text} is not a number of tokens, such as 500K or 100M.")
    return count


def summary(output: Path, done: Tokenized) -> str:
    """One line: documents, tokens, what was kept of an earlier run, what was skipped and why."""
    kept = f" ({done.kept:,} of an earlier run)" if done.kept else ""
    skipped = "no record skipped"
    if done.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in done.skipped.items())
        skipped = f"{sum(done.skipped.values()):,} records skipped: {reasons} (first: {done.first_skipped[0]})"
    return f"Wrote {output}: {done.documents:,} documents{kept}, {done.tokens:,} tokens; {skipped}."
