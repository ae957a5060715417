"""Adaptation on transformers' Trainer: an encoder-decoder learns from its decoder-only original, or from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, get_scheduler

from ..collators import Layout, Pair, collate, collate_for_teacher
from ..cross_attention import kind_of
from ..errors import UserError
from ..losses import SampledTarget, Target
from .curves import Panel
from .evaluation import HeldOutLoss, evaluate_student, evaluate_teacher
from .mixture import Sample
from .parts import PARTS, freeze, groups, parameters_of
from .resumable import Batches, ResumableTrainer
from .rows import Rows
from .settings import Part
from .teacher import Teacher, shard


@dataclass(frozen=True)
class Recipe:
    """What is trained when, beside what ``Seq2SeqTrainingArguments`` say.

    Attributes:
        frozen: parts that stay as they are.
        learning_rates: what the learning rate is multiplied with, by part.
        alone: steps in which cross-attention alone is trained (arXiv 2504.06225, section 3: 1000 where it was drawn at
            random).
        joining: steps over which the learning rate of all other parts then rises from 0. Without them the loss is
            thrown back by nats when everything begins to move at once.

    Raises:
        UserError: a number is negative, or there is no such part.
    """

    frozen: Sequence[Part] = ()
    learning_rates: dict[str, float] = field(default_factory=dict)
    alone: int = 0
    joining: int = 100

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.learning_rates) - set(PARTS)):
            raise UserError(f"No part is called {', '.join(unknown)}. The parts are {', '.join(PARTS)}.")
        if self.alone < 0 or self.joining < 0 or min(self.learning_rates.values(), default=0) < 0:
            raise UserError(
                f"alone ({self.alone}), joining ({self.joining}) and factors on learning rates "
                f"({self.learning_rates}) are not negative."
            )


class AdaptationTrainer(ResumableTrainer):
    """Trains on rows of examples, a teacher's hidden states beside them, and measures whether the encoder is used.

    Args:
        model: the encoder-decoder, or a PEFT model around it.
        args: the Trainer's; ``max_steps`` has to be set, as rows don't end.
        rows: the training rows of this rank from a position on; see ``Rows``.
        layout: how examples become inputs.
        capacity: tokens of packed rows in encoder and decoder; None for one example a row.
        recipe: what is trained when.
        teacher: learn from it; without one, from the labels.
        cached: learn from the samples of a teacher that the rows carry (``teacher_cache``), with this share against
            the labels.
        held_out: pairs to measure on, at least two.
        describe: facts for ``summary.json``.
        processing_class: the tokenizer, saved beside every checkpoint.

    Raises:
        UserError: arguments that don't fit each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Seq2SeqTrainingArguments,
        *,
        rows: Callable[[int], Rows],
        layout: Layout,
        capacity: tuple[int, int] | None = None,
        recipe: Recipe | None = None,
        teacher: Teacher | None = None,
        cached: float | None = None,
        held_out: Sequence[Pair] = (),
        describe: dict[str, Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        self.recipe = recipe or Recipe()
        _check(args, self.recipe, model, held_out)
        freeze(model, self.recipe.frozen)
        if teacher is not None:
            teacher.check_vocabulary(model)
        taught: Taught = None if cached is None else "cache"
        collator = _Collator(layout, capacity, "model" if teacher is not None else taught)
        super().__init__(
            model,
            args,
            batches=lambda position: Batches(rows(position), collator),
            eval_dataset=list(held_out) or None,
            teacher=None if teacher is None else teacher.model,
            describe=describe,
            processing_class=processing_class,
        )
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(args.device)
            if self.is_fsdp_enabled:
                shard(teacher)
        self._cached = cached
        self._layout = layout
        self.teacher_result: HeldOutLoss | None = None

    # Steps

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < self.recipe.alone:
            # They are not trained yet: no part in the clipping of the norm, no state in the optimizer.
            for parameter in parameters_of(model, ("embeddings", "encoder", "decoder")):
                parameter.grad = None
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over this micro-batch's labels over the number of labels of the whole step."""
        taught = inputs.pop("teacher", None)
        tokens = inputs.pop("tokens")
        target: Target | None = None
        if self.teacher is not None:
            target = self.teacher.target(taught)
        elif self._cached is not None:
            target = SampledTarget(
                taught, torch.full_like(taught, 1 / taught.shape[1], dtype=torch.float32), self._cached
            )
        outputs = model(**inputs, target=target, use_cache=False, num_items_in_batch=num_items_in_batch)
        self.meter.add(*tokens)
        for name in ("cross_entropy", "distillation"):
            if (part := getattr(outputs, name)) is not None:
                self.add_part(name, part)
        # Ranks average their gradients, and each holds its part of one sum.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if "params" in kwargs or "optimizer_dict" in kwargs or "model" in kwargs:
                raise UserError(
                    f"optim={self.args.optim.value} makes its own parameter groups: take AdamW or Adafactor."
                )
            self.optimizer = cls(
                groups(
                    trained,
                    self.get_decay_parameter_names(trained),
                    self.args.weight_decay,
                    self.args.learning_rate,
                    self.recipe.learning_rates,
                ),
                **kwargs,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule for cross-attention; for the rest the same, risen from 0 after it was alone."""
        shape = _shape(self.args, num_training_steps)
        recipe = self.recipe

        def joining(step: int) -> float:
            if step < recipe.alone:
                return 0.0
            return shape(step) * min(1.0, (step - recipe.alone + 1) / max(1, recipe.joining))

        late = joining if recipe.alone else shape
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(
            optimizer,
            [shape if group["part"] == "cross_attention" else late for group in optimizer.param_groups],
        )
        return super().create_scheduler(num_training_steps, optimizer)

    # Measuring

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Held-out losses by source, of this model and, the first time, of its teacher."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        if self.teacher is not None and self.teacher_result is None:
            self.teacher_result = evaluate_teacher(self.teacher, pairs, size)
        with self.accelerator.autocast():
            result = evaluate_student(self.model_wrapped, pairs, self._layout, size)
        metrics = {
            f"{metric_key_prefix}_loss": result.right.mean,
            f"{metric_key_prefix}_loss_error": result.right.standard_error,
            f"{metric_key_prefix}_loss_wrong": result.wrong.mean,
            f"{metric_key_prefix}_encoder_use": result.use.mean,
            f"{metric_key_prefix}_encoder_use_error": result.use.standard_error,
        }
        if self.teacher_result is not None:
            without = self.teacher_result.without
            assert without is not None
            metrics[f"{metric_key_prefix}_teacher"] = self.teacher_result.right.mean
            metrics[f"{metric_key_prefix}_teacher_without"] = without.mean
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.recipe.alone:
            logs["cross_attention_alone"] = float(self.state.global_step <= self.recipe.alone)
        super().log(logs, start_time)

    def told(self, metrics: dict[str, float]) -> str | None:
        if "eval_encoder_use" not in metrics:
            return super().told(metrics)
        teacher = f", the teacher's {metrics['eval_teacher']:.3f}" if "eval_teacher" in metrics else ""
        use, error = metrics["eval_encoder_use"], metrics["eval_encoder_use_error"]
        return f"held-out loss {metrics['eval_loss']:.3f}{teacher}, encoder use {use:.3f} ± {error:.3f}"

    def panels(self) -> list[Panel]:
        of_loss: dict[str, float] = {}
        of_use: dict[str, float] = {}
        if self.teacher_result is not None:
            assert self.teacher_result.without is not None
            of_loss["the teacher"] = self.teacher_result.right.mean
            of_loss["the teacher, no source"] = self.teacher_result.without.mean
            of_use["the teacher"] = self.teacher_result.use.mean
        return [
            Panel("training loss", {"training": "loss"}),
            Panel(
                "held-out loss, nats a token",
                {"right source": "eval_loss", "another's source": "eval_loss_wrong"},
                of_loss,
            ),
            Panel("encoder use: what the right source is worth", {"this model": "eval_encoder_use"}, of_use),
        ]

    def summary(self) -> dict[str, Any]:
        teacher = None if self.teacher_result is None else self.teacher_result.as_dict()
        return {**super().summary(), "teacher": teacher}


Taught = Literal["model", "cache"] | None


class _Collator:
    """Rows of samples to the tensors of a step."""

    def __init__(self, layout: Layout, capacity: tuple[int, int] | None, taught: Taught) -> None:
        self.layout, self.capacity, self.taught = layout, capacity, taught

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        samples = [sample for row in rows for sample in row]
        made = collate(rows, self.layout, self.capacity)
        source, target = (sum(len(getattr(s, side)) for s in samples) for side in ("source", "target"))
        made["tokens"] = [source, target, source + target if self.taught == "model" else 0]
        if self.taught and (unteachable := next((s for s in samples if not s.continues), None)):
            raise UserError(
                f"Example {unteachable.where} was corrupted, and a decoder-only teacher cannot teach it: it reads "
                "text from left to right. Distil with prefix_lm, or train on it without a teacher."
            )
        if self.taught == "model":
            made["teacher"] = collate_for_teacher(rows, self.layout, packed=self.capacity is not None)
        elif self.taught == "cache":
            made["teacher"] = torch.from_numpy(np.concatenate([_taught(s) for s in samples]).astype(np.int64))
        return made


def _taught(sample: Sample) -> npt.NDArray[np.uint32]:
    if sample.taught is None:
        raise UserError(f"The teacher's cache has nothing for example {sample.where}: make it for this text.")
    return sample.taught


def _shape(args: Seq2SeqTrainingArguments, steps: int) -> Callable[[int], float]:
    """The configured schedule as a factor of the peak, by step."""
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        dummy,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"lr_scheduler_type={args.lr_scheduler_type.value} is no function of the step alone: take another."
        )
    shape: Callable[[int], float] = scheduler.lr_lambdas[0]
    return shape


def _check(args: Seq2SeqTrainingArguments, recipe: Recipe, model: PreTrainedModel, held_out: Sequence[Pair]) -> None:
    if args.eval_strategy != "no" and len(held_out) < 2:
        raise UserError(
            f"eval_strategy={args.eval_strategy.value} needs at least two held-out examples; there are none."
        )
    if recipe.alone and not kind_of(model.config.decoder).weights:
        raise UserError(
            "Cross-attention cannot be trained alone here: it has no weights of its own. Leave the warm-up at 0."
        )
    if recipe.alone and args.deepspeed:
        raise UserError("DeepSpeed keeps gradients to itself, so cross-attention cannot be trained alone: take FSDP.")
