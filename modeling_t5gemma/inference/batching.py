"""Many texts at once: sorted by length into batches, given back in the order they came in.

Shapes: R rows of a batch, S their longest input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..errors import UserError
from .prompts import Prompts
from .sampling import ends_of, pad_token

# How many batches are read ahead to be sorted: enough that rows of a batch are nearly of one length, little to hold.
WINDOW = 64


def generate_texts(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: Iterable[list[int] | str],
    *,
    batch_size: int = 8,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
    **generation: Any,
) -> Iterator[str]:
    """What a model says to each source, in their order; they are read ``WINDOW`` batches ahead.

    Greedy texts do not depend on the batches, but for rounding. Drawn ones do.

    Args:
        sources: texts, which ``Prompts.text`` turns into ids, or input ids.
        batch_size, batch_tokens, progress, generation: as in ``generate_ids``.
    """
    prompts, pad = Prompts.of(model, tokenizer), pad_token(model, tokenizer)
    ends = _ends(model, generation)
    rows = (prompts.text(source) if isinstance(source, str) else source for source in sources)
    while window := list(islice(rows, WINDOW * batch_size)):
        for ids in generate_ids(
            model, window, pad, batch_size, batch_tokens=batch_tokens, progress=progress, **generation
        ):
            yield text_of(tokenizer, ids, ends)


@torch.no_grad()
def generate_ids(
    model: Any,
    sources: Sequence[Sequence[int]],
    pad: int,
    batch_size: int,
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
    **generation: Any,
) -> list[list[int]]:
    """The new tokens of each source, in their order: without the decoder's start token or a decoder-only model's
    prompt, up to and with the first token that ends a text.

    Args:
        model: an encoder-decoder, whose rows are padded on the right, or a decoder-only model, whose rows are padded
            on the left; with an adapter or without. Its mode is left as it was.
        sources: input ids, none empty, with ``<bos>`` where the model reads one.
        pad: fills the rows of a batch.
        batch_size: rows of a batch at most.
        batch_tokens: input tokens of a batch at most, padding included; a longer row is a batch of its own.
        progress: called with the number of rows of each batch that is done.
        generation: goes to ``model.generate``.
    """
    assert all(len(source) for source in sources), "an input has tokens"
    assert generation.get("num_return_sequences", 1) == 1, "one text a source"
    encoder_decoder = model.config.is_encoder_decoder
    ends = set(_ends(model, generation))
    named = {"pad_token_id": pad}
    if encoder_decoder:
        named["decoder_start_token_id"] = model.decoder_start_token_id()
    generation = _with_named(generation, named)
    results: list[list[int]] = [[] for _ in sources]
    training = model.training
    model.eval()
    try:
        for rows in _batches([len(source) for source in sources], batch_size, batch_tokens):
            ids, mask = padded([sources[row] for row in rows], pad, left=not encoder_decoder)
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=LogitsProcessorList([_Finite(model)]),
                **generation,
            )
            given = 1 if encoder_decoder else ids.shape[1]
            for row, tokens in zip(rows, output[:, given:].tolist(), strict=True):
                results[row] = _up_to_end(tokens, ends)
            progress(len(rows))
    finally:
        model.train(training)
    return results


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids in one batch: ids and mask, int64 (R, S)."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def text_of(tokenizer: Any, ids: Sequence[int], ends: Iterable[int]) -> str:
    """The text of new tokens, without the one that ends it."""
    ids = ids[:-1] if ids and ids[-1] in set(ends) else ids
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


class _Finite(LogitsProcessor):
    """Refuses logits that are not finite, of which ``generate`` would make a text as of any others."""

    def __init__(self, model: Any) -> None:
        self.name = model.config.name_or_path

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax().isfinite():
            raise UserError(
                f"{self.name} gives logits that are not finite: its weights are damaged or it diverged. Give a "
                "checkpoint from before."
            )
        return scores


def _batches(lengths: Sequence[int], batch_size: int, batch_tokens: int | None) -> Iterator[list[int]]:
    """Numbers of rows, the longest first: if a batch does not fit into memory, it is the first."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        full = len(batch) == batch_size
        if batch and batch_tokens is not None:
            full = full or (len(batch) + 1) * lengths[batch[0]] > batch_tokens
        if full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _with_named(generation: dict[str, Any], named: dict[str, int]) -> dict[str, Any]:
    """The arguments with these tokens, which go into a config where there is one: ``generate`` takes a config or
    arguments."""
    if "generation_config" not in generation:
        return {**named, **generation}
    config = copy.deepcopy(generation["generation_config"])
    config.update(**{name: token for name, token in named.items() if getattr(config, name) is None})
    return {**generation, "generation_config": config}


def _ends(model: Any, generation: dict[str, Any]) -> list[int]:
    """The tokens that ``generate`` stops at when it is given these arguments."""
    if "eos_token_id" in generation:
        return ends_of(GenerationConfig(eos_token_id=generation["eos_token_id"]))
    given = generation.get("generation_config")
    # What a config leaves out is the model's own.
    return (given and ends_of(given)) or ends_of(model.generation_config)


def _up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
