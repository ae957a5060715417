"""``t5gemma teacher-cache``: what a teacher says to a text, kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.commands.outputs import make_folder
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.objectives import PrefixLM
from modeling_t5gemma.training.documents import Pieces
from modeling_t5gemma.training.loading import load_original
from modeling_t5gemma.training.shards import TokenShards
from modeling_t5gemma.training.teacher import Teacher
from modeling_t5gemma.training.teacher_cache import write_cache
from modeling_t5gemma.training.tokenizing import load_tokenizer, vocabulary_of


def teacher_cache(
    tokens: Annotated[Path, typer.Argument(help="A folder that t5gemma tokenize wrote.")],
    teacher: Annotated[str, typer.Option(help="The decoder-only model: a folder or a Hub repository.")],
    output: Annotated[Path, typer.Option(help="Folder to make, or to go on with after a stop.")],
    window: Annotated[int, typer.Option(help="Tokens of a window, as data.window in training.", min=2)] = 8192,
    samples: Annotated[int, typer.Option(help="Words drawn a token, 4 bytes each.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows that the teacher reads at once.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Store unbiased samples of a teacher's distribution, to train without it in memory (arXiv 2503.16870)."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype} is neither float32 nor bfloat16.")
    output = make_folder("--output", output)
    tokenizer = load_tokenizer(teacher)
    vocabulary = vocabulary_of(tokenizer, teacher)
    pieces = Pieces(TokenShards(tokens, vocabulary), window, PrefixLM().shortest())
    model = load_original(teacher, dtype)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if tokenizer.bos_token_id is None:
        raise UserError(f"The tokenizer of {teacher} has no bos token, which every window begins with: set it.")
    layout = Layout(tokenizer.pad_token_id or 0, tokenizer.bos_token_id, teacher_begin=tokenizer.bos_token_id)
    with tqdm(total=len(pieces), unit="window", disable=quiet, leave=False) as bar:
        write_cache(
            output,
            pieces,
            Teacher(model, layout),
            vocabulary,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            progress=bar.update,
        )
    if not quiet:
        typer.echo(f"{output}: {samples} samples a token of {len(pieces)} windows by {teacher}")
