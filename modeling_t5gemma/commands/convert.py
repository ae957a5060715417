"""``t5gemma convert``: options to a conversion, a plan to a table, progress to a bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_t5gemma.conversion.convert import Prepared, carry_out, prepare
from modeling_t5gemma.conversion.options import CROSS_ATTENTION, DTYPES, ENCODER_KV, ConversionOptions, describe_layers
from modeling_t5gemma.conversion.plan import Constant, Copied, Drawn, Plan, Write
from modeling_t5gemma.cross_attention import is_cross_attention
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.staging import place_of
from modeling_t5gemma.publishing.settings import Publication, check_repository
from modeling_t5gemma.publishing.upload import publish_checkpoint

_ORIGINS = {Copied: "copied", Drawn: "drawn", Constant: "set to one value"}


def convert_command(aliases_of: str) -> Callable[..., None]:
    """The command, with the aliases of one family."""

    def convert(
        enc: Annotated[
            str, typer.Option(help="Encoder source: alias (9b, 2b-it), Hub repository, folder or .gguf file.")
        ],
        dec: Annotated[str, typer.Option(help="Decoder source, likewise.")],
        output: Annotated[Path, typer.Option(help="Folder to make.")],
        cross_attention: Annotated[
            str, typer.Option(help=f"{', '.join(CROSS_ATTENTION)}. auto copies if both are of one size, else draws.")
        ] = "auto",
        encoder_attention: Annotated[
            str, typer.Option(help='bidirectional, causal, or the layers that are bidirectional ("11-16").')
        ] = "bidirectional",
        encoder_kv: Annotated[
            str, typer.Option(help=f"{', '.join(ENCODER_KV)}. mha repeats the encoder's key/value heads.")
        ] = "gqa",
        enc_layers: Annotated[str | None, typer.Option(help='Encoder layers to keep: "0-11" or "0,2,4".')] = None,
        dec_layers: Annotated[str | None, typer.Option(help="Decoder layers to keep, likewise.")] = None,
        share_embeddings: Annotated[
            bool, typer.Option("--share-embeddings", help="One embedding for both: the decoder's.")
        ] = False,
        dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. auto keeps each tensor's own.")] = "auto",
        seed: Annotated[int, typer.Option(help="Of the weights that are drawn.")] = 0,
        max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
        revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of sources from the Hub.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
        verify: Annotated[bool, typer.Option("--verify", help="Compare the result with its sources.")] = False,
        push_to_hub: Annotated[
            str | None, typer.Option(help="Publish it there, privately, as t5gemma publish does.")
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at --output.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    ) -> None:
        """Convert decoder-only checkpoints into an encoder-decoder one."""
        output = place_of(output)
        if push_to_hub is not None:
            check_repository("--push-to-hub", push_to_hub)
        if quiet:
            disable_progress_bar()  # transformers' own, when --verify loads models
        prepared = prepare(
            ConversionOptions(
                enc=enc,
                dec=dec,
                output=output,
                cross_attention=cross_attention,
                encoder_attention=encoder_attention,
                encoder_kv=encoder_kv,
                enc_layers=enc_layers,
                dec_layers=dec_layers,
                share_embeddings=share_embeddings,
                dtype=dtype,
                seed=seed,
                max_shard_size=max_shard_size,
                revision=revision,
                aliases_of=aliases_of,
                overwrite=overwrite,
                verify=verify,
                push_to_hub=push_to_hub,
            ),
            dry_run=dry_run,
        )
        console = Console(quiet=quiet)
        if dry_run:
            console.print(plan_table(prepared))
            for note in plan_notes(prepared):
                console.print(note, highlight=False, soft_wrap=True)
            return
        with tqdm(total=prepared.plan.nbytes, unit="B", unit_scale=True, desc="weights", disable=quiet) as bar:

            def advance(count: int) -> None:
                if not bar.n:
                    bar.reset()  # a tokenizer may have been rebuilt before; the rate is that of the weights
                bar.update(count)

            carry_out(prepared, on_bytes=advance)
        if not (output / "tokenizer_config.json").exists():
            console.print("The sources have no tokenizer, so the checkpoint has none either.")
        console.print(
            f"Wrote {output}: {_model_class(prepared)}, "
            f"{sum(write.parameters for write in prepared.plan.writes):,} parameters, {_size(prepared.plan.nbytes)}.",
            highlight=False,
            soft_wrap=True,
        )
        if push_to_hub is not None:
            console.print(_published(output, push_to_hub), highlight=False, soft_wrap=True)

    return convert


def _published(output: Path, repository: str) -> str:
    """The address that a checkpoint has on the Hub now, privately."""
    try:
        return publish_checkpoint(Publication(output, repository))
    except UserError as error:
        raise UserError(
            f"{output} is complete, and not on the Hub: {error} Then: t5gemma publish {output} {repository}"
        ) from error


def plan_table(prepared: Prepared) -> Table:
    """A row for every stack: its source and layers, its size, how many of its parameters are copied."""
    target, plan = prepared.target, prepared.plan
    table = Table(title=f"{_model_class(prepared)} ({target.config.model_type}); nothing is written")
    table.add_column("stack", no_wrap=True)
    table.add_column("source", overflow="fold")
    table.add_column("layers", overflow="fold")
    for heading in ("parameters", "copied", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for title, writes in _stacks(plan).items():
        stack = target.encoder if title == "encoder" else target.decoder
        copied = any(isinstance(write.origin, Copied) for write in writes)
        table.add_row(title, stack.source.name if copied else "", describe_layers(stack.layers), *_totals(writes))
    table.add_section()
    table.add_row("all", "", "", *_totals(plan.writes))
    return table


def plan_notes(prepared: Prepared) -> list[str]:
    """Which weights of a stack are copied, drawn and set to one value; and what of the sources is left out."""
    notes = []
    for title, writes in _stacks(prepared.plan).items():
        modules: dict[str, set[str]] = {}
        for write in writes:
            modules.setdefault(_ORIGINS[type(write.origin)], set()).add(write.name.split(".")[-2])
        if modules.keys() != {"copied"}:
            parts = (f"{origin} {', '.join(sorted(names))}" for origin, names in modules.items())
            notes.append(f"{title}: {'; '.join(parts)} (seed {prepared.options.seed}).")
    counts = Counter((left.side, left.reason) for left in prepared.plan.left_out)
    for (side, reason), count in counts.items():
        notes.append(f"Left out of the {side}'s source: {count} tensors ({reason}).")
    return notes or ["Every tensor of the sources is used, and nothing else."]


def _stacks(plan: Plan) -> dict[str, list[Write]]:
    stacks: dict[str, list[Write]] = {"encoder": [], "decoder": [], "cross-attention": [], "output head": []}
    for write in plan.writes:
        if is_cross_attention(write.name):
            stacks["cross-attention"].append(write)
        elif write.name.startswith("model."):
            stacks[write.name.split(".")[1]].append(write)
        else:
            stacks["output head"].append(write)
    return {title: writes for title, writes in stacks.items() if writes}


def _totals(writes: Sequence[Write]) -> tuple[str, str, str]:
    parameters = sum(write.parameters for write in writes)
    copied = sum(write.parameters for write in writes if isinstance(write.origin, Copied))
    # Rounded down: 100% is all of them.
    return f"{parameters:,}", f"{100 * copied // parameters}%", _size(sum(write.nbytes for write in writes))


def _model_class(prepared: Prepared) -> str:
    (name,) = prepared.target.config.architectures or [""]
    return name


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
