"""What all training here has in common: a run that is killed goes on where it was, to the bit.

The order of the data is a function of one integer, which every complete checkpoint holds.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from ..errors import UserError
from ..losses import IGNORED
from .callbacks import CompleteCheckpoints, EndOnError, EndOnSignal, Progress, RatesOfSettings
from .checkpoints import find, read_state, step_of, tidy
from .checks import check_arguments
from .curves import Curves, Panel
from .meter import Meter
from .rows import Rows


class Diverged(UserError):
    """A loss or a weight became infinite or not a number."""


class Batches:
    """What a trainer iterates over: a dictionary a micro-batch. It has no length, as rows don't end.

    Args:
        rows: the rows of this rank.
        collate: makes the tensors of a batch from its rows of samples. ``position`` (int), ``where`` (a name for each
            sample) and ``samples`` are put beside them.
    """

    def __init__(self, rows: Rows, collate: Callable[[Sequence[Sequence[Any]]], dict[str, Any]]) -> None:
        self.rows, self.collate = rows, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.rows:
            where = [sample.where for row in batch.rows for sample in row]
            yield {**self.collate(batch.rows), "position": batch.position, "where": where}


class ResumableTrainer(Seq2SeqTrainer):
    """transformers' trainer on rows of data that go on from an integer.

    A subclass defines ``compute_loss``, which gets a batch of ``batches`` without position and where.

    Args:
        model: what is trained.
        args: the Trainer's; ``max_steps`` has to be set, as rows don't end.
        batches: the batches of this rank from a position on.
        eval_dataset: what ``evaluate`` measures on.
        teacher: a second model that a step runs forward, for counting operations.
        describe: facts for ``summary.json``.
        processing_class: the tokenizer, saved beside every checkpoint.

    Raises:
        UserError: arguments that have no meaning here.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: Seq2SeqTrainingArguments,
        *,
        batches: Callable[[int], Iterable[dict[str, Any]]],
        eval_dataset: Any = None,
        teacher: PreTrainedModel | None = None,
        describe: dict[str, Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        _check(model, args)
        if args.hub_token:  # every checkpoint has a file with the arguments
            os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
        args.ignore_data_skip = True
        args.logging_nan_inf_filter = False
        args.remove_unused_columns = False
        keep, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model,
            args,
            train_dataset=torch.utils.data.Dataset(),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        self.describe = describe or {}
        self._batches = batches
        self._position = 0
        self._begun = 0  # the step that this process went on from
        self._sum = 0.0  # of this rank's losses, over all steps of the run
        self._where: list[str] = []
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.meter = Meter(model, teacher, dtype)
        self._parts: dict[str, torch.Tensor] = {}
        self._rates: list[float] = []
        self.signals = EndOnSignal(self._any_rank)
        self._failure = EndOnError(self._saved)
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self._progress = Progress(self.told)
        for callback in (
            self._progress,
            CompleteCheckpoints(
                keep, self.accelerator.wait_for_everyone, self._state_to_resume, self.add_to_checkpoint
            ),
            RatesOfSettings(lambda: self._rates),
            self.signals,
            self._failure,
            Curves(self.summary, self.panels),
        ):
            self.add_callback(callback)

    # For subclasses

    def items(self, batch: dict[str, Any]) -> int:
        """What a micro-batch counts for in the mean over a step: its labels."""
        return int((batch["labels"] != IGNORED).sum())

    def add_part(self, name: str, value: torch.Tensor) -> None:
        """Log a part of the loss or a number beside it.

        Args:
            value: this micro-batch's share of the step's mean, without a graph. Shares are summed over the
                micro-batches and ranks of a step, and steps averaged.
        """
        self._parts[name] = self._parts.get(name, 0) + value

    def told(self, metrics: dict[str, float]) -> str | None:
        """A line about an evaluation, for the screen."""
        return f"held-out loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else None

    def add_to_checkpoint(self, checkpoint: Path) -> None:
        """Save, on every rank, what a checkpoint needs beside what the Trainer saves."""

    def read_from_checkpoint(self, checkpoint: Path) -> None:
        """Load, on every rank, what ``add_to_checkpoint`` has saved."""

    def end_for(self, error: UserError) -> None:
        """End the run for an error between two steps, with the steps done so far saved. Called on all ranks. ``train``
        raises the error, saying what is saved; until then, the caller returns as if there was no more to do.

        Raises:
            UserError: the error, where there is nothing to save.
        """
        if not self.is_in_train or self._saved():
            raise self._with_way_on(error)
        self._failure.error = error
        self.control.should_evaluate = False
        self.control.should_training_stop = True

    def panels(self) -> list[Panel]:
        """What ``curves.png`` shows."""
        return [Panel("training loss", {"training": "loss"}), Panel("held-out loss", {"held out": "eval_loss"})]

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says at its top."""
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {**self.describe, "position": self._position, "rows_per_step": rows, "processes": self.args.world_size}

    # The Trainer's

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's; True goes on from the last whole checkpoint, if there is one. Those that cannot be gone on
        from are put out of the way first.

        Raises:
            UserError: the named checkpoint is not whole or none of those that are there is, there is no room for a new
                one, or the run was ended for an error (``end_for``).
            Diverged: with the step, the samples and the last good checkpoint.
        """
        output = Path(self.args.output_dir)
        found = find(output)
        if resume_from_checkpoint is True:
            if found.last is None and found.damaged:
                first = next(iter(found.damaged.values()))
                raise UserError(f"{first} There is no other to go on from: remove the folder {output} to begin anew.")
            resume_from_checkpoint = None if found.last is None else str(found.last)
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            state = read_state(checkpoint)
            self._position, self._sum = int(state["position"]), float(state["sum_of_losses"])
            self._begun = step_of(checkpoint)
            self.read_from_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()  # all have looked
        if self.is_world_process_zero():
            for line in tidy(found):
                print(line, file=sys.stderr)
        self.accelerator.wait_for_everyone()
        self._failure.error = None
        try:
            result = super().train(resume_from_checkpoint or None, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_full(error):
                raise
            raise UserError(
                f"No room is left in {self.args.output_dir} for the checkpoint of step {self.state.global_step}. The "
                f"last complete one: {self._last() or 'none yet'}. Make room, and the same command goes on from it."
            ) from error
        finally:
            self.signals.release()
            self._progress.close()
        if self._failure.error is not None:
            raise self._with_way_on(self._failure.error)
        return result._replace(training_loss=result.metrics["train_loss"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's.

        Raises:
            Diverged: a weight is not finite, as an update can make it whose loss was.
        """
        if self._any_rank(not _all_finite(self.model)):
            raise Diverged(
                f"After step {self.state.global_step}, weights are infinite or no numbers. {self._last_good()} Lower "
                "the learning rate."
            )
        super().save_model(output_dir, _internal_call)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but one epoch, as rows don't end: where every step was done before a kill, the next epoch
        would do one more."""
        _, *others = super().set_initial_training_values(*args, **kwargs)
        return 1, *others

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the Trainer's.

        Raises:
            UserError: it is in a package that is not installed.
        """
        try:
            found: tuple[Any, dict[str, Any]] = Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)
        except ImportError as error:
            raise UserError(f"training.optim is {args.optim.value}: {error}. Or take another.") from error
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._rates = list(getattr(scheduler, "base_lrs", ()))
        return scheduler

    def get_train_dataloader(self) -> Any:
        return self._batches(self._position)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The micro-batches of a step, and how many items they have on all ranks; the Trainer would leave out every
        row's first label, as for decoder-only models."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        count = torch.tensor(sum(self.items(batch) for batch in batches), device=device)
        return batches, torch.as_tensor(self.accelerator.reduce(count, reduction="sum"))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        position, self._where = inputs.pop("position"), inputs.pop("where")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if self._any_rank(not math.isfinite(value)):
            raise Diverged(
                f"The loss of step {self.state.global_step + 1} is {value} on the examples "
                f"{', '.join(self._where[:16])}. {self._last_good()} Look at these examples, or lower the learning "
                "rate."
            )
        self._sum += value
        self._position = position
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - max(self._begun, self._last_logged()))
            for name, value in self._parts.items():
                logs[name] = float(torch.as_tensor(self.accelerator.reduce(value, reduction="sum"))) / steps
            self._parts = {}
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator.num_processes)
        if "train_loss" in logs:
            # The Trainer's are of the steps since a resume by all steps, and the other way round.
            done = self.state.global_step - self._begun
            logs["train_loss"] = self._mean_over_ranks(self._sum) / max(1, self.state.global_step)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] *= done / self.args.max_steps
        super().log(logs, start_time)

    def _any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), reduction="sum")
        return bool(torch.as_tensor(total) > 0)

    def _last_good(self) -> str:
        return f"The last good checkpoint: {self._last() or 'none yet'}."

    def _state_to_resume(self) -> dict[str, Any]:
        """Asked on all ranks."""
        return {"position": self._position, "sum_of_losses": self._mean_over_ranks(self._sum)}

    def _mean_over_ranks(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        here = torch.tensor(value, dtype=torch.float32, device=self.args.device)
        return float(torch.as_tensor(self.accelerator.reduce(here, reduction="mean")))

    def _saved(self) -> bool:
        """Whether there is nothing that a checkpoint would add to the last one. Asked on all ranks."""
        last, step = self._last_of_all(), self.state.global_step
        return not step or (last is not None and step_of(last) == step)

    def _with_way_on(self, error: UserError) -> UserError:
        last = self._last_of_all()
        told = "The same command begins anew." if last is None else f"The same command goes on from {last}."
        ended = type(error)(f"{error} {told}")
        ended.__cause__ = error
        return ended

    def _last_of_all(self) -> Path | None:
        """The last complete checkpoint, the same on every rank: the first may still be completing it. Asked on all."""
        self.accelerator.wait_for_everyone()
        return self._last()

    def _last(self) -> Path | None:
        return find(Path(self.args.output_dir)).last

    def _last_logged(self) -> int:
        return max((int(entry["step"]) for entry in self.state.log_history if "loss" in entry), default=0)


def _all_finite(model: torch.nn.Module) -> bool:
    """Whether all trained weights are, of a sharded model this rank's."""
    sums = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            here = parameter.detach()
            here = here.to_local() if isinstance(here, DTensor) else here
            sums.append(here.sum(dtype=torch.float32))
    return bool(torch.stack(sums).isfinite().all())


def _is_full(error: Exception) -> bool:
    """Whether saving failed for want of room; the libraries below say so each in its way."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "No space left" in str(error) or "PytorchStreamWriter failed" in str(error)


def _check(model: PreTrainedModel, args: Seq2SeqTrainingArguments) -> None:
    if args.device.type == "cpu" and model.config._attn_implementation == "flex_attention":
        raise UserError("flex_attention has no gradient on a CPU: leave model.attention out, or take another.")
    if args.max_steps <= 0:
        raise UserError(f"max_steps is {args.max_steps}: rows don't end, so say after how many steps to stop.")
    check_arguments(args)
