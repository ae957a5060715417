"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of an encoder-decoder.

A question is encoded once for both of its answers, which the decoder reads in one batch; there are no logits.

Shapes: R pairs; a last dimension of 2 is (chosen, rejected); N pairs of a run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from ..collators import Layout
from ..errors import UserError
from ..inference.adapters import fingerprint
from ..losses import IGNORED
from ..training.curves import Panel
from ..training.examples import ShuffledExamples
from ..training.resumable import Batches
from ..training.rows import Rows
from ..training.settings import Part
from .preferences import PreferencePair, collate_answers
from .reference import evaluating, log_probabilities
from .settings import DpoSettings
from .tuned import TunedTrainer


def preference_losses(
    logps: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, how: DpoSettings
) -> torch.Tensor:
    """The loss of each pair, float (R,).

    Args:
        logps, reference: float (R, 2), the answers' log-probabilities under the trained model and the reference.
        lengths: int64 (R, 2), their tokens.
    """
    ratios = logps - reference
    if how.loss_type == "ipo":
        chosen, rejected = (ratios / lengths.clamp(min=1)).unbind(-1)
        return (chosen - rejected - 1 / (2 * how.beta)) ** 2
    margin = how.beta * (ratios[:, 0] - ratios[:, 1])
    smoothing = how.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def preference_facts(logps: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """What is logged of each pair, float (R,) each, named as TRL does. A reward is beta times a log-ratio
    (arXiv 2305.18290, equation 5); equal ones are not counted as right."""
    rewards = beta * (logps - reference)
    chosen, rejected = rewards.unbind(-1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(rewards.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }


class DpoTrainer(TunedTrainer):
    """Trains on pairs of answers.

    Args:
        model: the encoder-decoder, or a PEFT model around it.
        args: the Trainer's; ``max_steps`` has to be set, and a batch is of so many pairs.
        pairs: to train on.
        layout: how they become inputs.
        settings: what is optimised.
        held_out: pairs to measure on.
        reference_model: where ``settings.reference`` is "loaded".
        frozen: parts that stay as they are.
        seed: decides the order of the pairs.
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
        pairs: Sequence[PreferencePair],
        layout: Layout,
        settings: DpoSettings | None = None,
        held_out: Sequence[PreferencePair] = (),
        reference_model: PreTrainedModel | None = None,
        frozen: Sequence[Part] = (),
        seed: int = 0,
        describe: dict[str, Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        self.settings = settings or DpoSettings()
        self.settings.check()
        kind = self.settings.reference or ("adapter_off" if hasattr(model, "disable_adapter") else "precomputed")
        if (kind == "loaded") != (reference_model is not None):
            raise UserError(f"A reference model goes with dpo.reference loaded, and with that alone; it is {kind}.")
        if args.eval_strategy != "no" and not held_out:
            raise UserError(f"eval_strategy={args.eval_strategy.value} needs held-out pairs; there are none.")
        numbered = [replace(pair, number=number) for number, pair in enumerate([*pairs, *held_out])]
        self.pairs, measured = numbered[: len(pairs)], numbered[len(pairs) :]
        self._layout = layout
        self._table: torch.Tensor | None = None
        examples = ShuffledExamples(self.pairs, seed)
        super().__init__(
            model,
            args,
            batches=lambda position: Batches(
                Rows(
                    examples,
                    None,
                    args.per_device_train_batch_size,
                    args.world_size,
                    args.process_index,
                    position,
                ),
                lambda rows: self._collate([row[0] for row in rows]),
            ),
            reference_model=reference_model,
            weighed=kind != "precomputed",
            frozen=frozen,
            eval_dataset=measured or None,
            describe=describe,
            processing_class=processing_class,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._prepare_reference()
        return super().train(resume_from_checkpoint, **kwargs)

    def items(self, batch: dict[str, Any]) -> int:
        """Pairs."""
        return len(batch["input_ids"])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over this micro-batch's pairs over the number of pairs of the whole step."""
        losses, facts = self._measured(model, inputs)
        assert num_items_in_batch is not None
        for name, values in facts.items():
            self.add_part(name, values.detach().sum() / num_items_in_batch)
        self.meter.add(int(inputs["attention_mask"].sum()), int((inputs["labels"] != IGNORED).sum()), 0)
        # Ranks average their gradients, and each holds its part of one sum.
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Means over the held-out pairs, of the loss and of all that is logged in training."""
        self._prepare_reference()
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        model, size = self.model_wrapped, self.args.per_device_eval_batch_size
        sums: dict[str, float] = {}
        with torch.no_grad(), evaluating(model), self.accelerator.autocast():
            for begin in range(0, len(pairs), size):
                batch = send_to_device(self._collate(pairs[begin : begin + size]), self.args.device)
                losses, facts = self._measured(model, batch)
                for name, values in {"loss": losses, **facts}.items():
                    sums[name] = sums.get(name, 0.0) + values.double().sum().item()
        metrics = {f"{metric_key_prefix}_{name}": value / len(pairs) for name, value in sums.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def told(self, metrics: dict[str, float]) -> str | None:
        if "eval_rewards/accuracies" not in metrics:
            return super().told(metrics)
        return (
            f"held-out loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_rewards/accuracies']:.1%}, margin "
            f"{metrics['eval_rewards/margins']:.3f}"
        )

    def panels(self) -> list[Panel]:
        return [
            Panel("loss", {"training": "loss", "held out": "eval_loss"}),
            Panel(
                "accuracy: the chosen answer has the higher reward",
                {"training": "rewards/accuracies", "held out": "eval_rewards/accuracies"},
                {"chance": 0.5},
            ),
            Panel("rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
            Panel("log-probability, nats an answer", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
        ]

    def _collate(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        made = collate_answers([p.source for p in pairs], [(p.chosen, p.rejected) for p in pairs], self._layout)
        if self._table is not None:
            made["reference"] = self._table[[pair.number for pair in pairs]]
        return made

    def _measured(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each pair, and what is logged of it."""
        inputs = {name: value for name, value in batch.items() if name != "reference"}
        if self.reference is None:
            reference = batch["reference"]
        else:
            reference = _of_answers(self.reference(model, inputs))
        logps = _of_answers(log_probabilities(model, inputs))
        losses = preference_losses(logps, reference, _of_answers(inputs["labels"] != IGNORED), self.settings)
        return losses, preference_facts(logps, reference, self.settings.beta)

    def _prepare_reference(self) -> None:
        if self.reference is None and self._table is None:
            self._table = torch.from_numpy(self._precomputed())

    def _precomputed(self) -> npt.NDArray[np.float32]:
        """float32 (N, 2), of the training pairs and then the held-out ones, from the file of this run if there is
        one. The model still is as it was loaded: a checkpoint is read later. It has to fit on each device once, also
        where it is sharded afterwards."""
        pairs = [*self.pairs, *(self.eval_dataset or ())]
        output = Path(self.args.output_dir)
        file = output / f"reference-{self._fingerprint(pairs)}.npy"
        if others := [str(other) for other in output.glob("reference-*.npy") if other != file]:
            raise UserError(
                f"{others[0]} has the reference's log-probabilities of other pairs or another model: they have "
                "changed since. Give training.output_dir another folder, or remove the file to begin anew."
            )
        if self._any_rank(not file.exists()):
            table = self._compute_table(pairs)
            if bad := [pairs[n].where for n in np.flatnonzero(~np.isfinite(table).all(axis=1))]:
                raise UserError(f"The reference gives no finite log-probability to {', '.join(bad[:16])}.")
            if self.args.should_save:
                output.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}")
                with partial.open("wb") as out:
                    np.save(out, table)
                    out.flush()
                    os.fsync(out.fileno())
                partial.replace(file)
            self.accelerator.wait_for_everyone()
            return table
        found: npt.NDArray[np.float32] = np.load(file, allow_pickle=False)
        return found

    def _compute_table(self, pairs: Sequence[PreferencePair]) -> npt.NDArray[np.float32]:
        assert isinstance(self.model, torch.nn.Module)
        model, size = self.model.to(self.args.device), self.args.per_device_eval_batch_size
        table = torch.zeros(len(pairs), 2, device=self.args.device)
        # Pairs of like length make a batch. Each rank takes every so many batches, and a sum puts them together.
        order = sorted(range(len(pairs)), key=lambda n: len(pairs[n].source) + len(pairs[n].chosen))
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
        mine = batches[self.args.process_index :: self.args.world_size]
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        with torch.no_grad(), evaluating(model), self.accelerator.autocast():
            for numbers in tqdm(mine, desc="Reference log-probabilities", unit="batch", leave=False, disable=quiet):
                batch = send_to_device(self._collate([pairs[n] for n in numbers]), self.args.device)
                table[numbers] = _of_answers(log_probabilities(model, batch))
        return torch.as_tensor(self.accelerator.reduce(table, reduction="sum")).cpu().numpy()

    def _fingerprint(self, pairs: Sequence[PreferencePair]) -> str:
        config = self.model.config
        begun = str(config.name_or_path), fingerprint(self.model), self._layout
        found = hashlib.sha256(repr(begun).encode())
        for pair in pairs:
            for ids in (pair.source, pair.chosen, pair.rejected):
                found.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, np.int32).tobytes())
        return found.hexdigest()[:16]


def _of_answers(tokens: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each answer, (R * 2, T) to (R, 2)."""
    return tokens.sum(dim=-1).view(-1, 2)
