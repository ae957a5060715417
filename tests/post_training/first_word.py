"""A task that a tiny model learns in seconds: an answer has to begin with the first word of its question.

benchmarks/preferences.py learns it too, so nothing here needs pytest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Seq2SeqTrainingArguments

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.post_training.dpo import DpoTrainer
from modeling_t5gemma.post_training.grpo import GrpoTrainer
from modeling_t5gemma.post_training.preferences import PreferencePair, Prompt, collate_answers
from modeling_t5gemma.post_training.reference import log_probabilities
from modeling_t5gemma.post_training.rewards import NamedReward
from modeling_t5gemma.post_training.settings import DpoSettings, GrpoSettings
from tests import tiny

LAYOUT = Layout(0, 2, 2, 2)
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ENDS = (1,)
WORDS = 6  # that a question can begin with


def model():
    """A layerwise model of two layers."""
    return tiny.layerwise(tiny.gemma3(**SHALLOW), bidirectional_layers="all")


def pairs(count: int, words: int = 12, seed: int = 0) -> list[PreferencePair]:
    """The better answer begins with the first word of the question."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        source = rng.integers(20, 20 + words, rng.integers(2, 5)).astype(np.int32)
        other = (source[0] - 20 + rng.integers(1, words)) % words + 20
        rest = rng.integers(40, 60, rng.integers(0, 3))
        answers = [np.array([first, *rest, 1], np.int32) for first in (source[0], other)]
        made.append(PreferencePair(source, *answers, where=f"pairs:{n + 1}"))
    return made


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    sources = [rng.integers(20, 20 + WORDS, rng.integers(2, 4)).astype(np.int32) for _ in range(count)]
    return [
        Prompt(s, " ".join(f"w{i}" for i in s), {"first": f"w{s[0]}"}, f"prompts:{n}")
        for n, s in enumerate(sources, 1)
    ]


def begins_right(prompts, completions, first, **columns) -> list[float]:
    """1 where the answer begins with the first word of the question."""
    return [float(text.split()[:1] == [word]) for text, word in zip(completions, first, strict=True)]


def arguments(output: Path, **training: Any) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=str(output),
        **{
            "per_device_eval_batch_size": 32,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **training,
        },
    )


def dpo(
    output: Path,
    trained=None,
    *,
    steps: int = 4,
    batch: int = 4,
    train: list[PreferencePair] | None = None,
    test: Sequence[PreferencePair] = (),
    settings: DpoSettings | None = None,
    reference_model=None,
    seed: int = 0,
    **training: Any,
) -> DpoTrainer:
    torch.manual_seed(seed)
    return DpoTrainer(
        model() if trained is None else trained,
        arguments(output, max_steps=steps, per_device_train_batch_size=batch, **training),
        pairs=train or pairs(20),
        layout=LAYOUT,
        settings=settings,
        held_out=test,
        reference_model=reference_model,
        seed=seed,
    )


def grpo(
    output: Path,
    trained=None,
    *,
    steps: int = 4,
    batch: int = 3,
    train: list[Prompt] | None = None,
    test: Sequence[Prompt] = (),
    rewards=(begins_right,),
    reference_model=None,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    **settings: Any,
) -> GrpoTrainer:
    torch.manual_seed(seed)
    given = {"lr_scheduler_type": "constant", **(training or {})}
    return GrpoTrainer(
        model() if trained is None else trained,
        arguments(output, max_steps=steps, per_device_train_batch_size=batch, **given),
        prompts=train or prompts(20),
        rewards=[NamedReward(f.__name__, f) for f in rewards],
        layout=LAYOUT,
        tokenizer=tiny.word_tokenizer(),
        ends=ENDS,
        settings=GrpoSettings(**{"num_generations": 4, "max_completion_length": 5, **settings}),
        held_out=test,
        reference_model=reference_model,
        seed=seed,
    )


def measured(every: int) -> dict[str, Any]:
    """Training arguments of a run that is measured before it, every so many steps, and after it."""
    return {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True, "logging_steps": 10}


def dpo_that_learns(output: Path, seed: int, every: int = 100) -> DpoTrainer:
    """100 steps of 16 pairs."""
    train, test = (pairs(count, WORDS, 2 * seed + n) for n, count in enumerate((1600, 60)))
    return dpo(
        output,
        train=train,
        test=test,
        steps=100,
        batch=16,
        seed=seed,
        settings=DpoSettings(beta=0.5),
        learning_rate=3e-3,
        **measured(every),
    )


def grpo_that_learns(
    output: Path, seed: int, every: int = 100, learning_rate: float = 1e-3, **changes: Any
) -> GrpoTrainer:
    """100 steps of 8 prompts and 32 answers of at most two words.

    Args:
        changes: of ``GrpoSettings``.
    """
    torch.manual_seed(seed)
    trained = model()
    return grpo(
        output,
        trained,
        train=prompts(1000, 2 * seed),
        test=prompts(50, 2 * seed + 1),
        steps=100,
        batch=8,
        seed=seed,
        reference_model=copy.deepcopy(trained) if changes.get("beta") else None,
        training={"learning_rate": learning_rate, **measured(every)},
        **{"num_generations": 32, "max_completion_length": 2, **changes},
    )


@torch.no_grad()
def likelier(trainer: DpoTrainer) -> float:
    """How often the model itself holds the chosen answer for the likelier one, on the held-out pairs."""
    some = trainer.eval_dataset
    batch = collate_answers([p.source for p in some], [(p.chosen, p.rejected) for p in some], LAYOUT)
    chosen, rejected = log_probabilities(trainer.model.eval(), batch).sum(dim=1).view(-1, 2).unbind(1)
    return (chosen > rejected).double().mean().item()


def log_of(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
