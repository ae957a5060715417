"""``t5gemma publish``: a checkpoint to the Hub, with everything that has to go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # looked up when imported
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from modeling_t5gemma.publishing.repository import Repository, prepared
from modeling_t5gemma.publishing.settings import Publication
from modeling_t5gemma.publishing.upload import publish_checkpoint


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of an encoder-decoder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, made if it does not exist.")],
    run: Annotated[
        list[Path] | None, typer.Option(help="A run that trained it, if it is not the run's own output; repeatable.")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="What its weights derive from on the Hub, if the records do not say.")
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Whose output it was trained on, if the records do not say.")
    ] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="It derives from no other model.")] = False,
    terms: Annotated[Path | None, typer.Option(help="A copy of the Gemma terms, if none lies beside it.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub writes it; Gemma's is known.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code; repeatable.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="A Hub data set it was trained on, beside the runs' own; repeatable.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="results.json of SuperGLUE, or a file of lm-eval; repeatable.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help='For the card, as "8 H100".')] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the files, send nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Check a checkpoint, write its card, notice and terms, and upload it: privately, unless --public is given.

    An upload that was interrupted goes on when the command is given again.
    """
    given = Publication(
        checkpoint=checkpoint.expanduser(),
        repository=repository,
        runs=tuple(run or ()),
        bases=tuple(base or ()),
        teachers=tuple(teacher or ()),
        from_scratch=from_scratch,
        terms=terms,
        license=license,
        languages=tuple(language or ()),
        datasets=tuple(dataset or ()),
        evaluations=tuple(evaluation or ()),
        hardware=hardware,
        public=public,
    )
    if quiet:
        disable_progress_bars()
    if dry_run:
        with prepared(given) as ready:
            _show(ready, given)
        return
    url = publish_checkpoint(given)
    if not quiet:
        typer.echo(url)


def _show(ready: Repository, given: Publication) -> None:
    console = Console()
    seen = "public" if given.public else "private"
    table = Table("file", title=f"{given.repository} ({seen}); nothing was sent", box=SIMPLE)
    table.add_column("bytes", justify="right")
    files = ready.files()
    for name, size in files.items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row(f"{len(files)} files", f"{sum(files.values()):,}")
    console.print(table)
    console.print(ready.card, markup=False, highlight=False, soft_wrap=True)
