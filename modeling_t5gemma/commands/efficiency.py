"""``t5gemma efficiency``: what models cost to run, calculated and measured beside each other."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.table import Table

from modeling_t5gemma.commands.checkpoints import labelled
from modeling_t5gemma.commands.outputs import make_folder, wide_console
from modeling_t5gemma.efficiency.accounting import countable, paper_flops, preset
from modeling_t5gemma.efficiency.paper import AXES, PAPER, QUALITIES
from modeling_t5gemma.efficiency.plots import check_matplotlib
from modeling_t5gemma.efficiency.report import Entry, tables, write_report
from modeling_t5gemma.efficiency.timing import Request, Setup, check_device, measure
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.loading import load_config

DTYPES = ("float32", "bfloat16")


def efficiency(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Folders or Hub repositories, encoder-decoders and decoder-only models. With --calculated also "
            "presets: 9b-2b, gemma2-2b."
        ),
    ],
    input_: Annotated[str, typer.Option("--input", help="Tokens, comma-separated.")] = "512,1024,2048,4096,8192",
    output: Annotated[int, typer.Option(help="New tokens; a text's end does not stop them.", min=2)] = 256,
    batch: Annotated[str, typer.Option(help="Rows at once, comma-separated.")] = "1",
    calculated: Annotated[
        bool, typer.Option("--calculated", help="From the configs alone: nothing is loaded or timed.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.", min=1)] = 5,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    dtype: Annotated[str, typer.Option(help=f"Of weights and cache: {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; torch's choice if left out.", min=1)] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(help=f"CHECKPOINT=SCORE, repeatable, or the paper's for presets: {', '.join(QUALITIES)}."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="A folder for report.html, plots and efficiency.json.")] = None,
) -> None:
    """Show parameters, FLOPs, cache, latency, throughput and peak memory of models beside each other."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is none of {', '.join(DTYPES)}.")
    requests = [
        Request(rows, length, output) for rows in _numbers("--batch", batch) for length in _numbers("--input", input_)
    ]
    labels = labelled(checkpoints)
    scores, axis = _scores(quality or [], list(labels))
    configs = {}
    for label, path in labels.items():
        known = None if Path(path).is_dir() else preset(path)
        if known is not None and not calculated:
            raise UserError(f"{path} is a preset, without weights to time. Give --calculated, or a checkpoint.")
        configs[label] = countable(known or load_config(path), path)
    setup = Setup(dtype, device, repeats, memory, threads)
    if not calculated:
        check_device(device)
    if report is not None:
        if scores or not calculated:
            check_matplotlib()
        report = make_folder("--report", report)
    bytes_per_value = getattr(torch, dtype).itemsize
    entries = []
    for label, path in labels.items():
        measured = () if calculated else measure(path, requests, setup)
        entries.append(Entry.of(label, configs[label], requests, bytes_per_value, measured, scores.get(label)))
    console = wide_console()
    for title, (head, *rows) in tables(entries).items():
        shown = Table(title=title)
        for number, heading in enumerate(head):
            shown.add_column(heading, justify="right" if number else "left")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for label in labels:
        if label in PAPER and calculated:
            ours, theirs = paper_flops(configs[label]) / 1e14, PAPER[label].flops / 1e14
            console.print(f"{label}: {ours:.3f}e14 FLOPs as arXiv 2504.06225 counts, which says {theirs:.3f}e14.")
    if report is not None:
        facts = {"dtype": dtype, "output tokens": str(output), "repeats": str(repeats)}
        if not calculated:
            facts |= {"device": _device_name(device), "threads": str(threads or torch.get_num_threads())}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
        console.print(f"Written: {write_report(report, facts, entries, axis)[-1]}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise UserError(f"{option} {text!r}: give different positive numbers, comma-separated, such as 512,1024.")
    return numbers


def _scores(given: list[str], labels: list[str]) -> tuple[dict[str, float], str]:
    """Scores by label, and what they are."""
    if len(given) == 1 and given[0] in QUALITIES:
        attribute = QUALITIES[given[0]]
        if unknown := [label for label in labels if label not in PAPER]:
            raise UserError(f"--quality {given[0]}: the paper has no {unknown[0]}. It has {', '.join(PAPER)}.")
        return {label: getattr(PAPER[label], attribute) for label in labels}, AXES[attribute]
    scores = {}
    for each in given:
        label, _, number = each.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if label not in labels or not math.isfinite(score):
            raise UserError(
                f"--quality {each}: give CHECKPOINT=SCORE with one of {', '.join(labels)} and a number, or one of "
                f"{', '.join(QUALITIES)}."
            )
        scores[label] = score
    return scores, "quality"


def _device_name(name: str) -> str:
    device = torch.device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name} ({platform.machine()})"
