"""One process of distributed runs on preferences and rewards: python -m tests.post_training.worker OUTPUT.

Every process prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.preferences import collate_answers
from modeling_t5gemma.post_training.reference import log_probabilities
from modeling_t5gemma.post_training.rollouts import Sampling, sample
from tests.post_training import first_word, test_grpo


def with_dpo(output: Path, steps: int, batch: int) -> dict[str, Any]:
    trainer = first_word.dpo(
        output,
        steps=steps,
        batch=batch,
        test=first_word.pairs(5, seed=1),
        per_device_eval_batch_size=2,
        lr_scheduler_type="constant",
    )
    trainer.train()
    names = ("loss", "rewards/margins", "logps/chosen")
    return {**{name: first_word.log_of(trainer, name) for name in names}, **trainer.evaluate()}


def with_grpo(output: Path, steps: int, batch: int) -> dict[str, Any]:
    rewards = (test_grpo.small_words,)
    trainer = first_word.grpo(
        output, steps=steps, batch=batch, rewards=rewards, num_iterations=2, scale_rewards="batch"
    )
    seen: list[list[list[int]]] = []
    draw = trainer._sample

    def look(*arguments: Any) -> Any:
        answers = draw(*arguments)
        seen.append([ids.tolist() for ids in answers.ids])
        return answers

    trainer._sample = look
    trainer.train()
    weights = [parameter.double().sum().item() for parameter in trainer.model.parameters()]
    logged = {name: first_word.log_of(trainer, name) for name in ("loss", "reward", "reward_std")}
    own = [float(np.mean([np.mean([4 <= i < 26 for i in ids]) for ids in step])) for step in seen]
    return {**logged, "weights": weights, "own": own, "answers": seen}


def with_a_reward_that_fails(output: Path) -> str:
    """What a run ends with whose reward function fails in the second process, at the third step."""
    calls: list[int] = []

    def brittle(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 3 and dist.get_rank() == 1:
            raise KeyError("answer")
        return test_grpo.small_words(prompts, completions, completion_ids)

    saves = {"save_strategy": "steps", "save_steps": 100}
    trainer = first_word.grpo(output, steps=4, batch=2, rewards=(brittle,), training=saves)
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    raise AssertionError("it went on")


def with_fsdp() -> dict[str, Any]:
    """Sampling from a sharded model, as FSDP2 shards it, which accelerate offers on accelerators only."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, layout = first_word.model(), first_word.LAYOUT
    if dist.is_initialized():
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=True)
    sources = [np.array(ids, np.int32) for ids in ([20, 21, 22], [23, 24])]
    found: list[Any] = []
    for step in range(2):
        # Ranks whose answers end at different lengths have to wait for each other.
        rank = dist.get_rank() if dist.is_initialized() else 0
        answers = sample(model, sources, layout, Sampling(3, 6, 1.0, 1.0, tuple(range(4, 30))), (step, rank))
        batch = collate_answers(sources, [answers.ids[:3], answers.ids[3:]], layout)
        logps = log_probabilities(model.train(), batch)
        logps.sum().backward()
        found.append([[ids.tolist() for ids in answers.ids], logps.sum().item()])
        model.zero_grad()
    return {"found": found}


def main() -> None:
    output = Path(sys.argv[1])
    found = {
        "dpo": with_dpo(output / "dpo", 3, 2),
        "grpo": with_grpo(output / "grpo", 4, 2),
        "failure": with_a_reward_that_fails(output / "failure"),
        "fsdp": with_fsdp(),
    }
    print("FOUND", json.dumps(found))
    dist.barrier()
    # Gloo's threads now and then abort an interpreter that ends in its own time.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
