"""``t5gemma export``: a checkpoint for another runtime, measured against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from modeling_t5gemma.exporting.export import export
from modeling_t5gemma.exporting.formats import FORMATS
from modeling_t5gemma.exporting.samples import TEXTS, read_texts

_QUANTIZATIONS = "; ".join(f"{name}: {', '.join(known.quantizations)}" for name, known in FORMATS.items())


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of an encoder-decoder.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    quantization: Annotated[
        str | None, typer.Option(help=f"What weights are stored in; the first if left out. {_QUANTIZATIONS}.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to measure on, one a line; a few of ours if left out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """Write a checkpoint for CTranslate2, as torch.export packages or for ONNX Runtime, run what was written, and
    tell how far it is from the model in float32."""
    disable_progress_bar()
    measured_on = TEXTS if texts is None else read_texts(texts)
    made = export(checkpoint, output, format, quantization, texts=measured_on, overwrite=overwrite)
    table = Table("", title=f"{made.checkpoint}: {FORMATS[format].title}, {made.quantization}")
    table.add_column("beside the model in float32", justify="right")
    for row in made.deviation.rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for limit in made.limits:
        console.print(f"Limit: {limit}", highlight=False)
    console.print(f"Written: {output}", highlight=False, soft_wrap=True)
