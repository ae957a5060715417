"""Results as a table, checkpoints beside each other, and beside what the paper reports of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..efficiency.paper import AVERAGES, Averages
from .plan import Benchmark, Plan

# In percent already, in the harness.
_PERCENT = ("bleu", "chrf", "rouge", "ter")


@dataclass(frozen=True)
class Report:
    """A table, and what has to be known of its numbers.

    Attributes:
        rows: of cells, the heading first.
        remarks: "[1] ...", which cells name.
    """

    rows: list[list[str]]
    remarks: list[str]

    def markdown(self) -> str:
        head, *others = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [head, ["---"] * len(head), *others]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{each}\n" for each in self.remarks)


def report(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> Report:
    """Benchmarks, for a suite their average, and the paper's where it reports the checkpoint.

    Scores are in percent with their standard error, perplexities and the like as they are.

    Args:
        results: what ``evaluate_checkpoint`` returned, by the checkpoint's name.
    """
    made = Report([["benchmark", "metric", "shots", *results]], [])
    for benchmark in plan.benchmarks:
        made.rows.extend(_benchmark_rows(benchmark, results, made.remarks))
    if plan.suite is None:
        return made
    means = [average(plan, each) for each in results.values()]
    done, size = len(plan.benchmarks), plan.size
    count = f"of all {size}" if done == size else f"of {done} of {size}"
    marks = _marks(_doubts(plan, results), made.remarks)
    made.rows.append([f"average {count}{marks}", "", "", *(f"{mean['value']:.1f}" for mean in means)])
    if any(mean["paper"] for mean in means):
        mark = _marks(["arXiv 2504.06225, of all benchmarks, with its own prompts and metrics"], made.remarks)
        made.rows.append([f"the paper's average{mark}", "", "", *(_of_paper(mean["paper"]) for mean in means)])
    return made


def average(plan: Plan, results: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over a suite's benchmarks, in percent.

    Returns:
        value, the number of ``benchmarks`` that it is of and ``of`` how many, and ``paper``: what the paper has for
        this suite and a checkpoint of that name.
    """
    assert plan.suite is not None, "there is no average over tasks that the user chose"
    scores = []
    for benchmark in plan.benchmarks:
        assert benchmark.metric is not None, "each benchmark of a suite has one"
        scores.append(_score(results, benchmark.task, benchmark.metric)[0])
    reported = AVERAGES.get(Path(results["config"]["model"]).name.removesuffix("-it"))
    return {
        "value": statistics.fmean(scores),
        "benchmarks": len(scores),
        "of": plan.size,
        "paper": {} if reported is None else _for_suite(plan.suite, reported),
    }


def _for_suite(suite: str, reported: Averages) -> dict[str, float]:
    if suite == "pt":
        return {"pretrained": reported.pretrained}
    found = {"SFT": reported.instruction_tuned, "RLHF": reported.after_rlhf}
    return {name: value for name, value in found.items() if value is not None}


def _of_paper(reported: Mapping[str, float]) -> str:
    return ", ".join(
        f"{value:.1f}" + ("" if name == "pretrained" else f" ({name})") for name, value in reported.items()
    )


def _benchmark_rows(
    benchmark: Benchmark, results: Mapping[str, Mapping[str, Any]], remarks: list[str]
) -> Iterator[list[str]]:
    """A row for each metric that is shown; of a group without means for each of its tasks.

    Args:
        remarks: what is new goes here.
    """
    first = next(iter(results.values()))
    whole = benchmark.task in first["results"]
    for task in [benchmark.task] if whole else [leaf.name for leaf in benchmark.leaves]:
        marks = _marks(_notes({name: each["how"][task]["notes"] for name, each in results.items()}), remarks)
        begin = [
            f"{benchmark.name if whole else task}{marks}",
            f"{first['n-shot'].get(task, '')} ({benchmark.shots_of})",
        ]
        for metric in [benchmark.metric] if benchmark.metric else _metrics(first["results"][task]):
            figures = [_figure(each, task, metric) for each in results.values()]
            yield [begin[0], metric.removesuffix(",none").replace(",", ", "), begin[1], *figures]
            begin = ["", ""]


def _notes(of: Mapping[str, Sequence[str]]) -> list[str]:
    """The notes of all checkpoints, those that are not everybody's with names before them."""
    found: dict[str, list[str]] = {}
    for name, notes in of.items():
        for note in notes:
            found.setdefault(note, []).append(name)
    return [note if len(names) == len(of) else f"{', '.join(names)}: {note}" for note, names in found.items()]


def _doubts(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The notes that make an average another than the suite's: of local data and of some examples."""
    hows = [each["how"][benchmark.task] for benchmark in plan.benchmarks for each in results.values()]
    notes = [how["notes"][: how["local"] + how["cut"]] for how in hows]
    return list(dict.fromkeys(note for some in notes for note in some))


def _marks(notes: Sequence[str], remarks: list[str]) -> str:
    """The numbers of notes among the remarks, which they are added to."""
    held = [remark.partition("] ")[2] for remark in remarks]
    for note in notes:
        if note not in held:
            held.append(note)
            remarks.append(f"[{len(held)}] {note}")
    return "".join(f" [{held.index(note) + 1}]" for note in notes)


def _metrics(scores: Mapping[str, Any]) -> list[str]:
    """The keys of a task's metrics, without their standard errors."""
    pairs = [(*key.partition(","), value) for key, value in scores.items()]
    return [
        f"{metric},{how}"
        for metric, comma, how, value in pairs
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


def _score(results: Mapping[str, Any], task: str, metric: str) -> tuple[float, float | None]:
    """A metric and its standard error, in percent where it is a share."""
    scores = results["results"][task]
    name, _, how = metric.partition(",")
    factor = 100 if _is_share(results, task, name) else 1
    error = scores.get(f"{name}_stderr,{how}")
    return factor * scores[metric], factor * error if isinstance(error, int | float) else None


def _is_share(results: Mapping[str, Any], task: str, metric: str) -> bool:
    rises = results["higher_is_better"].get(task, {}).get(metric, True)
    return rises is not False and not metric.startswith(_PERCENT)


def _figure(results: Mapping[str, Any], task: str, metric: str) -> str:
    value, error = _score(results, task, metric)
    form = ".4g" if results["higher_is_better"].get(task, {}).get(metric.partition(",")[0]) is False else ".1f"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")
