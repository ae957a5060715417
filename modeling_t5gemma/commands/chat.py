"""``t5gemma chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.conversation import Conversation
from modeling_t5gemma.inference.loading import DTYPES, load_checkpoint
from modeling_t5gemma.inference.prompts import Prompts
from modeling_t5gemma.inference.sampling import generation_config

HELP = "/clear begins a new conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def chat(
    checkpoint: Annotated[str, typer.Argument(help="A folder or Hub repository: a model or an adapter.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.", min=1)] = 1024,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens; left out, the likeliest is taken.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this share of the probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; left out, it is new every time.")] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. auto is the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Talk to a model that has a chat template. /clear, /exit; Ctrl-C stops an answer."""
    found = load_checkpoint(checkpoint, base=base, dtype=dtype, device=device)
    prompts = Prompts.of(found.model, found.tokenizer)
    config = generation_config(
        found.model,
        found.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        ends=prompts.turn_ends(),
    )
    conversation = Conversation(found.model, prompts, config, system)
    if seed is not None:
        torch.manual_seed(seed)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        typer.echo(HELP, err=True)
    for line in _typed() if at_terminal else (line.strip() for line in sys.stdin):
        if line == "/exit":
            break
        elif line == "/clear":
            conversation.clear()
        elif line == "/help":
            typer.echo(HELP, err=True)
        elif line:
            try:
                answer = conversation.ask(line, lambda text: typer.echo(text, nl=False))
            except UserError as error:
                if not at_terminal:
                    raise
                typer.echo(f"error: {error}", err=True)
                continue
            typer.echo()
            if not answer:
                typer.echo("(no answer; the question is forgotten)", err=True)


def _typed() -> Iterator[str]:
    """Lines typed at a terminal, until Ctrl-D; Ctrl-C drops the line."""
    import readline  # noqa: F401  # gives input() editing and a history

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return
