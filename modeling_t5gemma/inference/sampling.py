"""How the next token is chosen, and where generation ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..errors import UserError


def generation_config(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    ends: Sequence[int] = (),
) -> GenerationConfig:
    """What to give ``model.generate``, which takes all that is left out from the model's own config.

    Without ``temperature`` and ``top_p``, or at temperature 0, the likeliest token is taken, whatever the model's own
    config says: T5Gemma's results (arXiv 2504.06225) are greedy.

    Args:
        temperature: divides the logits of the distribution that tokens are drawn from; it, ``top_p`` and ``top_k``
            are the model's own where only another of them is given.
        top_p: draw from the likeliest tokens with this share of the probability.
        num_beams: search with so many candidates.
        ends: tokens that end a text, beside the model's and the tokenizer's own.

    Raises:
        UserError: a value is out of its range, or two contradict each other.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise UserError(f"--max-new-tokens ({max_new_tokens}) and --num-beams ({num_beams}) begin at 1.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature is {temperature}; it begins at 0, which takes the likeliest token.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it is a share of the probability, above 0 and at most 1.")
    if temperature == 0 and top_p is not None:
        raise UserError("--temperature 0 takes the likeliest token and leaves --top-p nothing to draw from. Drop one.")
    draws = temperature != 0 and (temperature, top_p) != (None, None)
    # Neutral values, or the model's own would be complained about as being of no use.
    how = {"temperature": temperature, "top_p": top_p} if draws else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    own = [*_listed(model.generation_config.eos_token_id), *_listed(tokenizer.eos_token_id)]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=draws,
        num_beams=num_beams,
        eos_token_id=list(dict.fromkeys([*own, *ends])) or None,
        **how,
    )


def pad_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """What fills the rows of a batch; masked, so any token will do where none is named."""
    config = getattr(model.config, "encoder", model.config)
    named = (config.pad_token_id, tokenizer.pad_token_id)
    return next((int(token) for token in named if token is not None), 0)


def ends_of(config: GenerationConfig) -> list[int]:
    """The tokens that this config ends a text at."""
    return _listed(config.eos_token_id)


def _listed(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    return [int(token) for token in tokens] if isinstance(tokens, list | tuple) else [int(tokens)]
