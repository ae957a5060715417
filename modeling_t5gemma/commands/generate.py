"""``t5gemma generate``: a file of texts or questions to a file of answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice, tee
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from tqdm import tqdm

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_ids, generate_texts
from modeling_t5gemma.inference.loading import DTYPES, load_checkpoint
from modeling_t5gemma.inference.packing import pack_weights
from modeling_t5gemma.inference.prompts import Prompts, longest_prompt
from modeling_t5gemma.inference.records import Encoder, Record, read_records
from modeling_t5gemma.inference.sampling import ends_of, generation_config, pad_token
from modeling_t5gemma.inference.streaming import AnswerStreamer
from modeling_t5gemma.training.shards import write_atomically

STANDARD = "-"


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A folder or Hub repository: a model or an adapter.")],
    input_: Annotated[
        str,
        typer.Option("--input", help='A text a line, or .jsonl with "prompt" or "messages". - is standard input.'),
    ] = STANDARD,
    output: Annotated[str, typer.Option(help="A file like the input. - is standard output.")] = STANDARD,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put texts to a chat model; messages always are.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.", min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens; left out, the likeliest is taken.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this share of the probability.")] = None,
    num_beams: Annotated[int, typer.Option(help="Search with so many candidates.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn; the batches matter too.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Answers at once.", min=1)] = 8,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Shorten what is too long: a text at its beginning, messages in the middle."),
    ] = False,
    base: Annotated[str | None, typer.Option(help="Of an adapter, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. auto is the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    weights: Annotated[
        Literal["plain", "packed", "int8"],
        typer.Option(help="On a CPU, packed is faster and takes more memory; int8 is faster still, and rounded."),
    ] = "plain",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Continue texts or answer questions, a line each. A line break in a text's answer is written as \\n; JSON lines
    keep their columns and get one more, "generated"."""
    source = _Source(input_, chat)
    _check_output(output, input_)
    found = load_checkpoint(checkpoint, base=base, dtype=dtype, device=device)
    if weights != "plain":
        pack_weights(found.model, int8=weights == "int8")
    prompts = Prompts.of(found.model, found.tokenizer)
    limit = longest_prompt(found.model, max_new_tokens)
    count, with_chat = None, chat
    if input_ != STANDARD:  # every line is known to be good before the first answer
        count, with_chat = _survey(source, Encoder(prompts, limit, truncate))
    config = generation_config(
        found.model,
        found.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_beams=num_beams,
        ends=prompts.turn_ends() if with_chat else (),
    )
    torch.manual_seed(seed)
    encoder = Encoder(prompts, limit, truncate)
    on_terminal = output == STANDARD and sys.stdout.isatty()
    records = iter(source)
    if on_terminal and num_beams == 1 and not source.of_json:
        # Where the next line is typed after the last answer was read, nothing can be read ahead.
        ahead = [] if batch_size == 1 else list(islice(records, 2))
        records = chain(ahead, records)
        if len(ahead) < 2:
            _stream(found.model, prompts, config, map(encoder, records))
            _tell_truncated(encoder)
            return
    ours, theirs = tee(records)
    with tqdm(total=count, unit=" lines", disable=quiet or on_terminal) as bar:
        texts = generate_texts(
            found.model,
            found.tokenizer,
            map(encoder, theirs),
            batch_size=batch_size,
            progress=bar.update,
            generation_config=config,
        )
        lines = (f"{record.answered(text)}\n" for text, record in zip(texts, ours))
        if output == STANDARD:
            for line in lines:
                typer.echo(line, nl=False)
        else:
            write_atomically(Path(output), (line.encode() for line in lines))
    _tell_truncated(encoder)


class _Source:
    """The records of a file, any number of times, or of standard input, once.

    Raises:
        UserError: there is no such file, or it may not be read.
    """

    def __init__(self, name: str, chat: bool) -> None:
        self._name, self._chat = name, chat
        self.of_json = name.endswith(".jsonl")
        if name != STANDARD and not Path(name).is_file():
            raise UserError(f"--input {name} is no file. Give one, or - for standard input.")
        if name != STANDARD and not os.access(name, os.R_OK):
            raise UserError(f"--input {name} may not be read. Change its permissions.")

    def __iter__(self) -> Iterator[Record]:
        if self._name == STANDARD:
            yield from self._read(sys.stdin.buffer, "standard input")
            return
        with Path(self._name).open("rb") as file:
            yield from self._read(file, self._name)

    def _read(self, lines: Iterable[bytes], name: str) -> Iterator[Record]:
        return read_records(lines, name, of_json=self.of_json, chat=self._chat)


def _survey(source: _Source, encoder: Encoder) -> tuple[int, bool]:
    """How many records there are, and whether any goes through the chat template.

    Raises:
        UserError: for the first line that cannot be read.
    """
    chat = False
    for record in source:
        encoder(record)
        chat = chat or not isinstance(record.prompt, str)
    return encoder.records, chat


def _stream(model: Any, prompts: Prompts, config: Any, sources: Iterable[list[int]]) -> None:
    """Show one answer after the other as its words come."""
    pad = pad_token(model, prompts.tokenizer)
    for ids in sources:
        streamer = AnswerStreamer(prompts.tokenizer, ends_of(config), lambda text: typer.echo(text, nl=False))
        generate_ids(model, [ids], pad, 1, generation_config=config, streamer=streamer)
        typer.echo()


def _check_output(output: str, input_: str) -> None:
    if output == STANDARD:
        return
    path = Path(output)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError(f"--output {output} is a folder, or in none that exists. Give a file to write.")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"--output {output}: its folder may not be written to. Choose another.")
    if path.exists() and input_ != STANDARD and path.samefile(input_):
        raise UserError(f"--output {output} is the input too, which would be lost. Choose another.")


def _tell_truncated(encoder: Encoder) -> None:
    if encoder.truncated:
        typer.echo(f"Shortened {encoder.truncated} of {encoder.records} lines to {encoder.limit} tokens.", err=True)
