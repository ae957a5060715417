"""What a source computes, read and run by transformers alone, as the standard that a converted checkpoint is held to.

Shapes: S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedModel

from modeling_t5gemma.conversion.source import Source
from modeling_t5gemma.io.checkpoints import load_model, told


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs for one sequence, and their noise floor: how far each moves when every embedding is changed by one
    rounding error of float32. No two ways of summing can be asked to agree better.

    Attributes:
        hidden: (S, D), after the final norm.
        logits: (S, V).
        hidden_floor, logits_floor: largest absolute differences.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    hidden_floor: float
    logits_floor: float


@dataclass(frozen=True, eq=False)
class Continuation:
    """Greedy tokens, int64 (n,), and the logits that each was taken from, (n, V)."""

    tokens: torch.Tensor
    logits: torch.Tensor


def load_reference(source: Source, rounded_to: torch.dtype | None) -> PreTrainedModel:
    """The source in float32 with the plainest attention.

    Args:
        rounded_to: the dtype that the conversion rounded to, so that the rounding is no part of what differs.
    """
    model = load_source(source, dtype=torch.float32, attn_implementation="eager")
    if rounded_to is not None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.to(rounded_to))
    return model.eval()


def load_source(source: Source, **kwargs: Any) -> PreTrainedModel:
    """A source as transformers' own model.

    Args:
        kwargs: go to ``from_pretrained``.

    Raises:
        UserError: transformers cannot load it.
    """
    if not source.is_gguf:
        return load_model(AutoModelForCausalLM, source.path, **kwargs)[0]
    with told(f"{source.path} cannot be loaded", "Give another conversion"):
        config = AutoConfig.from_pretrained(source.folder, gguf_file=source.path.name, trust_remote_code=False)
        if hasattr(config, "query_pre_attn_scalar"):
            # The file does not say it; transformers takes 256 whatever the size.
            config.query_pre_attn_scalar = source.config.query_pre_attn_scalar
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder,
            gguf_file=source.path.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            **kwargs,
        )
    return model


@contextmanager
def only_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[PreTrainedModel]:
    """The model with a subset of its layers; the whole one again afterwards."""
    text = model.get_decoder()
    whole, config = text.layers, text.config
    text.layers = nn.ModuleList(whole[layer] for layer in layers)
    kept = copy.copy(config.__dict__)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    for place, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = place  # where a cache keeps its keys and values
    try:
        yield model
    finally:
        text.layers = whole
        config.__dict__.update(kept)
        for place, layer in enumerate(whole):
            layer.self_attn.layer_idx = place


def outputs_of(model: PreTrainedModel, tokens: torch.Tensor) -> Outputs:
    """Run int64 tokens (S,) twice, the second time with the embeddings changed by one rounding error."""
    hidden, logits = _run(model, tokens)

    def nudge(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs.to(embedded))

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        nudged_hidden, nudged_logits = _run(model, tokens)
    finally:
        handle.remove()
    return Outputs(
        hidden, logits, largest_difference(hidden, nudged_hidden), largest_difference(logits, nudged_logits)
    )


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: torch.Tensor, count: int, decoder_start: int | None = None) -> Continuation:
    """``count`` tokens by greedy search, the end of the text not allowed before.

    Args:
        tokens: int64 (S,), the prompt.
        decoder_start: what an encoder-decoder begins with. As ``decoder_input_ids`` it would not do: ``generate``
            puts the configured start token before those that begin with another.
    """
    settings = GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=model.generation_config.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        decoder_start_token_id=decoder_start,
    )
    result = model.generate(tokens[None], attention_mask=torch.ones_like(tokens[None]), generation_config=settings)
    return Continuation(result.sequences[0, -count:], torch.cat(result.logits))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference, NaN if either has one."""
    return (a - b).abs().max().item()


@torch.no_grad()
def _run(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    softcap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return hidden[0], logits[0]
