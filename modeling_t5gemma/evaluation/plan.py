"""What a suite consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tasks import Leaf, Tasks

SUITES = {"pt": "t5gemma_pt", "it": "t5gemma_it"}


@dataclass(frozen=True)
class Benchmark:
    """A task or a group of tasks, with one row in the table.

    Attributes:
        task: it is registered by.
        name: as the paper has it, or the task's.
        leaves: single tasks.
        means: of a group, the metrics whose mean over its tasks it has, as the harness's files have them.
        metric: "metric,filter", the one that goes into the suite's average; None shows all.
        shots_of: whose few-shot count it is.
    """

    task: str
    name: str
    leaves: tuple[Leaf, ...]
    means: Sequence[Mapping[str, Any]] | None = None
    metric: str | None = None
    shots_of: str = "harness"


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        suite: "pt" or "it"; None for tasks by name.
        size: benchmarks of the suite.
        left_out: names of those that run code.
    """

    tasks: Tasks
    benchmarks: tuple[Benchmark, ...]
    suite: str | None
    size: int
    left_out: tuple[str, ...]


def plan(
    tasks: Tasks, suite: str, *, shots: int | None = None, allow_code: bool = False, data: Path | None = None
) -> Plan:
    """Find all that belongs to a suite.

    Args:
        suite: "pt", "it", their groups, or names of tasks and groups with commas between them.
        shots: examples before each question in place of a task's own number, unless its file says 0.
        allow_code: whether tasks that run code may be run.
        data: a folder of local data, which has to have all that is needed.

    Raises:
        UserError: there is no such task, nothing is left, or a file of local data is missing.
    """
    short = next((short for short, group in SUITES.items() if suite in (short, group)), None)
    found = list(_by_name(tasks, suite) if short is None else _of_suite(tasks, SUITES[short]))
    if shots is not None:
        found = [
            replace(each, leaves=tuple(_with_shots(leaf, shots) for leaf in each.leaves), shots_of="--shots")
            for each in found
        ]
    unsafe = [each for each in found if any(leaf.unsafe for leaf in each.leaves) and not allow_code]
    kept = tuple(each for each in found if each not in unsafe)
    if not kept:
        raise UserError(
            f"{', '.join(each.name for each in unsafe)} would run code that the model writes, with your rights. Where "
            "that is fine, in a container, give --allow-code."
        )
    if data is not None:
        for leaf in (leaf for each in kept for leaf in each.leaves):
            leaf.local_files(data)
    return Plan(tasks, kept, short, len(found), tuple(each.name for each in unsafe))


def _of_suite(tasks: Tasks, group: str) -> Iterator[Benchmark]:
    content = tasks.entry(group).cfg
    for member in content["task"]:
        task = member.get("group") or member["task"]
        changes = {key: value for key, value in member.items() if key not in ("group", "task")}
        told = content["metadata"]["benchmarks"][task]
        yield Benchmark(
            task,
            told["name"],
            tuple(tasks.leaves(task, changes)),
            tasks.entry(task).cfg.get("aggregate_metric_list"),
            told["metric"],
            told["shots"],
        )


def _by_name(tasks: Tasks, names: str) -> Iterator[Benchmark]:
    for task in dict.fromkeys(name.strip() for name in names.split(",")):
        means = (tasks.entry(task).cfg or {}).get("aggregate_metric_list")  # a tag has no configuration
        yield Benchmark(task, task, tuple(tasks.leaves(task)), means)


def _with_shots(leaf: Leaf, shots: int) -> Leaf:
    if leaf.config.get("num_fewshot") == 0 or leaf.config.get("output_type") == "loglikelihood_rolling":
        return leaf
    return replace(leaf, changes={**leaf.changes, "num_fewshot": shots})
