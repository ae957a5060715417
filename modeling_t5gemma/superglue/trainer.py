"""Fine-tuning a classifier, every weight of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from ..modeling_t5gemma import T5GemmaForMultipleChoice
from ..training.curves import Panel
from ..training.examples import ShuffledExamples
from ..training.resumable import Batches, ResumableTrainer
from ..training.rows import Rows
from .data import Example, collate
from .metrics import measure
from .models import Checkpoint
from .tasks import Task

_INPUTS = ("input_ids", "attention_mask")


class ClassificationTrainer(ResumableTrainer):
    """Cross-entropy over the classes of a task; ``evaluate`` measures what the task is judged by.

    Args:
        model: from ``Checkpoint.load``.
        args: the Trainer's; ``max_steps`` has to be set.
        task: what is learnt.
        train, held_out: examples with labels.
        checkpoint: where the model comes from and how it reads a text.
        describe, processing_class: as in ``ResumableTrainer``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Seq2SeqTrainingArguments,
        *,
        task: Task,
        train: Sequence[Example],
        held_out: Sequence[Example],
        checkpoint: Checkpoint,
        describe: dict[str, Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        examples = ShuffledExamples(train, args.seed)
        self._reads = checkpoint.reads
        self._collate = functools.partial(collate, form=checkpoint.form)

        def batches(position: int) -> Batches:
            rows = Rows(
                examples,
                None,
                args.per_device_train_batch_size,
                args.world_size,
                args.process_index,
                position,
                num_workers=args.dataloader_num_workers,
            )
            return Batches(rows, lambda rows: self._collate([example for row in rows for example in row]))

        super().__init__(
            model,
            args,
            batches=batches,
            eval_dataset=list(held_out),
            describe=describe,
            processing_class=processing_class,
        )
        self.task = task
        self._takes_choices = isinstance(model, T5GemmaForMultipleChoice)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over this micro-batch's examples over the number of examples of the whole step."""
        labels, tokens = inputs.pop("labels"), inputs.pop("tokens")
        scores = self._scores(model, inputs)
        assert num_items_in_batch is not None, "every step counts its examples"
        loss = F.cross_entropy(scores.float(), labels, reduction="sum") / num_items_in_batch
        self.meter.add(tokens * (self._reads != "decoder"), tokens * (self._reads != "encoder"), 0)
        # Ranks average their gradients, and each holds its part of one sum.
        loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def _scores(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scores of the classes, (B, classes); a model that knows one text at a time gets each choice by itself."""
        shape = inputs["input_ids"].shape
        if len(shape) == 2 or self._takes_choices:
            return model(**inputs).logits
        return model(**{name: value.flatten(0, 1) for name, value in inputs.items()}).logits.view(shape[:2])

    @torch.no_grad()
    def predict_scores(self, examples: Sequence[Example]) -> npt.NDArray[np.float32]:
        """Scores of each example's classes, (N, classes), the same on every rank."""
        model, size = self.model_wrapped, self.args.per_device_eval_batch_size
        order = sorted(range(len(examples)), key=lambda n: -examples[n].length)
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        classes = 2 if self.task.choices else len(self.task.labels)
        found = torch.zeros(len(examples), classes, device=self.args.device)
        training = model.training
        model.eval()
        # Every rank runs equally often, as sharded weights ask for it: one too many reads a batch that does not count.
        for turn in range(math.ceil(len(parts) / ranks)):
            number = turn * ranks + rank
            part = parts[number] if number < len(parts) else parts[0]
            batch = self._collate([examples[n] for n in part])
            inputs = {name: value.to(self.args.device) for name, value in batch.items() if name.endswith(_INPUTS)}
            with self.accelerator.autocast():
                scores = self._scores(model, inputs).float()
            if number < len(parts):
                found[part] = scores
        model.train(training)
        scores_of_all: npt.NDArray[np.float32] = (
            torch.as_tensor(self.accelerator.reduce(found, reduction="sum")).cpu().numpy()
        )
        return scores_of_all

    def metrics(self, examples: Sequence[Example], scores: npt.NDArray[np.float32]) -> dict[str, float]:
        """The loss and the task's metrics of labelled examples."""
        labels = np.array([example.label for example in examples], np.int64)
        loss = F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels)).item()
        keys = [example.key for example in examples]
        return {"loss": loss, **measure(self.task, keys, labels, scores.argmax(axis=1))}

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """The loss and the task's metrics on the held-out examples."""
        examples: Sequence[Example] = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.metrics(examples, self.predict_scores(examples))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def told(self, metrics: dict[str, float]) -> str | None:
        if "eval_accuracy" not in metrics:
            return super().told(metrics)
        return f"{self.task.name}: dev accuracy {metrics['eval_accuracy']:.3f}, loss {metrics['eval_loss']:.3f}"

    def panels(self) -> list[Panel]:
        names = ("accuracy", *(name for name in self.task.metrics if name != "accuracy"))
        return [*super().panels(), Panel("development set", {name: f"eval_{name}" for name in names})]
