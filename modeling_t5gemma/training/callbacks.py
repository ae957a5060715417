"""What happens beside the steps: checkpoints are completed, a signal ends a run in order, progress is shown."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from ..objectives import SENTINELS_FILE
from .checkpoints import complete, keep_last


class CompleteCheckpoints(TrainerCallback):
    """Declares checkpoints complete and deletes old ones, in this order.

    Args:
        keep: how many stay; None for all.
        everyone: waits for all ranks.
        state: what a complete checkpoint knows beside what the Trainer saves; asked on every rank.
        add: saves, on every rank, what it needs beside that.
    """

    def __init__(
        self,
        keep: int | None,
        everyone: Callable[[], None],
        state: Callable[[], dict[str, Any]],
        add: Callable[[Path], None],
    ) -> None:
        self.keep = keep
        self.everyone = everyone
        self.state = state
        self.add = add

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        output = Path(args.output_dir)
        checkpoint = output / f"checkpoint-{state.global_step}"
        self.add(checkpoint)
        to_resume = self.state()
        self.everyone()
        if state.is_world_process_zero:
            if (output / SENTINELS_FILE).exists():
                shutil.copyfile(output / SENTINELS_FILE, checkpoint / SENTINELS_FILE)
            complete(checkpoint, to_resume)
            keep_last(output, self.keep)


class RatesOfSettings(TrainerCallback):
    """A resumed run goes on with the learning rates of its settings: the checkpoint's would go on in silence where it
    is continued with lower ones.

    Args:
        rates: the peak of each parameter group, as the scheduler was made with it.
    """

    def __init__(self, rates: Callable[[], list[float]]) -> None:
        self.rates = rates

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        wanted, held = self.rates(), list(getattr(lr_scheduler, "base_lrs", ()))
        if held == wanted:
            return
        lr_scheduler.base_lrs = wanted
        for group, rate, before in zip(optimizer.param_groups, wanted, held, strict=True):
            group["initial_lr"] = rate
            group["lr"] *= rate / before if before else 1.0


class EndOnError(TrainerCallback):
    """A run that ends for an error ends with a checkpoint.

    Args:
        saved: whether the last checkpoint has all steps.

    Attributes:
        error: what ends the run.
    """

    def __init__(self, saved: Callable[[], bool]) -> None:
        self.saved = saved
        self.error: UserError | None = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.error is not None:
            control.should_save = not self.saved()
            control.should_evaluate = False


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
    """A bar with the loss and the rate, and a line for each evaluation.

    Args:
        told: that line, from the evaluation's metrics; None for nothing to say.
    """

    def __init__(self, told: Callable[[dict[str, float]], str | None]) -> None:
        self.told = told
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
        if any(name.startswith("eval_") for name in logs) and not args.disable_tqdm:
            line = self.told(logs)
            if line is not None:
                tqdm.write(f"step {state.global_step}: {line}")

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen, so that what is told next has a line of its own."""
        if self.bar is not None:
            self.bar.close()
