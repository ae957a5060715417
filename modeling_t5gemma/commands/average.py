"""``t5gemma average``: the mean of a run's last checkpoints, or a weighted one of any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from modeling_t5gemma.conversion.averaging import average
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.checkpoints import complete_checkpoints, read_state
from modeling_t5gemma.training.papers import papers_of_run


def average_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints, or with --last the folder of a run.")],
    output: Annotated[Path, typer.Option(help="The folder to write, which must not exist.")],
    last: Annotated[int | None, typer.Option(help="Take so many of the run's latest complete checkpoints.")] = None,
    weights: Annotated[
        str | None, typer.Option(help='One weight a checkpoint, as "0.7,0.3"; equal if left out.')
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is there.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Average checkpoints of one model, by streaming: a few megabytes of memory, whatever their size."""
    if last is not None:
        checkpoints = _last_of(checkpoints, last)
    parts = _parsed(weights) if weights is not None else [1 / len(checkpoints)] * len(checkpoints)
    with tqdm(unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        extra = papers_of_run(checkpoints[-1])
        average(checkpoints, parts, output, extra=extra, overwrite=overwrite, on_bytes=bar.update)
    typer.echo(
        f"{output}: the mean of {', '.join(f'{w:g} {c.name}' for w, c in zip(parts, checkpoints, strict=True))}"
    )


def _last_of(folders: list[Path], count: int) -> list[Path]:
    if len(folders) != 1:
        raise UserError(f"--last takes the folder of one run, not {len(folders)} paths.")
    found = complete_checkpoints(folders[0])
    if not 2 <= count <= len(found):
        raise UserError(
            f"--last {count} of {folders[0]}, which has {len(found)} complete checkpoints: give from 2 to that many "
            "(save_total_limit in the training settings says how many are kept)."
        )
    for checkpoint in found[-count:]:
        read_state(checkpoint)  # refuses a damaged one
    return found[-count:]


def _parsed(weights: str) -> list[float]:
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise UserError(f'--weights {weights!r} are no numbers with commas between them, as "0.7,0.3".') from error
