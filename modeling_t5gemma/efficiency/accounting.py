"""Parameters, FLOPs and cache of a model from its config alone, so that it also works where no weights are at hand.

FLOPs are those of matrix products, two for each multiplication, as ``torch.utils.flop_counter`` counts them: norms,
activations, softmax and the look-up of embeddings are left out.

Symbols: S input tokens, O output tokens. An encoder-decoder encodes S tokens and decodes O (the start token and all
outputs but the last); a decoder-only model reads S tokens, of which only the last needs the head, and O - 1 more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma2Config, PreTrainedConfig

from ..configuration_t5gemma import FULL, SLIDING, STACK_PRESETS, T5GemmaConfig, is_bidirectional
from ..cross_attention import KEY_VALUES, kind_of, layers_read
from ..errors import UserError
from ..masks import reach

_ENCODER_DECODERS = ("t5gemma", "adapted_seq2seq")
_DECODER_ONLY = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_GEMMA2 = "gemma2-"


@dataclass(frozen=True)
class Stack:
    """The shapes of a stack that its costs depend on.

    Attributes:
        windows: of each layer, how many positions a token sees, itself included, to one side; None for all.
        bidirectional: of each layer, whether a token sees later ones.
    """

    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]
    bidirectional: tuple[bool, ...]

    @classmethod
    def of(cls, config: Any) -> Stack:
        """From the config of a stack or of a decoder-only model.

        Raises:
            UserError: it has layers of another kind than full and sliding attention.
        """
        layers = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * layers
        if other := set(kinds) - {FULL, SLIDING}:
            raise UserError(f"Layers of kind {', '.join(sorted(other))} cannot be counted; {FULL} and {SLIDING} can.")
        in_a_pair = hasattr(config, "bidirectional_layers")
        return cls(
            width=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
            windows=tuple(window if kind == SLIDING else None for kind in kinds),
            bidirectional=tuple(in_a_pair and is_bidirectional(config, layer) for layer in range(layers)),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    def products(self, tokens: int) -> int:
        """FLOPs of the projections and MLPs of all layers."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return 2 * tokens * self.layers * (attention + 3 * self.width * self.ffn)

    def scores(self, pairs: int) -> int:
        """FLOPs of the scores, and of the values they weight, for so many pairs of a query and a key in a layer."""
        return 4 * pairs * self.heads * self.head_dim

    def head(self, tokens: int) -> int:
        return 2 * tokens * self.width * self.vocabulary


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence. ``decoder`` is without cross-attention; of a layerwise decoder, ``cross_attention`` is
    the part of the softmax over the source."""

    encoder: int
    decoder: int
    cross_attention: int
    head: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder + self.cross_attention + self.head


@dataclass(frozen=True)
class Parameters:
    """Parameters, tied ones once; ``embeddings`` are those of both stacks and of a head of its own."""

    total: int
    embeddings: int

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embeddings


def preset(name: str) -> PreTrainedConfig | None:
    """The config of a released pair or of any other ("9b-2b"), or of a Gemma 2 of one stack ("gemma2-2b"); None for
    any other name."""
    if name.startswith(_GEMMA2) and (stack := name.removeprefix(_GEMMA2)) in STACK_PRESETS:
        return Gemma2Config(vocab_size=256000, sliding_window=4096, **STACK_PRESETS[stack])
    stacks = name.split("-")
    if len(stacks) == 2 and all(stack in STACK_PRESETS for stack in stacks):
        return T5GemmaConfig.from_preset(name)
    return None


def countable(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config of the language model, with that of a picture encoder left aside.

    Raises:
        UserError: a kind of model whose costs are not known here.
    """
    if config.model_type == "gemma3":
        config = config.get_text_config()
    if config.model_type not in (*_ENCODER_DECODERS, *_DECODER_ONLY):
        raise UserError(
            f"{name} is a {config.model_type}, whose costs are not known here. Known: "
            f"{', '.join((*_ENCODER_DECODERS, *_DECODER_ONLY))}."
        )
    if config.model_type in _DECODER_ONLY and getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{name} is not causal (use_bidirectional_attention). Give a model that generates.")
    return config


def parameters(config: Any) -> Parameters:
    """Counted on a model without storage."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    named = {id(each): each for each in model.parameters()}
    kept = [model.get_input_embeddings(), model.get_output_embeddings()]
    if config.is_encoder_decoder:
        kept.append(model.get_decoder().get_input_embeddings())
    embeddings = {id(each.weight): each.weight for each in kept}
    return Parameters(*(sum(each.numel() for each in group.values()) for group in (named, embeddings)))


def flops(config: Any, input_tokens: int, output_tokens: int, *, dense: bool = False) -> Flops:
    """FLOPs of generating with a cache, for one sequence.

    Args:
        config: of an encoder-decoder of this package or a decoder-only model.
        input_tokens, output_tokens: S and O, both at least 1.
        dense: count every key that is there, as eager attention computes them, instead of those that are seen.
    """
    if not config.is_encoder_decoder:
        stack = Stack.of(config)
        tokens = input_tokens + output_tokens - 1
        pairs = sum(_cached_pairs(tokens, input_tokens, window, dense) for window in stack.windows)
        return Flops(0, stack.products(tokens) + stack.scores(pairs), 0, stack.head(output_tokens))
    encoder, decoder = Stack.of(config.encoder), Stack.of(config.decoder)
    own = sum(_cached_pairs(output_tokens, 1, window, dense) for window in decoder.windows)
    return Flops(
        _encoding(encoder, config, input_tokens, dense),
        decoder.products(output_tokens) + decoder.scores(own),
        _cross_attention(encoder, decoder, config, input_tokens, output_tokens, dense),
        decoder.head(output_tokens),
    )


def cache_bytes(config: Any, input_tokens: int, output_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values that are held for one sequence when its last token comes.

    A sliding layer holds one position less than its window, of the outputs and, where positions go on after the
    source's, of the source. Other layers hold the whole source, one that reads none a single token of it.
    """
    stack = Stack.of(config.decoder if config.is_encoder_decoder else config)
    own = output_tokens if config.is_encoder_decoder else input_tokens + output_tokens - 1
    positions = sum(own if window is None else min(own, reach(window)) for window in stack.windows)
    if config.is_encoder_decoder:
        positions += sum(_source_keys(stack, config, input_tokens))
    return 2 * positions * stack.kv_heads * stack.head_dim * bytes_per_value


def paper_flops(config: Any, tokens: int = 4096) -> int:
    """FLOPs as "Encoder-Decoder Gemma" (arXiv 2504.06225) reports them for one sequence of ``tokens`` in and out.

    The paper does not say how it counts. This count gives its five figures (.491 for 2B, .464 for 2B-2B, 1.047 for
    9B-2B, 1.717 for 9B, 1.630 for 9B-9B, times 1e14) to within 0.1%, so it is inferred to be theirs:

    - decoder-only: one causal pass over 2 x 4096 tokens, with the head on every one,
    - encoder-decoder: the sum of two such passes over 4096 tokens, one with each stack. So the encoder is counted as
      causal and with a head, which it has not, and cross-attention is not counted at all.

    ``flops`` counts what is run. By it, with 4096 tokens in and out, 2B-2B takes 13% more than 2B, not 6% less.
    """
    if not config.is_encoder_decoder:
        return _pass_with_head(Stack.of(config), 2 * tokens)
    return sum(_pass_with_head(Stack.of(stack), tokens) for stack in (config.encoder, config.decoder))


def _pass_with_head(stack: Stack, tokens: int) -> int:
    pairs = sum(_pairs(tokens, window, False) for window in stack.windows)
    return stack.products(tokens) + stack.scores(pairs) + stack.head(tokens)


def _pairs(tokens: int, window: int | None, bidirectional: bool) -> int:
    """Pairs of a token and one that it sees."""
    reach = tokens if window is None else min(window, tokens)
    causal = reach * (reach + 1) // 2 + (tokens - reach) * reach
    return 2 * causal - tokens if bidirectional else causal


def _cached_pairs(tokens: int, prompt: int, window: int | None, dense: bool) -> int:
    """Of causal self-attention over a prompt at once and each further token alone, whose keys are all seen."""
    seen = _pairs(tokens, window, False)
    return seen - _pairs(prompt, window, False) + prompt**2 if dense else seen


def _encoding(encoder: Stack, config: Any, input_tokens: int, dense: bool) -> int:
    """Of a decoder that reads keys and values the last are those of the last layer that is read."""
    keys = 0
    if kind_of(config).reads == KEY_VALUES:
        last = layers_read(config)[-1]
        encoder = replace(encoder, windows=encoder.windows[:last], bidirectional=encoder.bidirectional[:last])
        keys = 4 * input_tokens * encoder.width * encoder.kv_heads * encoder.head_dim
    pairs = sum(
        input_tokens**2 if dense else _pairs(input_tokens, window, both)
        for window, both in zip(encoder.windows, encoder.bidirectional, strict=True)
    )
    return encoder.products(input_tokens) + encoder.scores(pairs) + keys


def _cross_attention(
    encoder: Stack, decoder: Stack, config: Any, input_tokens: int, output_tokens: int, dense: bool
) -> int:
    kind = kind_of(config)
    keys = _source_keys(decoder, config, input_tokens)
    if kind.continues and not dense:
        pairs = sum(map(_joined_pairs, keys, [output_tokens] * len(keys), decoder.windows))
    else:
        pairs = sum(keys) * output_tokens
    cost = decoder.scores(pairs)
    if not kind.joint:
        cost += 4 * decoder.layers * decoder.head_dim * output_tokens * decoder.width * decoder.heads
    if kind.weights:
        cost += 4 * decoder.layers * decoder.head_dim * input_tokens * encoder.width * decoder.kv_heads
    if without := [layer for layer, m in enumerate(config.cross_attention_map or ()) if m is None]:
        # Their anchor goes through the layers up to the last of them, alone.
        below = replace(decoder, windows=decoder.windows[: without[-1] + 1])
        cost += below.products(1) + below.scores(below.layers)
    return cost


def _source_keys(decoder: Stack, config: Any, input_tokens: int) -> list[int]:
    """How many of the source's keys each layer of a decoder holds."""
    continues = kind_of(config).continues
    held = [
        input_tokens if window is None or not continues else min(input_tokens, reach(window))
        for window in decoder.windows
    ]
    layer_map = config.cross_attention_map or held
    return [1 if paired is None else keys for keys, paired in zip(held, layer_map, strict=True)]


def _joined_pairs(input_tokens: int, output_tokens: int, window: int | None) -> int:
    """Pairs of an output and an input token where a window counts over both: a sliding layer soon leaves the input
    behind."""
    joined = _pairs(input_tokens + output_tokens, window, False) - _pairs(input_tokens, window, False)
    return joined - _pairs(output_tokens, window, False)
