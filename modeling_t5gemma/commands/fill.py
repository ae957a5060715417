"""``t5gemma fill``: the missing words of a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_ids
from modeling_t5gemma.inference.filling import MASK, Masked, Spans
from modeling_t5gemma.inference.loading import DTYPES, Checkpoint, load_checkpoint
from modeling_t5gemma.inference.prompts import Prompts, longest_prompt
from modeling_t5gemma.inference.sampling import ends_of, generation_config, pad_token
from modeling_t5gemma.objectives import SENTINELS_FILE, load_sentinels, sentinels_of
from modeling_t5gemma.training.run_folder import RUN_FILE


def fill(
    checkpoint: Annotated[str, typer.Argument(help="A folder or Hub repository, trained on span corruption (UL2).")],
    text: Annotated[str, typer.Argument(help=f"With {MASK} where words are missing, any number of them each.")],
    mode: Annotated[
        str | None,
        typer.Option(help="The denoiser's mode: a name among the run's mode_tokens (R), or a token (<unused90>)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of all fills together.", min=1)] = 256,
    num_beams: Annotated[int, typer.Option(help="Search with so many candidates.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, spans and problems as JSON.")] = False,
    base: Annotated[str | None, typer.Option(help="Of an adapter, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. auto is the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Fill the masks of a text. Exit code 1 if the answer does not have the form of one; what is wrong is told."""
    masked = Masked.parse(text)
    found = load_checkpoint(checkpoint, base=base, dtype=dtype, device=device)
    model, tokenizer = found.model, found.tokenizer
    if not model.config.is_encoder_decoder:
        raise UserError(f"{checkpoint} is decoder-only and fills no masks. Give an encoder-decoder trained to.")
    sentinels = _sentinels(found)
    ids = Prompts.of(model, tokenizer).source(
        masked.source(tokenizer, sentinels, None if mode is None else _mode_token(found, mode))
    )
    if len(ids) > (limit := longest_prompt(model, max_new_tokens)):
        raise UserError(f"The text is {len(ids)} tokens long and the model reads at most {limit}. Shorten it.")
    config = generation_config(model, tokenizer, max_new_tokens=max_new_tokens, num_beams=num_beams)
    (answer,) = generate_ids(model, [ids], pad_token(model, tokenizer), 1, generation_config=config)
    spans = Spans.parse(answer, sentinels, masked.masks, ends_of(config))
    _print(masked, spans, spans.texts(tokenizer), as_json)
    if spans.problems:
        raise typer.Exit(1)


def _print(masked: Masked, spans: Spans, fills: list[str | None], as_json: bool) -> None:
    parts = masked.filled(fills)
    if as_json:
        made = {
            "text": "".join(text for text, _ in parts),
            "spans": [None if fill is None else fill.strip() for fill in fills],
            "problems": list(spans.problems),
        }
        typer.echo(json.dumps(made, ensure_ascii=False))
        return
    styled = Text.assemble(*((text, "bold" if is_fill else "") for text, is_fill in parts))
    Console().print(styled, soft_wrap=True)
    for problem in spans.problems:
        typer.echo(f"problem: {problem}", err=True)


def _sentinels(found: Checkpoint) -> tuple[int, ...]:
    """The sentinels that the model was trained with, or else those that a vocabulary has by default.

    Raises:
        UserError: there are none, or ids that the model does not have.
    """
    path = found.file(SENTINELS_FILE)
    kept = None if path is None else load_sentinels(path.parent)
    if kept is None:
        try:
            kept = sentinels_of(found.tokenizer.get_vocab())
        except UserError as error:
            raise UserError(
                f"{found.places[0]} has no {SENTINELS_FILE}, and its vocabulary no <unusedN> tokens: it was not "
                "trained to fill masks. Give a model that was (objective: ul2)."
            ) from error
        typer.echo(
            f"{found.places[0]} has no {SENTINELS_FILE}: taking {found.tokenizer.convert_ids_to_tokens(kept[0])} and "
            "those after it.",
            err=True,
        )
    if not kept:
        raise UserError(f"{path} lists no sentinels: the model was not trained to fill masks.")
    words = found.model.config.decoder.vocab_size
    if max(kept) >= words:
        raise UserError(f"{path} lists the sentinel {max(kept)}, and the model has {words} words. Correct the file.")
    return kept


def _mode_token(found: Checkpoint, mode: str) -> int:
    """The token of a mode.

    Raises:
        UserError: it is neither a mode of the training run nor a token.
    """
    path = found.file(RUN_FILE)
    run: Any = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    modes: Mapping[str, int] = (run.get("recipe") or {}).get("mode_tokens") or {}
    if mode in modes:
        return int(modes[mode])
    vocabulary: Mapping[str, int] = found.tokenizer.get_vocab()
    if mode in vocabulary:
        return vocabulary[mode]
    listed = f"the run's modes are {', '.join(modes)}" if modes else f"there is no {RUN_FILE} that names modes"
    raise UserError(f"--mode {mode} is no token, and {listed}. Give one of the tokens it was trained with.")
