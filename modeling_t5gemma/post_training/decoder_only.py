"""Decoder-only models on the same examples: what our encoder-decoders are compared with.

Shapes: R rows, U tokens of a row, N tokens of answers in all, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainingArguments
from transformers.utils.generic import ModelOutput

from ..collators import Layout, Pair, collate_for_teacher
from ..errors import UserError
from ..losses import linear_loss, token_losses
from ..training.curves import Panel
from ..training.evaluation import HeldOutLoss, with_wrong_sources
from ..training.parts import freeze
from ..training.resumable import Batches, ResumableTrainer
from ..training.rows import Rows
from ..training.settings import Part


@dataclass
class AnswerLoss(ModelOutput):
    """Attributes:
    loss: the sum over answers' tokens over their number, with a graph.
    token_losses: float32 (N,), each one's cross-entropy in nats, where they were asked for instead.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


def collate_answers(rows: Sequence[Sequence[Pair]], layout: Layout, packed: bool) -> dict[str, Any]:
    """As ``collate_for_teacher``, with ``labels`` int64 (N,) for its ``places``: the questions have none."""
    targets = [pair.target for row in rows for pair in row]
    labels = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return {**collate_for_teacher(rows, layout, packed), "labels": labels}


def give_answer_losses(model: PreTrainedModel) -> None:
    """Let a causal language model's forward take a batch of ``collate_answers``, whose loss needs no logits.

    It is done inside of the forward, since distributed training gathers weights and gradients around that. All other
    calls are as before.

    Raises:
        UserError: the head is not one plain matrix.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            f"The head of {type(model).__name__} is a {type(head).__name__}, not one plain matrix, which answers' "
            "losses need: leave it unquantised and without an adapter."
        )
    plain = model.forward
    config = model.config.get_text_config(decoder=True)
    softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @functools.wraps(plain)
    def forward(
        *args: Any,
        places: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_token_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        if places is None:
            return plain(*args, **kwargs)
        labels = kwargs.pop("labels")
        kept = {name: value for name, value in kwargs.items() if value is not None}
        states = model.base_model(*args, **kept | {"use_cache": False, "return_dict": True}).last_hidden_state
        states, weight = states.flatten(0, 1)[places], model.get_output_embeddings().weight
        if return_token_losses:
            return AnswerLoss(token_losses=token_losses(states, weight, labels, softcap))
        return AnswerLoss(
            loss=linear_loss(states, weight, labels, softcap=softcap, num_items_in_batch=num_items_in_batch).total
        )

    model.forward = forward


@torch.no_grad()
def answer_losses(model: nn.Module, pairs: Sequence[Pair], layout: Layout, batch_size: int) -> torch.Tensor:
    """The mean loss of each pair's target, float32 (len(pairs),) on the CPU; as ``student_losses``."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    losses: list[torch.Tensor] = []
    for begin in range(0, len(pairs), batch_size):
        some = pairs[begin : begin + batch_size]
        batch = collate_answers([[pair] for pair in some], layout, packed=False)
        batch = {name: value.to(device) for name, value in batch.items()}
        tokens = model(**batch, return_token_losses=True).token_losses.cpu()
        losses += [each.mean() for each in tokens.split([len(pair.target) for pair in some])]
    model.train(training)
    return torch.stack(losses)


class DecoderOnlyTrainer(ResumableTrainer):
    """Trains a decoder-only model on answers behind their questions.

    Args:
        model: a causal language model of transformers, or a PEFT model around it.
        args: the Trainer's; ``max_steps`` has to be set.
        rows: the training rows of this rank from a position on; see ``Rows``.
        layout: of the model.
        packed: whether rows have several examples.
        frozen: parts that stay as they are: "embeddings" or "decoder".
        held_out: pairs to measure on, at least two.
        kwargs: ``describe`` and ``processing_class``, as for ``ResumableTrainer``.

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
        packed: bool = False,
        frozen: Sequence[Part] = (),
        held_out: Sequence[Pair] = (),
        **kwargs: Any,
    ) -> None:
        if args.eval_strategy != "no" and len(held_out) < 2:
            raise UserError(
                f"eval_strategy={args.eval_strategy.value} needs at least two held-out examples; there are "
                f"{len(held_out)}."
            )
        freeze(model, frozen)
        give_answer_losses(model.get_base_model() if hasattr(model, "peft_config") else model)

        def collate(examples: Sequence[Sequence[Pair]]) -> dict[str, Any]:
            return {**collate_answers(examples, layout, packed), "tokens": _tokens(examples)}

        def batches(position: int) -> Iterable[dict[str, Any]]:
            return Batches(rows(position), collate)

        super().__init__(model, args, batches=batches, eval_dataset=list(held_out) or None, **kwargs)
        self._layout = layout

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over this micro-batch's answers over the number of answers' tokens of the whole step."""
        self.meter.add(*inputs.pop("tokens"))
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        # Ranks average their gradients, and each holds its part of one sum.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Losses of held-out answers behind their own questions and behind others'."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            result = HeldOutLoss.of(
                *(
                    answer_losses(self.model_wrapped, each, self._layout, size)
                    for each in (pairs, with_wrong_sources(pairs))
                )
            )
        metrics = {
            f"{metric_key_prefix}_loss": result.right.mean,
            f"{metric_key_prefix}_loss_error": result.right.standard_error,
            f"{metric_key_prefix}_loss_wrong": result.wrong.mean,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def panels(self) -> list[Panel]:
        return [
            Panel("training loss", {"training": "loss"}),
            Panel("held-out loss, nats a token", {"right question": "eval_loss", "another's": "eval_loss_wrong"}),
        ]


def _tokens(rows: Sequence[Sequence[Pair]]) -> list[int]:
    source, target = (sum(len(getattr(pair, side)) for row in rows for pair in row) for side in ("source", "target"))
    return [source, target, 0]
