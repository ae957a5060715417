"""What came out: a table and a chart for one checkpoint or for several beside each other, and files to submit."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .run import RUN_FILE, TASK_FILE, write
from .tasks import TASKS

RESULTS_FILE = "results.json"

# "Encoder-Decoder Gemma" (arXiv 2504.06225): mean accuracy in percent on the development sets, of pretrained models.
_PAPER_GEMMA = {"gemma-2-2b": 75.5, "gemma-2-9b": 82.5}
_PAPER_T5GEMMA = {
    "2b-2b": (88.1, 88.1),
    "9b-2b": (90.2, 90.7),
    "9b-9b": (91.4, 91.8),
    "s-s": (69.8, 69.6),
    "b-b": (71.2, 71.5),
    "l-l": (78.7, 79.7),
    "xl-xl": (84.4, 85.4),
}
PAPER = _PAPER_GEMMA | {
    f"t5gemma-{pair}-{objective}": value
    for pair, values in _PAPER_T5GEMMA.items()
    for objective, value in zip(("prefixlm", "ul2"), values)
}


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and their standard deviation (of a sample; None for one seed)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return _percent(self.mean) + ("" if self.deviation is None else f" ± {_percent(self.deviation)}")

    def as_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "deviation": self.deviation}


@dataclass(frozen=True)
class Results:
    """One checkpoint's results.

    Attributes:
        path: the checkpoint.
        tasks: ``task.json`` of each task that is done, by name.
    """

    path: str
    tasks: Mapping[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """From the folder of a run.

        Raises:
            UserError: it holds no finished task.
        """
        files = {name: folder / name / TASK_FILE for name in TASKS if (folder / name / TASK_FILE).is_file()}
        if not files or not (folder / RUN_FILE).is_file():
            raise UserError(f"{folder} holds no finished task: give the folder of a model that --task was run for.")
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return cls(run["model"], {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items()})

    @property
    def name(self) -> str:
        return Path(self.path).name

    def metrics(self, task: str) -> list[str]:
        """A task's metrics: accuracy first, then its own."""
        return ["accuracy", *(name for name in TASKS[task].metrics if name != "accuracy")]

    def figure(self, task: str, metric: str) -> Figure:
        return Figure.of([metrics[metric] for metrics in self.tasks[task]["seeds"].values()])

    def mean(self, metric: str) -> Figure:
        """The mean over the tasks: of each seed that all of them have, else of the tasks' means."""
        seeds = set.intersection(*(set(task["seeds"]) for task in self.tasks.values()))
        if not seeds:
            return Figure(statistics.fmean(self.figure(task, metric).mean for task in self.tasks), None)
        return Figure.of(
            [statistics.fmean(task["seeds"][seed][metric] for task in self.tasks.values()) for seed in sorted(seeds)]
        )

    def as_dict(self) -> dict[str, Any]:
        tasks = {
            name: {
                **task,
                "metrics": {m: self.figure(name, m).as_dict() for m in [*self.metrics(name), "score"]},
            }
            for name, task in self.tasks.items()
        }
        means = {f"mean_{metric}": self.mean(metric).as_dict() for metric in ("accuracy", "score")}
        return {"model": self.path, **means, "paper": PAPER.get(self.name), "tasks": tasks}


def report(folder: Path) -> str:
    """Write ``results.json``, ``results.md``, ``results.png`` and ``submission/`` of a run; the table is returned.

    Raises:
        UserError: as ``Results.read``; matplotlib is missing.
    """
    results = Results.read(folder)
    lines = [
        "| task | metric | development set | seeds | learning rate | batch | dropout | trials |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in results.tasks.items():
        setting = task["setting"]
        for number, metric in enumerate(results.metrics(name)):
            more = (
                f"{len(task['seeds'])} | {setting['learning_rate']:.2g} | {setting['batch_size']} | "
                f"{setting['dropout']:.2g} | {task['trials']}"
            )
            ends = more if number == 0 else " | | | |"
            lines.append(f"| {name} | {metric} | {results.figure(name, metric)} | {ends} |")
    count = _count(results)
    lines.append(f"| mean of {count} | accuracy | {results.mean('accuracy')} | | | | | |")
    lines.append(f"| mean of {count} | official score | {results.mean('score')} | | | | | |")
    if results.name in PAPER:
        lines.append(f"| the paper's mean of 7 tasks | accuracy | {PAPER[results.name]:.1f} | | | | | |")
    table = "\n".join(lines) + "\n"
    write(folder / RESULTS_FILE, json.dumps(results.as_dict(), indent=2) + "\n")
    write(folder / "results.md", table)
    draw(folder / "results.png", [results])
    for name, task in results.tasks.items():
        predicted = folder / name / task["best_trial"] / "test" / f"{TASKS[name].folder}.jsonl"
        if predicted.is_file():
            (folder / "submission").mkdir(exist_ok=True)
            shutil.copyfile(predicted, folder / "submission" / predicted.name)
    return table


def compare(folders: Sequence[Path], output: Path) -> str:
    """Write ``comparison.md``, ``.json`` and ``.png`` of several runs into a folder; the table is returned.

    Means are over the tasks that all of them have.

    Raises:
        UserError: as ``Results.read``; no task is common.
    """
    read = [Results.read(folder) for folder in folders]
    common = [name for name in TASKS if all(name in each.tasks for each in read)]
    if not common:
        raise UserError(f"No task was run in all of {', '.join(map(str, folders))}: run --task for each of them.")
    models = [Results(each.path, {name: each.tasks[name] for name in common}) for each in read]
    names = [each.name for each in models]
    titles = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    rows = [[name, *(str(model.figure(name, "accuracy")) for model in models)] for name in common]
    count = _count(models[0])
    rows.append([f"mean accuracy of {count}", *(str(model.mean("accuracy")) for model in models)])
    rows.append([f"mean official score of {count}", *(str(model.mean("score")) for model in models)])
    if any(name in PAPER for name in names):
        rows.append(["the paper's mean accuracy", *(f"{PAPER[n]:.1f}" if n in PAPER else "" for n in names)])
    lines = [["accuracy on the development set", *titles], ["---"] * (len(models) + 1), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write(output / "comparison.md", table)
    write(output / "comparison.json", json.dumps([model.as_dict() for model in models], indent=2) + "\n")
    draw(output / "comparison.png", models, titles)
    return table


def draw(path: Path, models: Sequence[Results], titles: Sequence[str] | None = None) -> None:
    """A bar for each task and model, with the deviation over seeds.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as error:
        raise UserError("The chart needs matplotlib: pip install modeling_t5gemma[train]") from error
    groups = [*models[0].tasks, "mean"]
    canvas = Canvas(figsize=(1.1 * len(groups) + 2, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        figures = [*(model.figure(name, "accuracy") for name in model.tasks), model.mean("accuracy")]
        places = [place + (number - (len(models) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(
            places,
            [100 * figure.mean for figure in figures],
            width,
            yerr=[100 * (figure.deviation or 0) for figure in figures],
            capsize=3,
            label=titles[number] if titles else model.name,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    canvas.legend(fontsize="small", loc="outside upper right", ncols=len(models))
    partial = path.with_name(f".{path.name}.partial")
    canvas.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def _count(results: Results) -> str:
    done = len(results.tasks)
    return f"{done} tasks" if done == len(TASKS) else f"{done} of {len(TASKS)} tasks"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
