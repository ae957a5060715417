"""``t5gemma evaluate``: checkpoints on benchmarks, beside each other and beside the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from modeling_t5gemma.commands.checkpoints import labelled
from modeling_t5gemma.commands.outputs import make_folder, wide_console
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.evaluation.plan import plan
from modeling_t5gemma.evaluation.report import average, report
from modeling_t5gemma.evaluation.run import Settings, evaluate_checkpoint
from modeling_t5gemma.evaluation.tasks import Tasks
from modeling_t5gemma.inference.loading import DTYPES, check_checkpoint, load_checkpoint
from modeling_t5gemma.training.shards import write_atomically, write_json


def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Folders or Hub repositories: encoder-decoders, decoder-only models, adapters on either."),
    ],
    suite: Annotated[
        str,
        typer.Option(
            help="pt or it, the paper's for pretrained and tuned models, or tasks of the harness, as boolq,mmlu."
        ),
    ] = "pt",
    output: Annotated[
        Path | None, typer.Option(help="A folder for results; what is finished there is not run again.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first examples of each task only.", min=1)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question, in place of each task's.", min=0)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of data sets, read in place of the Hub: DATASET/CONFIG/SPLIT.jsonl."),
    ] = None,
    include: Annotated[list[Path] | None, typer.Option(help="A folder of your own tasks, repeatable.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; left out, for the suite it.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the code that the model writes, with your rights.")
    ] = False,
    block: Annotated[
        int,
        typer.Option(help="For perplexity: tokens in the decoder, given what is before them in the encoder.", min=1),
    ] = 128,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once; left out, found by trying.", min=1)] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. auto is the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Score checkpoints with EleutherAI's lm-evaluation-harness, greedily."""
    labels = labelled(checkpoints)
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is no folder.")
    wanted = plan(Tasks(include or ()), suite, shots=shots, allow_code=allow_code, data=data)
    if wanted.left_out:
        typer.echo(
            f"Left out, since they run code that the model writes: {', '.join(wanted.left_out)} (--allow-code)."
        )
    for path in labels.values():  # the last one too, before the first one's hours
        check_checkpoint(path, base=base)
    if output is not None:
        output = make_folder("--output", output)
    settings = Settings(limit, data, wanted.suite == "it" if chat is None else chat, block, allow_code, batch_size)
    results = {}
    for label, path in labels.items():
        folder = None if output is None else output / label.replace("/", "_")
        found = load_checkpoint(path, base=base, dtype=dtype, device=device)
        results[label] = evaluate_checkpoint(
            path,
            found,
            wanted,
            settings,
            folder,
            lambda line, of=label: typer.echo(f"{of}: {line}"),  # type: ignore[misc]
        )
        del found
        if wanted.suite is not None:
            results[label]["average"] = average(wanted, results[label])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "results.json", results[label])
    made = report(wanted, results)
    shown = Table()
    for number, heading in enumerate(made.rows[0]):
        shown.add_column(escape(heading), justify="right" if number > 2 else "left")
    for row in made.rows[1:]:
        shown.add_row(*map(escape, row))
    console = wide_console()
    console.print(shown, *map(escape, made.remarks), sep="\n")
    if output is not None:
        write_atomically(output / "results.md", [made.markdown().encode()])
        console.print(f"Written: {output / 'results.md'}, and results.json of each checkpoint beside it.")
