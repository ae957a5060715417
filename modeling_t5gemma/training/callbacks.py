"""What happens beside the steps: checkpoints are completed, a signal ends a run in order, curves are drawn."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import complete, keep_last


class CompleteCheckpoints(TrainerCallback):
    """Declares checkpoints complete and deletes old ones, in this order.

    Args:
        keep: how many stay; None for all.
        everyone: waits for all ranks.
        state: what a complete checkpoint knows beside what the Trainer saves.
    """

    def __init__(self, keep: int | None, everyone: Callable[[], None], state: Callable[[], dict[str, Any]]) -> None:
        self.keep = keep
        self.everyone = everyone
        self.state = state

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.everyone()
        if state.is_world_process_zero:
            output = Path(args.output_dir)
            complete(output / f"checkpoint-{state.global_step}", self.state())
            keep_last(output, self.keep)


class EndOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end the run after the step it is in, with a checkpoint. A second one ends it at once.

    Args:
        agree: of a flag on this rank, whether it is set on any, so that all ranks stop after the same step.
    """

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        self.agree = agree
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.release()

    def release(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.agree(self.received is not None):
            control.should_save = True
            control.should_training_stop = True

    def _receive(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number)
        self.release()


class Progress(TrainerCallback):
    """A bar with the loss and the rate, and a line for each evaluation."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_local_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=args.disable_tqdm, leave=False
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or logs is None:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {logs.get('tokens_per_second', 0):.0f} tokens/s")
        if "eval_loss" in logs and not args.disable_tqdm:
            use, error = logs["eval_encoder_use"], logs["eval_encoder_use_error"]
            teacher = f", the teacher's {logs['eval_teacher']:.3f}" if "eval_teacher" in logs else ""
            tqdm.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}{teacher}, encoder use {use:.3f} ± "
                f"{error:.3f}"
            )

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Curves(TrainerCallback):
    """``summary.json`` and, where matplotlib is installed, ``curves.png`` in the output folder at every evaluation.

    Args:
        summary: facts of the run that stand at the summary's top.
    """

    def __init__(self, summary: Callable[[], dict[str, Any]]) -> None:
        self.summary = summary

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
        _replace(output / "curves.png", lambda path: _draw(path, state.log_history, self.summary()))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}")
    write(partial)
    if partial.exists():
        os.replace(partial, path)


def _draw(path: Path, history: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """The training loss, and where it was measured the held-out loss and the encoder's use, beside the teacher's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    measured = [entry for entry in history if "eval_loss" in entry]
    figure = Figure(figsize=(12 if measured else 4.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
    titles = ["training loss", "held-out loss, nats a token", "encoder use: what the right source is worth"]
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    panels[0].plot([step for step, _ in losses], [loss for _, loss in losses])
    if measured:
        _draw_measured(panels[1], panels[2], measured, summary.get("teacher"))
    figure.savefig(path, dpi=120, format="png")


def _draw_measured(loss: Any, use: Any, measured: list[dict[str, Any]], teacher: dict[str, Any] | None) -> None:
    steps = [entry["step"] for entry in measured]
    loss.plot(steps, [entry["eval_loss"] for entry in measured], "o-", label="right source")
    loss.plot(steps, [entry["eval_loss_wrong"] for entry in measured], "o--", label="another's source")
    values, errors = ([entry[f"eval_encoder_use{end}"] for entry in measured] for end in ("", "_error"))
    use.errorbar(steps, values, errors, fmt="o-", capsize=3)
    if teacher is not None:
        loss.axhline(teacher["right"]["mean"], color="black", linewidth=1, label="the teacher")
        loss.axhline(teacher["without"]["mean"], color="black", linestyle=":", label="the teacher, no source")
        use.axhline(teacher["use"]["mean"], color="black", linewidth=1)
    loss.legend()
