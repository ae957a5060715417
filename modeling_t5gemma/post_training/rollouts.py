"""Sampling answers to prompts: the encoder runs once a prompt, whatever the number of answers to it.

What is sampled is a function of the weights, the prompts and a key, so that a resumed run samples the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from ..collators import Layout
from .preferences import collate_answers
from .reference import evaluating
from .rendering import Ids


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        num_generations: answers to a prompt.
        max_completion_length: tokens at which an answer is cut off.
        temperature: divides the logits.
        top_p: the likeliest words that together have so much of the probability; 1 for all.
        ends: tokens that end an answer.
    """

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """Sampled answers, those to one prompt after each other.

    Attributes:
        ids: their tokens, with the one that ended them.
        finished: whether one did, and not the limit.
    """

    ids: list[Ids]
    finished: list[bool]


def sample(model: Any, sources: Sequence[Ids], layout: Layout, how: Sampling, key: tuple[int, ...] | None) -> Answers:
    """Answers to each source.

    Args:
        model: the encoder-decoder, not wrapped, or sharded by FSDP2.
        key: numbers from 0 on that decide what is sampled, with the weights; None for the likeliest words (greedy).
    """
    batch = collate_answers(sources, [[np.array([layout.pad], np.int32)]] * len(sources), layout)
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    drawn = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=how.max_completion_length,
        num_return_sequences=how.num_generations,
        num_beams=1,
        eos_token_id=list(how.ends),
        pad_token_id=layout.pad,
        decoder_start_token_id=layout.start,
        repetition_penalty=1.0,
        use_cache=True,
        **(drawn if key is not None else {"do_sample": False}),
    )
    together = _prepare_sharded(model)
    with torch.no_grad(), evaluating(model), keyed(inputs["input_ids"].device, key or ()):
        made = model.generate(**inputs, generation_config=config, synced_gpus=together)
    return _cut(made[:, 1:].cpu().numpy().astype(np.int32), how.ends)


def _cut(rows: Ids, ends: Sequence[int]) -> Answers:
    """Up to the first token that ends an answer; after it there is padding."""
    ids, finished = [], []
    for row in rows:
        places = np.flatnonzero(np.isin(row, ends))
        finished.append(len(places) > 0)
        ids.append(row[: places[0] + 1] if len(places) else row)
    return Answers(ids, finished)


@contextmanager
def keyed(device: torch.device, key: tuple[int, ...]) -> Iterator[None]:
    """torch's randomness as a function of a key; afterwards it goes on as if nothing had been drawn."""
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield


def _prepare_sharded(model: torch.nn.Module) -> bool | None:
    """Let FSDP2 gather what ``generate`` needs outside of the layers; whether all ranks have to go on to the longest
    answer of any (None: transformers decides)."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    sharded = isinstance(model, FSDPModule)
    if sharded and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")
    return True if sharded else None
