"""The two stacks, and what every model of this package shares: loading, initialisation, backends, embeddings.

Shapes: B batch, T target length, S source length, D width, V vocabulary, G key/value heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention import AUTO, BACKENDS, Needs, resolve_backend
from .blocks import DECODER_LAYERS, T5GemmaEncoderLayer, repeat_rows
from .cache import KeyValues, fitted, is_filled, new_cache, seen_tokens
from .configuration_t5gemma import SLIDING, StackConfig, T5GemmaConfig, T5GemmaModuleConfig, is_bidirectional
from .cross_attention import KEY_VALUES, OUTPUT, kind_of, layers_read
from .labels import complaints, shifted_right
from .layers import ClassificationHead, RMSNorm, Rope, RotaryEmbedding, dropout
from .masks import AttentionPattern, ends_of_source, first_read, join, positions_in_segments

logger = logging.get_logger(__name__)


@dataclass
class T5GemmaEncoderOutput(BaseModelOutput):
    """What a decoder needs of its encoder.

    Attributes:
        last_hidden_state: (B, S, D), after the final norm.
        attention_mask: bool (B, S), as given or inferred from the padding; one inference serves both stacks.
        position_ids: int64 (B or 1, S).
        key_values: for a decoder that reads them, each layer's keys and values, (B, G, S, H) each. With
            ``source_only`` None where a layer is not read, and of sliding layers the last tokens that are.
    """

    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    key_values: tuple[KeyValues | None, ...] | None = None


class T5GemmaPreTrainedModel(PreTrainedModel):
    """What all models here share: loading, initialisation, attention backends, embeddings."""

    config: Any
    config_class = T5GemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["T5GemmaEncoderLayer", "T5GemmaDecoderLayer", "LayerwiseDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _labels_seen = False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Check a requested backend against the config; without a request each call takes the best legal one.

        Raises:
            ValueError: the backend cannot honour the config (the message names those that can).
        """
        if requested_attention in (None, AUTO):
            return AUTO
        softcap = any(stack.attn_logit_softcapping is not None for stack in self._stack_configs())
        devices = BACKENDS[requested_attention].devices if requested_attention in BACKENDS else ()
        return resolve_backend(requested_attention, Needs(softcap=softcap, device=devices[0] if devices else "cpu"))

    def set_attn_implementation(
        self, attn_implementation: str | dict[Any, Any], allow_all_kernels: bool = False
    ) -> None:
        """Change the backend of both stacks, or of each by name: {"encoder": "blocked", "decoder": "eager"}.

        Raises:
            ValueError: the backend cannot honour the config.
        """
        names = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        for name in names:
            self.get_correct_attn_implementation(name)
        self.config._attn_implementation = attn_implementation

    def _stack_configs(self) -> list[StackConfig]:
        config = self.config
        return [config.encoder, config.decoder] if hasattr(config, "encoder") else [config]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, ClassificationHead):
            module.reset_parameters(self.config.initializer_range)

    def decoder_start_token_id(self) -> int:
        """The token that decoding begins with, the same in training and in ``generate``.

        Raises:
            ValueError: neither a start token nor a beginning-of-sequence token is configured.
        """
        candidates = (
            getattr(getattr(self, "generation_config", None), "decoder_start_token_id", None),
            getattr(self.config, "decoder_start_token_id", None),
            self.config.decoder.bos_token_id,
        )
        for token in candidates:
            if token is not None:
                return int(token)
        raise ValueError("No decoder_start_token_id: set it in the generation config, or bos_token_id in the config.")

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) behind the start token: see ``labels.shifted_right``. The first labels that a model is given
        are looked at, and what looks wrong is logged.

        Raises:
            ValueError: the config has no padding token.
        """
        pad = self.config.decoder.pad_token_id
        if pad is None:
            raise ValueError("pad_token_id has to be set in the decoder's config to shift labels.")
        start = self.decoder_start_token_id()
        if not (self._labels_seen or is_compiling() or labels.is_meta):
            self._labels_seen = True  # once: on a GPU to look is to wait
            for complaint in complaints(labels, start, pad, self._ends()):
                logger.warning("The labels look wrong. %s", complaint)
        return shifted_right(labels, start, pad)

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        configs = (getattr(self, "generation_config", None), self.config.decoder)
        ends = [getattr(config, "eos_token_id", None) for config in configs]
        return {token for each in ends if each is not None for token in (each if isinstance(each, list) else [each])}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize both stacks' embeddings and the head; the configs follow, so that it saves and reloads."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.weight.shape[0]
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and decoder.embed_tokens.weight.shape[0] != size:
            PreTrainedModel.resize_token_embeddings(decoder, size, mean_resizing=mean_resizing)
        self.config.vocab_size = size
        for stack in self._stack_configs():
            stack.vocab_size = size
        self.tie_weights()
        return embeddings


class Stack(T5GemmaPreTrainedModel):
    """Embeddings, layers, final norm: what encoder and decoder stack have in common."""

    config_class = T5GemmaModuleConfig

    def __init__(self, config: StackConfig, layers: list[nn.Module]) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_unit_offset)
        self.dropout = dropout(config.dropout_rate)
        self.rotary_emb = nn.ModuleDict({kind: RotaryEmbedding(config, kind) for kind in set(config.layer_types)})
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings as the first layer sees them, (B, T, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.scale_embeddings:
            # Rounded to the model's dtype first, as the original does.
            hidden = hidden * torch.tensor(self.config.hidden_size**0.5, dtype=hidden.dtype, device=hidden.device)
        return self.dropout(hidden)

    def ropes(self, x: torch.Tensor, positions: torch.Tensor) -> dict[str, Rope]:
        return {kind: rope(x, positions) for kind, rope in self.rotary_emb.items()}

    def window(self, layer_type: str) -> int | None:
        return self.config.sliding_window if layer_type == SLIDING else None

    def first_read(self, layer_type: str, positions: torch.Tensor, valid: torch.Tensor | None) -> int:
        """The first source slot that a layer reads where positions go on after the source."""
        window = self.window(layer_type)
        return 0 if window is None else first_read(positions, valid, window)

    def need_weights(self, output_attentions: bool | None) -> bool:
        wanted = output_attentions if output_attentions is not None else self.config.output_attentions
        return bool(wanted)

    def need_hidden(self, output_hidden_states: bool | None) -> bool:
        wanted = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        return bool(wanted)


class T5GemmaEncoder(Stack):
    """The encoder stack. It keeps no cache."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config, [T5GemmaEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.kind = kind_of(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Any = None,
        source_only: bool = False,
        **kwargs: Any,
    ) -> T5GemmaEncoderOutput:
        """Encode a batch.

        Args:
            input_ids: int64 (B, S), or ``inputs_embeds`` float (B, S, D) instead.
            attention_mask: (B, S), 1 where a token is real; inferred from the padding token when left out.
            position_ids: int64 (B or 1, S), counted when left out.
            segment_ids: int64 (B, S) for packed rows: documents count from 1, 0 is padding.
            source_only: leave out what the decoder does not read. Where it reads keys and values, nothing is computed
                after those of the last layer that is read (``last_hidden_state`` is then (B, S, 0)), unless
                hidden states or attentions are asked for, and sliding layers keep only the tokens that are read.

        Raises:
            ValueError: a cache is given, or a mask that is not two-dimensional.
        """
        if past_key_values is not None:
            raise ValueError("The encoder keeps no key/value cache: pass past_key_values to the decoder alone.")
        x = self.embed(input_ids, inputs_embeds)
        valid = real_tokens(attention_mask, segment_ids, input_ids, self.config.pad_token_id)
        positions = position_ids
        if positions is None:
            # As in stock, padding has positions of its own, unless a decoder goes on from the last real token.
            positions = positions_of(x, valid if self.kind.continues else None, segment_ids)
        patterns = {
            (kind, bidirectional): AttentionPattern(
                positions, positions, not bidirectional, self.window(kind), valid, segment_ids, segment_ids, valid
            )
            for kind in set(self.config.layer_types)
            for bidirectional in (True, False)
        }
        ropes = self.ropes(x, positions)
        need_weights, need_hidden = self.need_weights(output_attentions), self.need_hidden(output_hidden_states)
        source_only = source_only and self.kind.reads == KEY_VALUES
        ends_early = source_only and not (need_weights or need_hidden)
        read = layers_read(self.config)
        hidden_states, weights = [], []
        key_values: list[KeyValues | None] = [None] * len(self.layers)
        layer: Any
        for i, layer in enumerate(self.layers):
            kind = self.config.layer_types[i]
            hidden_states.append(x)
            if ends_early and i == read[-1]:
                # By its own call, which gathers the weights where they are sharded.
                pattern = patterns[kind, is_bidirectional(self.config, i)]
                x, _, *own = layer(x, ropes[kind], pattern, key_values_only=True)
                key_values[i], x = tuple(own), x[..., :0]
                break
            x, layer_weights, *own = layer(
                x, ropes[kind], patterns[kind, is_bidirectional(self.config, i)], need_weights
            )
            weights.append(layer_weights)
            if i in read or not source_only:
                key_values[i] = tuple(own)
        else:
            x = self.dropout(self.norm(x))
        if source_only and segment_ids is None:
            key_values = self._read_alone(key_values, positions, valid)
        return T5GemmaEncoderOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if need_hidden else None,
            attentions=tuple(weights) if need_weights else None,
            attention_mask=valid,
            position_ids=positions if self.kind.continues else None,
            key_values=tuple(key_values) if self.kind.reads == KEY_VALUES else None,
        )

    def _read_alone(
        self, key_values: list[KeyValues | None], positions: torch.Tensor, valid: torch.Tensor | None
    ) -> list[KeyValues | None]:
        """Of sliding layers the tokens that are read, in memory of their own."""
        kinds = self.config.layer_types
        starts = {kind: self.first_read(kind, positions, valid) for kind in set(kinds)}
        begins = [starts[kind] for kind in kinds]
        return [
            pair if pair is None or begin == 0 else (pair[0][:, :, begin:].clone(), pair[1][:, :, begin:].clone())
            for pair, begin in zip(key_values, begins, strict=True)
        ]


class T5GemmaDecoder(Stack):
    """The decoder stack, with the only key/value cache."""

    def __init__(self, config: StackConfig) -> None:
        make_layer = DECODER_LAYERS[config.cross_attention_type]
        super().__init__(config, [make_layer(config, i) for i in range(config.num_hidden_layers)])
        self.kind = kind_of(config)
        self.sourceless = [layer for layer, m in enumerate(config.cross_attention_map or ()) if m is None]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        encoder_segment_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode a batch against an encoded one.

        Args:
            input_ids: int64 (B, T), or ``inputs_embeds`` float (B, T, D) instead.
            attention_mask: (B, T), with a cache (B, cached + T); without a cache inferred from the padding token.
            position_ids: int64 (B or 1, T), counted from 0; a layerwise decoder adds the length of its source.
            past_key_values: the cache; made when ``use_cache`` asks for one.
            encoder_outputs: what ``T5GemmaEncoder`` returned. Its rows may be fewer than B: each then serves the same
                number of consecutive rows here.
            encoder_attention_mask: (B, S), instead of the one in ``encoder_outputs``.
            segment_ids, encoder_segment_ids: int64 (B, T) and (B, S) for packed rows: documents count from 1, 0 is
                padding.

        Raises:
            ValueError: encoder outputs missing or of the wrong kind, segments on one side only or with a cache.
        """
        x = self.embed(input_ids, inputs_embeds)
        source = _source(encoder_outputs, encoder_attention_mask, encoder_segment_ids, x.shape[0])
        if (segment_ids is None) != (source.segment_ids is None):
            raise ValueError("Packed rows need segment_ids and decoder_segment_ids; only one was given.")
        lengths, cached = self._source_lengths(source, past_key_values), is_filled(past_key_values)
        if past_key_values is not None:
            past_key_values = fitted(past_key_values, self.config, lengths)
        elif use_cache:
            past_key_values = new_cache(self.config)
        if segment_ids is not None and past_key_values is not None:
            raise ValueError("Packed rows cannot be cached: call with use_cache=False.")

        inferable = input_ids if past_key_values is None else None
        valid = unless_all_are(real_tokens(attention_mask, segment_ids, inferable, self._inferable_pad()))
        positions, slots = self._positions(x, position_ids, valid, segment_ids, past_key_values)
        if self.kind.continues:
            positions = positions + ends_of_source(source.positions, source.valid, source.segment_ids, segment_ids)
        own = self._own_patterns(x, positions, slots, valid, segment_ids, past_key_values)
        cross = AttentionPattern(
            positions, source.positions, False, None, source.valid, segment_ids, source.segment_ids
        )
        arguments = self._layer_arguments(own, cross, source, lengths, cached)

        ropes = self.ropes(x, positions)
        need_weights = self.need_weights(output_attentions)
        hidden_states, weights, cross_weights = [], [], []
        for layer, (kind, *layer_arguments) in zip(self.layers, arguments, strict=True):
            hidden_states.append(x)
            x, layer_weights, layer_cross_weights = layer(
                x, ropes[kind], *layer_arguments, past_key_values=past_key_values, need_weights=need_weights
            )
            weights.append(layer_weights)
            cross_weights.append(layer_cross_weights)
        x = self.dropout(self.norm(x))
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if self.need_hidden(output_hidden_states) else None,
            attentions=tuple(weights) if need_weights else None,
            cross_attentions=tuple(cross_weights) if need_weights else None,
        )

    def _inferable_pad(self) -> int | None:
        """The padding token to infer a mask from; none where decoding begins with it, as that would hide the start."""
        start = getattr(self.config, "decoder_start_token_id", self.config.bos_token_id)
        return None if start == self.config.pad_token_id else self.config.pad_token_id

    def _positions(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor | None,
        valid: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B or 1, T), which count from each row's first real token where they go on after the source's, and
        slots (T,), counted from the cache's first."""
        slots = torch.arange(x.shape[1], device=x.device) + seen_tokens(cache)
        if position_ids is not None:
            return position_ids, slots
        if segment_ids is not None:
            return positions_in_segments(segment_ids), slots
        if valid is None or not self.kind.continues:
            return slots[None], slots
        padding_before = valid.long().argmax(dim=1, keepdim=True)
        return slots[None] - padding_before, slots

    def _own_patterns(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        valid: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> dict[str, AttentionPattern]:
        """What a target token sees of the target, by layer type: a sliding layer's cache holds other keys."""
        patterns = {}
        seen = seen_tokens(cache)
        for kind in set(self.config.layer_types):
            causal, window, key_positions, key_valid = True, self.window(kind), positions, valid
            query_valid = None if valid is None else valid[:, -x.shape[1] :]
            if cache is not None:
                length, offset = cache.self_attention_cache.get_mask_sizes(
                    x.shape[1], self.config.layer_types.index(kind)
                )
                key_slots = torch.arange(length, device=x.device) + offset
                key_positions = positions[:, :1] - slots[:1] + key_slots
                if valid is not None:
                    # Slots that are not written yet lie beyond the mask; causality hides them.
                    key_valid = valid[:, key_slots.clamp(max=valid.shape[1] - 1)]
                if x.shape[1] == 1 and isinstance(seen, int) and offset + length == seen + 1:
                    # One query and no later key.
                    causal = False
                    if window is not None and length <= window and not self.kind.continues:
                        window = None
            patterns[kind] = AttentionPattern(
                positions, key_positions, causal, window, key_valid, segment_ids, segment_ids, query_valid
            )
        return patterns

    def _source_lengths(self, source: _Source, cache: EncoderDecoderCache | None) -> list[int]:
        """How many of the source's keys each layer reads: of a sliding layer those that its first target token sees,
        of one without a source its anchors. What is cached has been decided."""
        if is_filled(cache):
            return [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers]
        lengths = dict.fromkeys(self.config.layer_types, source.length)
        if self.kind.continues and source.segment_ids is None:
            for kind in lengths:
                lengths[kind] -= self.first_read(kind, source.positions, source.valid)
        # A traced graph reads what there is: an encoder outside of it may have left out what is not read.
        for kind, m in zip(self.config.layer_types, self.config.cross_attention_map or (), strict=False):
            if m is not None and source.key_values is not None and (pair := source.key_values[m]) is not None:
                lengths[kind] = min(lengths[kind], pair[0].shape[2])
        return [
            source.documents if layer in self.sourceless else lengths[kind]
            for layer, kind in enumerate(self.config.layer_types)
        ]

    def _layer_arguments(
        self,
        own: dict[str, AttentionPattern],
        cross: AttentionPattern,
        source: _Source,
        lengths: list[int],
        cached: bool,
    ) -> list[tuple[Any, ...]]:
        """What each layer takes beside its input: its kind, its patterns and its source, None where it is cached."""
        kinds = self.config.layer_types
        if self.kind.reads == OUTPUT:
            return [(kind, own[kind], cross, source.hidden) for kind in kinds]
        joined: dict[tuple[str, bool], AttentionPattern] = {}
        patterns = []
        for layer, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
            key = kind, layer in self.sourceless
            if key not in joined:
                read = source.anchor_pattern(cross) if layer in self.sourceless else cross.of_last_keys(length)
                joined[key] = join(read, own[kind])
            patterns.append(joined[key])
        key_values = [(None, None)] * len(kinds) if cached else self._source_key_values(source, lengths)
        return [(kind, pattern, *pair) for kind, pattern, pair in zip(kinds, patterns, key_values, strict=True)]

    def _source_key_values(self, source: _Source, lengths: list[int]) -> list[KeyValues]:
        """The source's keys and values for each layer, (B or encoder rows, G, length, H) each."""
        if source.key_values is None:
            raise ValueError(
                "This decoder attends to its encoder's keys and values, which these encoder_outputs do not have: pass "
                "what this model's own encoder returned."
            )
        anchors = self._anchors(source)
        made = []
        for layer, (paired, length) in enumerate(zip(self.config.cross_attention_map, lengths, strict=True)):
            keys, values = anchors[layer] if paired is None else source.key_values[paired]
            first = keys.shape[2] - length
            made.append((keys[:, :, first:], values[:, :, first:]))
        return made

    def _anchors(self, source: _Source) -> dict[int, KeyValues]:
        """Keys and values of ``<bos>`` in the layers without a source, (1, G, documents, H) each: the first token of
        every source sees itself alone, so they are always the same."""
        anchors: dict[int, KeyValues] = {}
        if not self.sourceless:
            return anchors
        x = self.embed(torch.full((1, 1), self.config.bos_token_id, device=source.hidden.device), None)
        first = torch.zeros((1, 1), dtype=torch.long, device=x.device)
        ropes, alone = self.ropes(x, first), AttentionPattern(first, first)
        layer: Any
        for i, layer in enumerate(self.layers[: self.sourceless[-1] + 1]):
            x, _, keys, values = layer.without_source(x, ropes[self.config.layer_types[i]], alone)
            if i in self.sourceless:
                documents = -1, -1, source.documents, -1
                anchors[i] = keys.expand(documents), values.expand(documents)
        return anchors


@dataclass
class _Source:
    """The encoded input as the decoder uses it, its small tensors brought to the decoder's number of rows."""

    hidden: torch.Tensor
    valid: torch.Tensor | None
    positions: torch.Tensor
    segment_ids: torch.Tensor | None
    key_values: tuple[KeyValues | None, ...] | None

    @property
    def length(self) -> int:
        return self.hidden.shape[1]

    @property
    def documents(self) -> int:
        """The most documents that a row has, which are its anchors."""
        return 1 if self.segment_ids is None else int(self.segment_ids.amax())

    def anchor_pattern(self, whole: AttentionPattern) -> AttentionPattern:
        """Like ``whole``, of queries that see each document's first token alone, if it has one. It counts as the last
        before the target, so that a window begins with it."""
        documents = None
        if self.segment_ids is not None:
            documents = torch.arange(1, self.documents + 1, device=self.hidden.device).expand(
                len(self.segment_ids), -1
            )
        places = ends_of_source(self.positions, self.valid, self.segment_ids, documents) - 1
        return replace(whole, key_positions=places, key_valid=unless_all_are(places >= 0), key_segments=documents)


def _source(
    outputs: BaseModelOutput | None, mask: torch.Tensor | None, segment_ids: torch.Tensor | None, rows: int
) -> _Source:
    if outputs is None:
        raise ValueError("The decoder needs encoder_outputs.")
    hidden = outputs.last_hidden_state
    given = mask if mask is not None else outputs.get("attention_mask")
    valid = unless_all_are(real_tokens(given, segment_ids, None, None))
    positions = outputs.get("position_ids")
    if positions is None:
        positions = positions_of(hidden, valid, segment_ids)
    return _Source(
        hidden=hidden,
        valid=None if valid is None else repeat_rows(valid, rows),
        positions=positions if positions.shape[0] == 1 else repeat_rows(positions, rows),
        segment_ids=None if segment_ids is None else repeat_rows(segment_ids, rows),
        key_values=outputs.get("key_values"),
    )


def real_tokens(
    mask: torch.Tensor | None, segment_ids: torch.Tensor | None, input_ids: torch.Tensor | None, pad: int | None
) -> torch.Tensor | None:
    """Which tokens are no padding, bool (B, T); None when nothing says that any is."""
    if segment_ids is not None:
        return segment_ids != 0
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions; give (batch, length) with 1 for real tokens, and "
                "segment_ids for packed documents."
            )
        return mask.bool()
    if input_ids is not None and pad is not None:
        return input_ids != pad
    return None


def unless_all_are(real: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens are no padding, or None when all are known to be none: then nothing has to be masked.

    To know it is to read values, for which a GPU would have to be waited for, and which a traced graph does not have.
    """
    if real is None or real.device.type != "cpu" or is_compiling() or not bool(real.all()):
        return real
    return None


def positions_of(x: torch.Tensor, valid: torch.Tensor | None, segment_ids: torch.Tensor | None) -> torch.Tensor:
    """Positions that count the tokens from 0, or the real ones of each row or document; int64 (B or 1, S)."""
    if segment_ids is not None:
        return positions_in_segments(segment_ids)
    if valid is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)
