"""The models: decoder-only in Gemma 2's shape, grown, and the encoder-decoders that are converted from them."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import modeling_t5gemma  # noqa: F401 (registers the models)
from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions

from .sizes import Sizes
from .text import BOS, EOS, PAD

HEAD_DIM = 32
INITIALIZER_RANGE = 0.06
ATTENTION = "eager"  # the fastest at these lengths, and all that transformers' Gemma 2 has with a softcap on a CPU


def decoder_only(sizes: Sizes, small: bool) -> Gemma2ForCausalLM:
    """A Gemma 2 with new weights: softcaps, a window on every other layer, norms before and after."""
    width = sizes.widths[small]
    heads = max(2, width // HEAD_DIM)
    config = Gemma2Config(
        vocab_size=sizes.words,
        hidden_size=width,
        intermediate_size=sizes.ffns[small],
        num_hidden_layers=sizes.layers[small],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=sizes.window // 4,
        max_position_embeddings=2 * sizes.window,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation=ATTENTION)


def load_decoder_only(folder: Path) -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, dtype=torch.float32)


def grown(model: Gemma2ForCausalLM, layers: int) -> Gemma2ForCausalLM:
    """The same function with more layers: copies follow their originals, and add nothing until their norms' gains,
    1 + weight, have moved from 0."""
    old = model.config.num_hidden_layers
    sources = [number * old // layers for number in range(layers)]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.layer_types = [model.config.layer_types[source] for source in sources]
    bigger = Gemma2ForCausalLM._from_config(config, attn_implementation=ATTENTION)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for number, source in enumerate(sources):
        for name, tensor in model.model.layers[source].state_dict().items():
            silent = number and sources[number - 1] == source and re.match(r"post_\w+_layernorm", name)
            weights[f"model.layers.{number}.{name}"] = torch.full_like(tensor, -1) if silent else tensor
    bigger.load_state_dict(weights)
    return bigger


def layers_of_equal_size(pair: PreTrainedModel, single: Gemma2ForCausalLM) -> int:
    """How many layers give a decoder-only model as many parameters as a pair has, embeddings left out."""

    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)

    return round(count(pair) / count(single) * single.config.num_hidden_layers)


def convert(
    encoder: Path,
    decoder: Path,
    output: Path,
    *,
    cross_attention: str,
    encoder_attention: str = "bidirectional",
    encoder_kv: str = "gqa",
    seed: int = 0,
) -> PreTrainedModel:
    """The encoder-decoder of two decoder-only checkpoints, made in the folder ``output`` and loaded."""
    options = ConversionOptions(
        enc=str(encoder),
        dec=str(decoder),
        output=output,
        cross_attention=cross_attention,
        encoder_attention=encoder_attention,
        encoder_kv=encoder_kv,
        seed=seed,
    )
    carry_out(prepare(options))
    return load_pair(output)


def load_pair(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(
        folder, attn_implementation=ATTENTION, dtype=torch.float32
    )
    return model
