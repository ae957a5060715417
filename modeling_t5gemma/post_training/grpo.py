"""Training on rewards of sampled answers: GRPO and its kin on an encoder-decoder.

A step samples answers to its prompts, scores them and follows the policy gradient. The encoder runs once a prompt, in
sampling as in training. Sampling depends on weights, seed and position alone, so a resumed run goes on to the bit.

Shapes: P prompts of a micro-batch, G answers to each, T tokens of the longest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from ..collators import Layout
from ..errors import UserError
from ..losses import IGNORED
from ..training.checkpoints import step_of
from ..training.curves import Panel
from ..training.examples import ShuffledExamples
from ..training.rows import Rows
from ..training.settings import Part
from .policy import advantages, deviations, policy_terms, token_weights
from .preferences import Prompt, collate_answers
from .reference import log_probabilities
from .rewards import NamedReward, score, weighted
from .rollouts import Answers, Sampling, sample
from .settings import GrpoSettings
from .tuned import TunedTrainer

MicroBatch = dict[str, Any]
Tables = list[npt.NDArray[np.float64]]
KEPT_FILE = "rollouts-{rank}.safetensors"


class Prompts:
    """A batch of prompts for every step: no tensors yet, as the answers are to be sampled.

    Args:
        rows: those of this rank.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.rows:
            yield {"prompts": [row[0] for row in batch.rows], "position": batch.position}


class GrpoTrainer(TunedTrainer):
    """Trains on rewards.

    Args:
        model: the encoder-decoder, or a PEFT model around it.
        args: the Trainer's; ``max_steps`` has to be set, and a batch is of so many prompts.
        prompts: to sample answers to.
        rewards: what answers are scored with.
        layout: how prompts and answers become inputs.
        tokenizer: decodes answers, and is saved beside every checkpoint.
        ends: tokens that end an answer.
        settings: what is optimised; its rewards are not read.
        held_out: prompts to measure on, by the reward of the likeliest (greedy) answer.
        reference_model: where beta is above 0 and the model has no adapter to switch off.
        frozen: parts that stay as they are.
        seed: decides the order of the prompts and what is sampled.
        describe: facts for ``summary.json``.

    Raises:
        UserError: arguments that don't fit each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Seq2SeqTrainingArguments,
        *,
        prompts: Sequence[Prompt],
        rewards: Sequence[NamedReward],
        layout: Layout,
        tokenizer: Any,
        ends: Sequence[int],
        settings: GrpoSettings | None = None,
        held_out: Sequence[Prompt] = (),
        reference_model: PreTrainedModel | None = None,
        frozen: Sequence[Part] = (),
        seed: int = 0,
        describe: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings or GrpoSettings()
        self.settings.check()
        if not self.settings.beta and reference_model is not None:
            raise UserError("With beta 0 no reference is asked: leave the reference model out.")
        if args.eval_strategy != "no" and not held_out:
            raise UserError(f"eval_strategy={args.eval_strategy.value} needs held-out prompts; there are none.")
        examples = ShuffledExamples(prompts, seed)
        super().__init__(
            model,
            args,
            batches=lambda position: Prompts(
                Rows(examples, None, args.per_device_train_batch_size, args.world_size, args.process_index, position)
            ),
            reference_model=reference_model,
            weighed=self.settings.beta > 0,
            frozen=frozen,
            eval_dataset=list(held_out) or None,
            describe=describe,
            processing_class=tokenizer,
        )
        self.rewards, self.tokenizer = list(rewards), tokenizer
        self._layout, self._seed = layout, seed
        how = self.settings
        self._sampling = Sampling(
            how.num_generations, how.max_completion_length, how.temperature, how.top_p, tuple(ends)
        )
        self._kept: list[MicroBatch] = []
        self._facts: dict[str, list[float]] = {}

    # Steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """The micro-batches of a step, answers sampled and scored, and how many tokens they train on on all ranks."""
        if self.state.global_step % self.settings.num_iterations == 0:
            made = self._rollouts(list(itertools.islice(epoch_iterator, num_batches)))
            if made is None:
                return [], torch.tensor(0)
            self._kept = made
        if len(self._kept) != num_batches:
            raise UserError(
                f"The checkpoint has answers for {len(self._kept)} micro-batches and a step has {num_batches}: go on "
                "with the gradient_accumulation_steps that the run was stopped with, or from a checkpoint whose step "
                "is a multiple of num_iterations."
            )
        # Training takes position and names out of a batch; here they stay for the next iteration.
        batches, count = super().get_batch_samples(iter([dict(batch) for batch in self._kept]), num_batches, device)
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss; see ``token_weights``."""
        assert num_items_in_batch is not None
        how, slot = self.settings, inputs.pop("slot")
        gains, old = inputs.pop("advantages"), inputs.pop("old", None)
        reference = inputs.pop("reference", None)
        if self.reference is not None and reference is None:
            reference = self.reference(model, inputs, how.temperature)
        logps = log_probabilities(model, inputs, how.temperature)
        if old is None:
            old = logps.detach()
            if how.num_iterations > 1:
                self._kept[slot]["old"] = old.cpu()
                if reference is not None:
                    self._kept[slot]["reference"] = reference.cpu()
        high = how.epsilon if how.epsilon_high is None else how.epsilon_high
        terms = policy_terms(logps, old, reference, gains, epsilon=how.epsilon, epsilon_high=high, beta=how.beta)
        mask = inputs["labels"] != IGNORED
        world = self.accelerator.num_processes
        weights = token_weights(
            mask,
            how.loss_type,
            completions=len(mask) * len(self._kept) * world,
            tokens=num_items_in_batch,
            max_completion_length=how.max_completion_length,
        )
        share = mask / torch.as_tensor(num_items_in_batch, device=mask.device).clamp(min=1)
        self.add_part("clip_ratio/low_mean", (terms.low * share).sum())
        self.add_part("clip_ratio/high_mean", (terms.high * share).sum())
        self.add_part("clip_ratio/region_mean", ((terms.low + terms.high) * share).sum())
        if terms.kl is not None:
            self.add_part("kl", (terms.kl * share).sum())
        self.meter.add(int(inputs["attention_mask"].sum()), int(mask.sum()), 0)
        # Ranks average their gradients, and each holds its part of one sum.
        loss = (terms.loss * weights).sum() * world
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: float(np.mean(values)) for name, values in self._facts.items()}
            self._facts = {}
        super().log(logs, start_time)

    # Answers

    def _rollouts(self, batches: Sequence[dict[str, Any]]) -> list[MicroBatch] | None:
        """Sample answers to the prompts of a step, score them, and make micro-batches of them; None as ``_scores``."""
        answers = [
            self._sample(batch["prompts"], self._sampling, (self._seed, batch["position"], self.args.process_index))
            for batch in batches
        ]
        tables = self._scores([batch["prompts"] for batch in batches], answers)
        if tables is None:
            return None
        gains = self._advantages(np.concatenate(tables), answers)
        made, begin = [], 0
        for slot, (batch, own) in enumerate(zip(batches, answers)):
            made.append(self._micro_batch(batch, own, gains[begin : begin + len(own.ids)], slot))
            begin += len(own.ids)
        return made

    def _sample(self, prompts: Sequence[Prompt], how: Sampling, key: tuple[int, ...] | None) -> Answers:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with self.accelerator.autocast():
            return sample(model, [prompt.source for prompt in prompts], self._layout, how, key)

    def _score(self, prompts: Sequence[Prompt], answers: Answers) -> npt.NDArray[np.float64]:
        """(P * G, F), what each reward function gives each answer."""
        each = len(answers.ids) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(each)]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.ids]
        completions = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, repeated)
        ]
        columns = {name: [prompt.columns[name] for prompt in repeated] for name in prompts[0].columns}
        ids = [own.tolist() for own in answers.ids]
        return score(
            self.rewards,
            [p.prompt for p in repeated],
            completions,
            ids,
            columns,
            [p.where for p in repeated],
            self.state,
        )

    def _scores(self, prompts: Sequence[Sequence[Prompt]], answers: Sequence[Answers]) -> Tables | None:
        """``_score`` of several; None where a reward function failed on any rank, and the run ends for it. They are
        the user's.

        Raises:
            UserError: as ``rewards.score``, where there are no steps to save first.
        """
        found: Tables = []
        failed: UserError | None = None
        try:
            found = [self._score(some, own) for some, own in zip(prompts, answers, strict=True)]
        except UserError as error:
            failed = error
        if self._any_rank(failed is not None):
            self.end_for(failed or UserError("A reward failed in another process."))
            return None
        return found

    def _advantages(self, table: npt.NDArray[np.float64], answers: Sequence[Answers]) -> torch.Tensor:
        """Of this rank's answers, float32 on the CPU, and the facts of the step over all ranks."""
        group, device = self.settings.num_generations, self.args.device
        lengths = [len(ids) for own in answers for ids in own.ids]
        cut = [not finished for own in answers for finished in own.finished]
        here = np.column_stack([weighted(table, self.rewards), lengths, cut, table]).astype(np.float32)
        everywhere = self.accelerator.gather(torch.from_numpy(here).to(device))
        assert isinstance(everywhere, torch.Tensor)
        step = everywhere.cpu().double()
        rewards = step[:, 0]
        spread = deviations(rewards, group)
        facts = {
            "reward": rewards.mean(),
            "reward_std": spread.mean(),
            "frac_reward_zero_std": (spread < 1e-8).double().mean(),
            "completions/mean_length": step[:, 1].mean(),
            "completions/clipped_ratio": step[:, 2].mean(),
            **{f"rewards/{reward.name}/mean": step[:, 3 + n].nanmean() for n, reward in enumerate(self.rewards)},
        }
        for name, value in facts.items():
            if torch.isfinite(value):  # a function that applied to no answer has no mean
                self._facts.setdefault(name, []).append(float(value))
        mine = slice(self.args.process_index * len(table), (self.args.process_index + 1) * len(table))
        return advantages(rewards, group, self.settings.scale_rewards)[mine].float()

    def _micro_batch(self, batch: dict[str, Any], answers: Answers, gains: torch.Tensor, slot: int) -> MicroBatch:
        prompts, group = batch["prompts"], self.settings.num_generations
        grouped = [answers.ids[begin : begin + group] for begin in range(0, len(answers.ids), group)]
        made = collate_answers([prompt.source for prompt in prompts], grouped, self._layout)
        if self.settings.mask_truncated_completions:
            made["labels"][~torch.tensor(answers.finished)] = IGNORED
        where = [prompt.where for prompt in prompts]
        return {**made, "advantages": gains, "slot": slot, "position": batch["position"], "where": where}

    # Answers that several steps learn from are part of a checkpoint

    def add_to_checkpoint(self, checkpoint: Path) -> None:
        if self.state.global_step % self.settings.num_iterations:
            tensors = {
                f"{slot}.{name}": value.contiguous()
                for slot, batch in enumerate(self._kept)
                for name, value in batch.items()
                if isinstance(value, torch.Tensor)
            }
            rest = [{name: batch[name] for name in ("slot", "position", "where")} for batch in self._kept]
            save_file(tensors, checkpoint / self._kept_name(), {"rest": json.dumps(rest)})

    def read_from_checkpoint(self, checkpoint: Path) -> None:
        if step_of(checkpoint) % self.settings.num_iterations == 0:
            return
        file = checkpoint / self._kept_name()
        if not file.is_file():
            raise UserError(
                f"{checkpoint} lies between two steps on the same answers and has no {file.name}: go on with the "
                "number of processes it was saved with, or from a checkpoint whose step is a multiple of "
                "num_iterations."
            )
        with safe_open(file, "pt") as opened:
            self._kept = json.loads(opened.metadata()["rest"])
        for name, value in load_file(file).items():
            slot, _, key = name.partition(".")
            self._kept[int(slot)][key] = value

    def _kept_name(self) -> str:
        return KEPT_FILE.format(rank=self.args.process_index)

    # Measuring

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Mean rewards and length of the likeliest (greedy) answers to the held-out prompts."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        size, how = self.args.per_device_eval_batch_size, self._sampling
        one = Sampling(1, how.max_completion_length, how.temperature, how.top_p, how.ends)
        parts = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        answers = [self._sample(some, one, None) for some in parts]
        tables = self._scores(parts, answers)
        if tables is None:
            return {}
        table = np.concatenate(tables)
        lengths = [len(ids) for own in answers for ids in own.ids]
        finished = [each for own in answers for each in own.finished]
        rewards = weighted(table, self.rewards)
        facts = {
            "reward": rewards.mean(),
            "reward_error": rewards.std(ddof=1) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0,
            "completions/mean_length": np.mean(lengths),
            "completions/clipped_ratio": 1 - np.mean(finished),
        }
        for column, reward in zip(table.T, self.rewards):
            if not np.isnan(column).all():
                facts[f"rewards/{reward.name}/mean"] = np.nanmean(column)
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in facts.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def told(self, metrics: dict[str, float]) -> str | None:
        if "eval_reward" not in metrics:
            return super().told(metrics)
        return (
            f"held-out reward {metrics['eval_reward']:.3f} ± {metrics['eval_reward_error']:.3f}, "
            f"{metrics['eval_completions/mean_length']:.0f} tokens an answer"
        )

    def panels(self) -> list[Panel]:
        each = {reward.name: f"rewards/{reward.name}/mean" for reward in self.rewards}
        found = [
            Panel("reward", {"sampled": "reward", "held out, greedy": "eval_reward"}),
            Panel("tokens an answer", {"sampled": "completions/mean_length"}),
            Panel("groups whose answers are all worth the same", {"share": "frac_reward_zero_std"}),
            Panel("KL from the start, nats a token", {"sampled": "kl"}),
        ]
        return [found[0], Panel("each reward", each), *found[1:]] if len(each) > 1 else found
