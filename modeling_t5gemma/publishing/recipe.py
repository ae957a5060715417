"""How a checkpoint was trained and what that took, from the ``run.json`` and ``summary.json`` of its runs."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.text_files import read_json
from ..training.run_folder import RUN_FILE
from .results import Result
from .settings import on_hub

SUMMARY_FILE = "summary.json"
# What of transformers' arguments a reader wants, and how to call it.
_TRAINING = {
    "max_steps": "steps",
    "optim": "optimizer",
    "adam_beta1": "Adam beta 1",
    "adam_beta2": "Adam beta 2",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient's norm clipped at",
    "bf16": "bfloat16 autocast",
    "seed": "seed",
}
_OTHER = {
    "objective": ("",),
    "distillation": ("divergence", "temperature", "share"),
    "recipe": ("frozen", "learning_rates", "alone", "joining"),
    "tuning": ("frozen", "learning_rates"),
    "lora": ("rank", "alpha", "dropout", "targets"),
    "data": ("window", "pack", "max_source", "max_target", "columns"),
}
_HELD_OUT = {"eval_loss": "loss", "eval_encoder_use": "encoder use"}


@dataclass(frozen=True)
class Recipe:
    """One run, for a card.

    Attributes:
        rows: setting and value.
        compute: measure and value.
        datasets: Hub datasets that it read.
        held_out: what it measured last on text that it was not trained on.
    """

    rows: list[tuple[str, str]]
    compute: list[tuple[str, str]]
    datasets: list[str]
    held_out: list[Result]


def read_recipe(run: Path, checkpoint: Path) -> Recipe:
    """The recipe of a run, up to a checkpoint if that is one of the run's.

    Raises:
        UserError: a record cannot be read.
    """
    settings = read_json(run / RUN_FILE)
    summary = read_json(run / SUMMARY_FILE) if (run / SUMMARY_FILE).is_file() else {}
    log: list[dict[str, Any]] = summary.get("log", [])
    step = summary.get("step")
    if checkpoint.resolve().parent == run:
        numbered = re.fullmatch(r"checkpoint-(\d+)", checkpoint.resolve().name)
        step = int(numbered[1]) if numbered else None
        until = -1 if step is None else step  # of another folder in the run nobody knows what was measured
        log = [entry for entry in log if entry.get("step", 0) <= until and "train_runtime" not in entry]
    data = settings.get("data") or {}
    measured_on = list(_sources(data.get("eval") or {}))
    sources = [source for source in _sources(data) if source not in measured_on]
    datasets = [source for source in sources if on_hub(source, run)]
    rows = list(_rows(settings))
    if step is not None:
        rows.append(("trained for", f"{step} steps"))
    rows.append(("rows a step", _told(summary.get("rows_per_step"))))
    rows.append(("text", ", ".join(source if source in datasets else Path(source).name for source in sources)))
    model = settings.get("model")
    rows.append(("teacher", _name(model.get("teacher") if isinstance(model, dict) else None, run)))
    compute = [*_compute(log), ("processes", _told(summary.get("processes")))]
    held_out = _held_out(log, run, sources, measured_on)
    return Recipe(_said(rows), _said(compute), datasets, held_out)


def _said(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [row for row in rows if row[1]]


def _rows(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model = settings.get("model")
    taught = isinstance(model, dict) and bool(model.get("teacher") or model.get("teacher_cache"))
    for section, keys in _OTHER.items():
        held = settings.get(section) if section != "distillation" or taught else None
        if keys == ("",):
            yield section, _told(held)
        elif isinstance(held, dict):
            yield from ((f"{section}: {key.replace('_', ' ')}", _told(held.get(key))) for key in keys)
    training = settings.get("training") or {}
    yield from ((title, _told(training.get(key))) for key, title in _TRAINING.items())


def _compute(log: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    def logged(key: str) -> list[float]:
        return [entry[key] for entry in log if key in entry]

    if seconds := logged("train_runtime"):
        yield "time of the last session", f"{seconds[-1] / 3600:.2f} h"
    if rates := logged("tokens_per_second"):
        yield "real tokens a second", f"{statistics.fmean(rates):,.0f}"
    if shares := logged("model_flops_utilisation"):
        yield "of the machine's matrix-product rate", f"{statistics.fmean(shares):.0%}"
    if peaks := logged("peak_memory_gib"):
        yield "peak memory of a process", f"{max(peaks):.1f} GiB"


def _held_out(log: Sequence[dict[str, Any]], run: Path, sources: list[str], measured_on: list[str]) -> list[Result]:
    measured: dict[str, float] = {}
    for entry in log:
        measured |= {key: entry[key] for key in _HELD_OUT if key in entry}
    origin = next(iter(measured_on or sources), "the training text")
    name = (
        f"{Path(origin).name}, not trained on" if measured_on else f"part of {Path(origin).name}, kept out of training"
    )
    return [
        Result(
            dataset=origin if on_hub(origin, run) else None,
            name=name,
            task="held-out",
            metric=title,
            value=measured[key],
            notes="nats a target token",
            benchmark=False,
        )
        for key, title in _HELD_OUT.items()
        if key in measured
    ]


def _sources(section: Any) -> Iterator[str]:
    """Every ``path`` in the data section, whose layout is the trainer's own."""
    if isinstance(section, dict):
        if isinstance(section.get("path"), str):
            yield section["path"]
        for value in section.values():
            yield from _sources(value)
    elif isinstance(section, list):
        for value in section:
            yield from _sources(value)


def _told(value: Any) -> str:
    """A setting as a reader wants it; "" for one that is off, or a renaming that renames nothing."""
    if value is None or value is False or value in ("", [], {}):
        return ""
    if isinstance(value, dict) and all(key == name for key, name in value.items()):
        return ""
    return "yes" if value is True else value if isinstance(value, str) else json.dumps(value)


def _name(place: str | None, run: Path) -> str:
    if place is None:
        return ""
    return place if on_hub(place, run) else Path(place).name
