"""``summary.json`` and ``curves.png``: what a run logged, for people and for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps; left out while nothing of it was logged.

    Attributes:
        title: with the unit.
        lines: keys of the log by label. A key that ends in "_error" as well has error bars.
        levels: horizontal lines by label.
    """

    title: str
    lines: Mapping[str, str]
    levels: Mapping[str, float] = field(default_factory=dict)


class Curves(TrainerCallback):
    """``summary.json`` and, where matplotlib is installed, ``curves.png`` in the output folder at every evaluation.

    Args:
        summary: facts of the run that stand at the summary's top.
        panels: what is drawn.
    """

    def __init__(self, summary: Callable[[], dict[str, Any]], panels: Callable[[], Sequence[Panel]]) -> None:
        self.summary = summary
        self.panels = panels

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        content = {**self.summary(), "step": state.global_step, "log": state.log_history}
        _replace(output / "summary.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
        _replace(output / "curves.png", lambda path: draw(path, state.log_history, self.panels()))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}")
    write(partial)
    if partial.exists():
        os.replace(partial, path)


def draw(path: Path, history: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> None:
    """Draw a log as a PNG file; does nothing without matplotlib or before anything was logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    logged = {key for entry in history for key in entry}
    drawn = [panel for panel in panels if logged & set(panel.lines.values())]
    if not drawn:
        return
    figure = Figure(figsize=(4.2 * len(drawn), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        _draw_panel(axes, history, panel)
    figure.savefig(path, dpi=120, format="png")


def _draw_panel(axes: Any, history: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    for label, key in panel.lines.items():
        entries = [entry for entry in history if key in entry]
        steps, values = [entry["step"] for entry in entries], [entry[key] for entry in entries]
        if entries and f"{key}_error" in entries[0]:
            axes.errorbar(
                steps, values, [entry[f"{key}_error"] for entry in entries], fmt="o-", capsize=3, label=label
            )
        elif entries:
            axes.plot(steps, values, "o-" if len(steps) < 40 else "-", markersize=3, label=label)
    for number, (label, level) in enumerate(panel.levels.items()):
        axes.axhline(level, color="black", linewidth=1, linestyle=("-", ":")[number % 2], label=label)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(fontsize="small")
