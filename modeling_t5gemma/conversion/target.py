"""The model that comes out: its config, and the names and shapes of the tensors that its checkpoint has to hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_t5gemma.configuration_t5gemma import (
    AdaptedSeq2SeqConfig,
    AdaptedSeq2SeqModuleConfig,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)
from modeling_t5gemma.conversion.options import ConversionOptions, parse_layers
from modeling_t5gemma.conversion.source import Source
from modeling_t5gemma.cross_attention import KINDS
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import check_stacks, told
from modeling_t5gemma.modeling_t5gemma import (
    AdaptedSeq2SeqForConditionalGeneration,
    T5GemmaForConditionalGeneration,
)

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Stack:
    """A stack of the result.

    Attributes:
        source: the checkpoint that it comes from.
        layers: the source's layer for each of its own.
        kv_repeats: how many times each key/value head of the source stands in it.
    """

    source: Source
    layers: list[int]
    kv_repeats: int


@dataclass(frozen=True)
class Target:
    """What is to be made.

    Attributes:
        config: of the checkpoint, dtype not yet set.
        encoder, decoder: where the stacks come from.
        cross_attention: a kind, or how a separate one begins: "copy", "random" or "partial".
    """

    config: T5GemmaConfig | AdaptedSeq2SeqConfig
    encoder: Stack
    decoder: Stack
    cross_attention: str

    def stack(self, side: str) -> Stack:
        """The stack called "encoder" or "decoder"."""
        return self.encoder if side == ENCODER else self.decoder


def build_target(enc: Source, dec: Source, options: ConversionOptions) -> Target:
    """Decide what comes out of two sources.

    Two Gemma 2 whose pair stock T5Gemma can represent give a ``T5GemmaConfig``, all others ``AdaptedSeq2SeqConfig``.

    Raises:
        UserError: the sources cannot be paired in the way asked for.
    """
    for source in (enc, dec):
        if getattr(source.config, "use_bidirectional_attention", None):
            raise UserError(f"{source.name} is not causal (use_bidirectional_attention). Give a decoder-only model.")
    if enc.config.vocab_size != dec.config.vocab_size:
        raise UserError(
            f"The vocabularies differ: {enc.name} has {enc.config.vocab_size} words, {dec.name} "
            f"{dec.config.vocab_size}. Give two checkpoints with one vocabulary."
        )
    encoder = Stack(
        enc, parse_layers("--enc-layers", options.enc_layers, enc.config.num_hidden_layers), _kv_repeats(enc, options)
    )
    decoder = Stack(dec, parse_layers("--dec-layers", options.dec_layers, dec.config.num_hidden_layers), kv_repeats=1)
    cross_attention = _cross_attention(encoder, decoder, options.cross_attention)
    bidirectional = _bidirectional_layers(options.encoder_attention, len(encoder.layers))
    # What is no kind is a way to begin a separate one.
    kind = KINDS.get(cross_attention, KINDS["separate"])
    # As transformers does, the tensors are believed where the config says otherwise.
    tied = dec.config.tie_word_embeddings and not dec.has_head_of_its_own()
    pair: dict[str, Any] = {"tie_word_embeddings": tied}
    try:
        if (
            {enc.family.name, dec.family.name} == {"gemma2"}
            and kind.name == T5GemmaConfig.cross_attention_type
            and bidirectional == "all"
            and not options.share_embeddings
        ):
            config: T5GemmaConfig | AdaptedSeq2SeqConfig = T5GemmaConfig(
                encoder=T5GemmaModuleConfig(**_fields(encoder)),
                decoder=T5GemmaModuleConfig(**_fields(decoder)),
                architectures=["T5GemmaForConditionalGeneration"],
                **pair,
            )
        else:
            config = AdaptedSeq2SeqConfig(
                encoder=AdaptedSeq2SeqModuleConfig(
                    **_fields(encoder), **_switches(enc), bidirectional_layers=bidirectional
                ),
                decoder=AdaptedSeq2SeqModuleConfig(**_fields(decoder), **_switches(dec)),
                cross_attention_type=kind.name,
                cross_attention_map=_layer_map(encoder, decoder) if kind.paired else None,
                share_embeddings=options.share_embeddings,
                architectures=["AdaptedSeq2SeqForConditionalGeneration"],
                **pair,
            )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{enc.name} and {dec.name} cannot be paired so: {' '.join(str(error).split())}") from error
    with told(f"A model cannot be made as {enc.path} and {dec.path} describe it", "Repair their config.json"):
        check_stacks(config)
    return Target(config, encoder, decoder, cross_attention)


def stack_configs(config: T5GemmaConfig | AdaptedSeq2SeqConfig) -> tuple[Any, Any]:
    """The configs of encoder and decoder, whose declared types include what only construction accepts."""
    return config.encoder, config.decoder


def expected_tensors(config: T5GemmaConfig | AdaptedSeq2SeqConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of ``config`` holds, tied ones once: those of a model without
    storage."""
    stock = isinstance(config, T5GemmaConfig)
    make = T5GemmaForConditionalGeneration if stock else AdaptedSeq2SeqForConditionalGeneration
    with torch.device("meta"):
        model = make(copy.deepcopy(config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _fields(stack: Stack) -> dict[str, Any]:
    fields = stack.source.family.stack_fields(stack.source.config)
    fields["tie_word_embeddings"] = fields["tie_word_embeddings"] and not stack.source.has_head_of_its_own()
    fields["num_hidden_layers"] = len(stack.layers)
    fields["num_key_value_heads"] *= stack.kv_repeats
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][layer] for layer in stack.layers]
    return fields


def _switches(source: Source) -> dict[str, Any]:
    switches = source.family.switches._asdict()
    # Not a field: attn_logit_softcapping says it.
    switches.pop("softcaps_attention")
    return switches


def _kv_repeats(source: Source, options: ConversionOptions) -> int:
    heads, kv_heads = source.config.num_attention_heads, source.config.num_key_value_heads
    if heads % kv_heads:
        raise UserError(
            f"{source.name} has {heads} attention heads and {kv_heads} key/value heads, which do not divide them. "
            "Repair its config.json."
        )
    return int(heads // kv_heads) if options.encoder_kv == "mha" else 1


def _cross_attention(encoder: Stack, decoder: Stack, asked: str) -> str:
    enc, dec = encoder.source.config, decoder.source.config
    if asked == "auto":
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        balanced = all(getattr(enc, name) == getattr(dec, name) for name in names)
        return "copy" if balanced and len(encoder.layers) == len(decoder.layers) else "random"
    if asked == "copy" and enc.hidden_size != dec.hidden_size:
        raise UserError(
            f"--cross-attention copy needs equal widths, but {encoder.source.name} has {enc.hidden_size} and "
            f"{decoder.source.name} {dec.hidden_size}. Use partial or random."
        )
    return asked


def _bidirectional_layers(spec: str, layers: int) -> str | list[int]:
    if spec in ("bidirectional", "causal"):
        return "all" if spec == "bidirectional" else "none"
    numbers = parse_layers("--encoder-attention", spec, layers)
    return "all" if len(numbers) == layers else numbers


def _layer_map(encoder: Stack, decoder: Stack) -> list[int | None]:
    """The encoder layer for each decoder layer, that of the same source layer; None where it is not kept."""
    depths = [stack.source.config.num_hidden_layers for stack in (encoder, decoder)]
    if depths[0] != depths[1]:
        raise UserError(
            f"Cross-attention layer by layer pairs the layers of models of one depth, but {encoder.source.name} has "
            f"{depths[0]} and {decoder.source.name} {depths[1]}. Use auto."
        )
    places = {layer: place for place, layer in enumerate(encoder.layers)}
    return [places.get(layer) for layer in decoder.layers]
