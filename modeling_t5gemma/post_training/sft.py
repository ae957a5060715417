"""Supervised fine-tuning: the trainers."""

from __future__ import annotations

from typing import Any

import torch

from ..training.curves import Panel
from ..training.trainer import AdaptationTrainer
from .decoder_only import DecoderOnlyTrainer
from .generated_metrics import Answering
from .tuned import AdapterTrainer


class _Answers(AdapterTrainer):
    """What both trainers add: generated answers are measured at every evaluation.

    Args:
        answering: how answers are generated; None for losses alone.
        args, kwargs: of the trainer.
    """

    def __init__(self, model: Any, *args: Any, answering: Answering | None = None, **kwargs: Any) -> None:
        self._answering = answering
        self._answered: dict[str, float] = {}
        super().__init__(model, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """The trainer's metrics, and those of ``score`` on generated answers."""
        self._answered = {}
        if self._answering is not None:
            pairs = self.eval_dataset if eval_dataset is None else eval_dataset
            model = self.accelerator.unwrap_model(self.model_wrapped)
            training = model.training
            model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                found = self._answering.measure(model, pairs, prints=self.is_world_process_zero())
            model.train(training)
            self._answered = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return {**super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs), **self._answered}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # One entry an evaluation, which the curves and the line on the screen are made of.
        if "eval_loss" in logs:
            logs |= self._answered
        super().log(logs, start_time)

    def told(self, metrics: dict[str, float]) -> str | None:
        line = super().told(metrics)
        if line is None or "eval_rougeL" not in metrics:
            return line
        return (
            f"{line}, exact match {metrics['eval_exact_match']:.1f}%, ROUGE-L {metrics['eval_rougeL']:.1f}, "
            f"chrF {metrics['eval_chrf']:.1f}"
        )

    def panels(self) -> list[Panel]:
        names = {"exact match": "exact_match", "ROUGE-L": "rougeL", "BLEU": "bleu", "chrF": "chrf"}
        return [
            *super().panels(),
            Panel("generated answers, of 100", {label: f"eval_{name}" for label, name in names.items()}),
        ]


class SftTrainer(_Answers, AdaptationTrainer):
    """``AdaptationTrainer`` on questions and answers: packing, the chunked loss and a teacher as there.

    Args:
        model: the encoder-decoder, or a PEFT model around it.
        answering: how generated answers are measured, beside the losses.
        others: as ``AdaptationTrainer``.
    """


class DecoderOnlySftTrainer(_Answers, DecoderOnlyTrainer):
    """The same on a decoder-only model, which reads question and answer, and learns the answer.

    Args:
        model: a causal language model of transformers, or a PEFT model around it.
        answering: how generated answers are measured, beside the losses.
        others: as ``DecoderOnlyTrainer``.
    """
