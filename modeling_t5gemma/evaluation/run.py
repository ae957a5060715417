"""A checkpoint on all benchmarks of a plan, one after the other; what is finished is kept."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..inference.loading import Checkpoint
from ..training.shards import write_json
from .plan import Benchmark, Plan

if TYPE_CHECKING:
    from .language_model import EvaluatedModel

BENCHMARKS = "benchmarks"
LOCAL = "of local files"
# Draws for the standard errors of metrics that have no formula.
_BOOTSTRAPS = 1000
_MERGED = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks", "how")


@dataclass(frozen=True)
class Settings:
    """How benchmarks are run.

    Attributes:
        limit: examples of each task; None for all.
        data: a folder of local data in place of the Hub.
        chat: put the chat template around contexts, each few-shot example a turn.
        block: see ``EvaluatedModel``.
        allow_code: tasks may run code that the model writes.
        rows: of a batch at most; found automatically if None.
    """

    limit: int | None = None
    data: Path | None = None
    chat: bool = False
    block: int = 128
    allow_code: bool = False
    rows: int | None = None


def evaluate_checkpoint(
    path: str,
    checkpoint: Checkpoint,
    plan: Plan,
    settings: Settings,
    folder: Path | None,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """The results of all benchmarks, in the form in which the harness writes results.

    Beside the harness's keys there are "how", what else has to be known of each task's numbers, and "config" with what
    is said of the model.

    Args:
        path: the checkpoint, for the results.
        folder: for a file of each benchmark when it is finished, which is not run again; None writes nothing.
        tell: called with a line about each benchmark.

    Raises:
        UserError: data cannot be read, a task cannot be run, or the folder has results of other settings.
    """
    from .language_model import EvaluatedModel

    model = EvaluatedModel(checkpoint, rows=settings.rows, chat=settings.chat, block=settings.block)
    weights = _digest(checkpoint.model)
    merged: dict[str, Any] = {key: {} for key in _MERGED}
    for number, benchmark in enumerate(plan.benchmarks, 1):
        claim = _claim(benchmark, settings, weights)
        file = None if folder is None else folder / BENCHMARKS / f"{benchmark.task.replace('/', '_')}.json"
        results = None if file is None else _finished(file, claim)
        tell(f"{number}/{len(plan.benchmarks)} {benchmark.name}{'' if results is None else ' is finished'}")
        if results is None:
            results = _run(model, plan, benchmark, settings)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"settings": claim, **results})
        for key in _MERGED:
            merged[key] |= results[key]
    return merged | {
        "config": {
            "model": path,
            "backend": model.backend,
            "model_num_parameters": checkpoint.model.num_parameters(),
            "model_dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "max_length": model.max_length,
            "rows_of_largest_batch": model.batch_size.largest,
            "limit": settings.limit,
            "chat": settings.chat,
        },
        "versions_of": {name: version(name) for name in ("lm_eval", "torch", "transformers")},
    }


def _run(model: EvaluatedModel, plan: Plan, benchmark: Benchmark, settings: Settings) -> dict[str, Any]:
    """A benchmark's results: those of the harness that are told, and "how"."""
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle the choices while they read their data
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork for the standard errors, under torch's threads
    if settings.allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    tasks = {leaf.name: plan.tasks.make(leaf, settings.data) for leaf in benchmark.leaves}
    for name, task in tasks.items():
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        _check_shots(name, task)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as if none had been drawn
    groups = {}
    if benchmark.means:
        groups[benchmark.task] = Group.from_config({"group": benchmark.task, "aggregate_metric_list": benchmark.means})
        for task in tasks.values():
            groups[benchmark.task].add(task)
    model.asked.clear()
    model.shortened.clear()
    try:
        with redirect_stdout(sys.stderr):  # it prints what it is about
            found = lm_eval.evaluate(
                model,
                {"tasks": tasks, "groups": groups},
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
                confirm_run_unsafe_code=settings.allow_code,
            )
    except UserError:
        raise
    except Exception as error:  # a task's own functions, on rows that are not what they expect
        if settings.data is None:
            raise
        raise UserError(
            f"{benchmark.name} fails on its local data ({type(error).__name__}: {error}). Compare the columns, and "
            f"what is in them, with the Hub's, as of {benchmark.leaves[0].dataset}."
        ) from error
    results = json.loads(json.dumps({key: found.get(key, {}) for key in _MERGED}, default=str))
    for leaf in benchmark.leaves:
        config = results["configs"][leaf.name]
        config["metadata"].pop("config_source", None)
        if leaf.process_docs is not None:
            config["process_docs"] = ".".join((leaf.process_docs[0].stem, leaf.process_docs[1]))
        if settings.data is not None:
            config.pop("dataset_kwargs", None)
            config |= {key: leaf.config[key] for key in ("dataset_path", "dataset_name") if leaf.config.get(key)}
        results["how"][leaf.name] = _how(model, tasks[leaf.name], results["n-samples"][leaf.name], settings)
    if groups:
        results["how"][benchmark.task] = _common([results["how"][leaf.name] for leaf in benchmark.leaves])
    return results


def _how(model: EvaluatedModel, task: Any, examples: Mapping[str, int], settings: Settings) -> dict[str, Any]:
    """What has to be known of a task's numbers: whether they are of ``local`` data, and of its first examples only
    (``cut``); in words, these two first: ``notes``."""
    name = task.config.task
    how: dict[str, Any] = {"local": settings.data is not None, "cut": examples["effective"] < examples["original"]}
    notes = []
    if how["local"]:
        notes.append(LOCAL)
    if how["cut"]:
        notes.append(f"the first {settings.limit} examples")
    if settings.chat:
        notes.append("with the chat template")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        notes.append(model.how_cut)
    if cut := model.shortened[name]:
        notes.append(
            f"{cut} of {model.asked[name]} contexts cut at their beginning to {model.max_length} tokens or less"
        )
    return {**how, "notes": notes}


def _common(hows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a group, what is true of one of its tasks, and the notes of all of them."""
    notes = [note for note in hows[0]["notes"] if all(note in how["notes"] for how in hows)]
    return {**{key: any(how[key] for how in hows) for key in ("local", "cut")}, "notes": notes}


def _check_shots(name: str, task: Any) -> None:
    """Make sure that a task has as many examples as it shows, and can show them.

    Raises:
        UserError: it has fewer, or its format is made for none.
    """
    shots = task.config.num_fewshot
    if not shots:
        return
    # An example is not shown itself, where they come from the same split.
    there = len(task.fewshot_docs()) - int(task.fewshot_cfg.split == task.config.test_split)
    if there < shots:
        raise UserError(f"{name} shows {shots} examples before each question and has {there}. Give --shots {there}.")
    try:
        task.fewshot_context(task.eval_docs[0], shots)
    except Exception as error:  # the task's own templates and functions
        raise UserError(
            f"{name} cannot show examples before its questions ({type(error).__name__}: {error}). Leave --shots out."
        ) from error


def _claim(benchmark: Benchmark, settings: Settings, weights: str) -> dict[str, Any]:
    """What a benchmark's numbers depend on."""
    told = {
        "tasks": {leaf.name: leaf.changes for leaf in benchmark.leaves},
        "limit": settings.limit,
        "data": None if settings.data is None else str(settings.data.resolve()),
        "chat": settings.chat,
        "block": settings.block,
        "weights": weights,
        "lm_eval": version("lm_eval"),
    }
    made: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return made


def _finished(file: Path, claim: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results in a benchmark's file, None if there is none.

    Raises:
        UserError: they are of other settings, or the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        held = content.pop("settings")
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged. Remove it.") from error
    if changed := [key for key in claim if held.get(key) != claim[key]]:
        raise UserError(
            f"{file} is of another {', '.join(changed)}. Give another --output, or remove it to begin anew."
        )
    return content


def _digest(model: nn.Module) -> str:
    """What tells weights from others: a few values of every tensor, adapters included."""
    seen = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        few = parameter.detach().flatten()[:64].to(torch.float32).cpu().numpy()
        seen.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + few.tobytes())
    return seen.hexdigest()[:16]
