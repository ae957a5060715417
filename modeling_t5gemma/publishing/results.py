"""Evaluation results: read from what evaluations write, told in the Hub's two forms.

``model-index`` stands in the card's metadata. ``.eval_results/*.yaml`` feeds the leaderboards of benchmark data sets
(https://huggingface.co/docs/hub/eval-results) and has one value for each task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]  # looked up when it is imported

from ..errors import UserError
from ..io.text_files import read_json

SUPERGLUE = "aps/super_glue"


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        dataset: of the Hub; None for one that is not there.
        name: the data set's, to read.
        task: within the data set.
        metric: of which this is the value, in the metric's own unit.
        split: of the data set.
        notes: how it was measured.
        benchmark: whether it belongs on a leaderboard.
    """

    dataset: str | None
    name: str
    task: str
    metric: str
    value: float
    split: str | None = None
    notes: str | None = None
    benchmark: bool = True


def read_results(path: Path) -> list[Result]:
    """Results from a file: ``results.json`` of a SuperGLUE run or of ``t5gemma evaluate``, or what lm-eval writes.

    Raises:
        UserError: it is neither, or holds a value that is no number.
    """
    if not path.is_file():
        raise UserError(f"--evaluation {path} is no file. Give results that an evaluation wrote.")
    content = read_json(path)
    found: list[Result] = []
    with suppress(AttributeError, KeyError, TypeError):  # of another shape than either
        if {"mean_accuracy", "tasks"} <= content.keys():
            found = list(_superglue(content["tasks"]))
        elif {"results", "configs"} <= content.keys():
            found = list(_lm_eval(content))
    for result in found:
        if not math.isfinite(result.value):
            raise UserError(f"{path} has {result.value} as {result.metric} of {result.name}, which tells nothing.")
    if found:
        return found
    raise UserError(
        f"{path} holds no results that are known here. Give results.json of t5gemma evaluate or of "
        "examples/superglue.py, or a file that lm-eval wrote (--output_path)."
    )


def model_index(results: Sequence[Result]) -> list[EvalResult]:
    """The results for the card's metadata."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.dataset or _slug(result.name),
            dataset_name=result.name,
            dataset_config=result.task if result.dataset else None,
            dataset_split=result.split,
            metric_type=_slug(result.metric),
            metric_name=result.metric,
            metric_value=result.value,
        )
        for result in results
    ]


def write_eval_results(folder: Path, results: Sequence[Result]) -> None:
    """Write ``.eval_results/DATASET.yaml`` for each benchmark, with the first metric of each task."""
    entries: dict[str, dict[str, EvalResultEntry]] = {}
    for result in results:
        if result.benchmark and result.dataset is not None:
            notes = ", ".join(filter(None, (result.metric, result.split, result.notes)))
            entry = EvalResultEntry(dataset_id=result.dataset, task_id=result.task, value=result.value, notes=notes)
            entries.setdefault(result.dataset, {}).setdefault(result.task, entry)
    for dataset, tasks in entries.items():
        path = folder / ".eval_results" / f"{_slug(dataset)}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml_dump(eval_result_entries_to_yaml(list(tasks.values()))), encoding="utf-8")


def _superglue(tasks: dict[str, Any]) -> Iterator[Result]:
    for name, task in tasks.items():
        for metric, figure in task["metrics"].items():
            if metric != "score":  # the mean of the others
                yield Result(
                    SUPERGLUE,
                    f"SuperGLUE {name}",
                    name,
                    metric,
                    figure["mean"],
                    "validation",
                    f"fine-tuned for the task, mean of {len(task['seeds'])} seeds",
                )


def _lm_eval(content: dict[str, Any]) -> Iterator[Result]:
    for task, metrics in content["results"].items():
        config = content["configs"].get(task, {})
        shots = config.get("num_fewshot")
        # `t5gemma evaluate` says more: whether local files stood for the data set, whether there were all examples.
        told = {"local": False, "cut": False, "notes": [], **content.get("how", {}).get(task, {})}
        for key, value in metrics.items():
            metric, _, how = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and how:
                notes = [None if shots is None else f"{shots}-shot", how if how != "none" else None, *told["notes"]]
                yield Result(
                    None if told["local"] else config.get("dataset_path"),
                    metrics.get("alias", task).strip(" -"),
                    config.get("dataset_name") or task,
                    metric,
                    value,
                    config.get("test_split") or config.get("validation_split"),
                    ", ".join(filter(None, notes)),
                    benchmark=not (told["local"] or told["cut"]),
                )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
