"""The decoder's cache: self-attention by layer type and growing in place, cross-attention always whole.

What ``generate`` and stock caches build is neither: a cross-attention cache that inherits the decoder's sliding layers
loses the beginning of the input, and a layer that grows by a token copies all the others. Hence ``fitted``.

Shapes: B batch, G key/value heads, L cached length, T new tokens, H head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch.compiler import is_compiling
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
)

from .configuration_t5gemma import FULL
from .masks import reach

KeyValues = tuple[torch.Tensor, torch.Tensor]

# There is room for so many tokens more than needed after each copy.
ROOM = 64


class _Growing:
    """Keys or values of a layer, at the end of a buffer's filled part, with room behind them for more.

    The layer holds them as a plain tensor, which anyone may replace. One that is not what was noted last is copied by
    the next ``append``, as is one that has no room left.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._noted: torch.Tensor | None = None
        self._end = 0

    def append(self, held_BGLH: torch.Tensor, new_BGTH: torch.Tensor) -> torch.Tensor:
        """One after the other, (B, G, L + T, H). What is held may at first be any empty tensor."""
        length = held_BGLH.shape[2] if held_BGLH.numel() else 0
        buffer, added = self._buffer, new_BGTH.shape[2]
        if buffer is None or self._noted is not held_BGLH or self._end + added > buffer.shape[2]:
            rows, heads, _, width = new_BGTH.shape
            buffer = self._buffer = new_BGTH.new_empty(rows, heads, length + added + ROOM, width)
            if length:
                buffer[:, :, :length] = held_BGLH
            self._end = length
        begin, self._end = self._end, self._end + added
        buffer[:, :, begin : self._end] = new_BGTH
        return buffer[:, :, begin - length : self._end]

    def note(self, held_BGLH: torch.Tensor) -> torch.Tensor:
        """The same tensor, which is the end of what ``append`` returned."""
        self._noted = held_BGLH
        return held_BGLH

    def crop(self, before: torch.Tensor, after: torch.Tensor, removed: int) -> None:
        """So many tokens were removed at the end."""
        if self._noted is before:
            self._noted, self._end = after, self._end - removed

    def reorder(self, held_BGLH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Its rows in another order, and the room with them."""
        if self._buffer is None or self._noted is not held_BGLH:
            return held_BGLH.index_select(0, rows)
        length = held_BGLH.shape[2]
        self._buffer = self._buffer[:, :, self._end - length :].index_select(0, rows)
        self._end = length
        return self.note(self._buffer[:, :, :length])


class GrowingLayer(DynamicLayer):
    """A layer that writes new tokens behind the others, where a ``DynamicLayer`` copies all of them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_room, self._value_room = _Growing(), _Growing()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        if key_states.requires_grad:
            return super().update(key_states, value_states)  # what a backward pass reads must not be written over
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._key_room.append(self.keys, key_states)
        values = self._value_room.append(self.values, value_states)
        return self._keep(keys, values, key_states.shape[2])

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, added: int) -> KeyValues:
        """Hold what later steps need; returns what this one, of so many tokens, sees."""
        self.keys, self.values = self._key_room.note(keys), self._value_room.note(values)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        keys, values = self.keys, self.values
        super().crop(tokens_to_remove)
        if keys is not None and values is not None:
            self._key_room.crop(keys, self.keys, abs(tokens_to_remove))
            self._value_room.crop(values, self.values, abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            rows = beam_idx.to(self.keys.device)
            self.keys = self._key_room.reorder(self.keys, rows)
            self.values = self._value_room.reorder(self.values, rows)


class GrowingSlidingLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """The same with a window. As in a ``DynamicSlidingWindowLayer``, tokens before it are let go of: at once, or at
    the next ``crop`` where the past is recorded."""

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, added: int) -> KeyValues:
        self.cumulative_length += added
        before = reach(self.sliding_window)
        kept = 0 if self.record_past else max(keys.shape[2] - before, 0)
        seen = max(keys.shape[2] - before - added, 0)
        super()._keep(keys[:, :, kept:], values[:, :, kept:], added)
        return keys[:, :, seen:], values[:, :, seen:]


def new_cache(config: PreTrainedConfig) -> EncoderDecoderCache:
    """An empty growing cache for a decoder with this stack config."""
    own = _growing(DynamicCache(config=config))
    return EncoderDecoderCache(own, _holding(config))


def is_filled(cache: EncoderDecoderCache | None) -> TypeGuard[EncoderDecoderCache]:
    """Whether the source has been cached."""
    return isinstance(cache, EncoderDecoderCache) and any(cache.is_updated.values())


def fitted(cache: EncoderDecoderCache, config: PreTrainedConfig, lengths: list[int]) -> EncoderDecoderCache:
    """The same cache before its first use, so that self-attention grows in place and cross-attention keeps what it is
    given as it is.

    Args:
        cache: what ``generate`` or a caller made.
        config: the decoder's stack config.
        lengths: how many source tokens each layer reads, which size a static cache.

    Raises:
        TypeError: ``cache`` is not an ``EncoderDecoderCache``.
    """
    if not isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; an encoder-decoder needs an EncoderDecoderCache, such as "
            "EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())."
        )
    if is_filled(cache):
        return cache
    cache.self_attention_cache = _growing(cache.self_attention_cache)
    cross = cache.cross_attention_cache
    if isinstance(cross, StaticCache):
        if _keeps_all(cross, config) and [layer.max_cache_len for layer in cross.layers] == lengths:
            return cache
        cross = StaticCache(config=_all_full(config), max_cache_len=max(lengths), offloading=cross.offloading)
        for layer, length in zip(cross.layers, lengths, strict=True):
            layer.max_cache_len = length
        cache.cross_attention_cache = cross
    else:
        cache.cross_attention_cache = _holding(config, cross.offloading)
    return cache


class SourceLayer(DynamicLayer):
    """A layer whose keys and values come at once: they are held, where a ``DynamicLayer`` copies them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _holding(config: PreTrainedConfig, offloading: bool = False) -> DynamicCache:
    cross = DynamicCache(config=_all_full(config), offloading=offloading)
    if not offloading:
        cross.layers = [SourceLayer() for _ in cross.layers]
    return cross


def cross_key_values(
    cache: EncoderDecoderCache | None, layer_idx: int, device: torch.device, compute: Callable[[], KeyValues]
) -> KeyValues:
    """A layer's cross-attention keys and values, each (B, G, S, H): computed once, from the cache ever after."""
    if cache is None:
        return compute()
    if cache.is_updated.get(layer_idx):
        layer = cache.cross_attention_cache.layers[layer_idx]
        # An offloaded layer waits on the CPU.
        return layer.keys.to(device), layer.values.to(device)
    key_values = cache.cross_attention_cache.update(*compute(), layer_idx)
    cache.is_updated[layer_idx] = True
    return key_values


def seen_tokens(cache: EncoderDecoderCache | None) -> int | torch.Tensor:
    """How many target tokens are cached. A static cache counts in a tensor on its full layers, in a Python int (which
    would recompile at every step) on its sliding ones."""
    if cache is None:
        return 0
    own = cache.self_attention_cache
    whole = next((layer for layer, sliding in enumerate(own.is_sliding) if not sliding), 0)
    return own.get_seq_length(whole)


def _growing(own: Cache) -> Cache:
    """The same cache, its unused layers replaced where they would grow by copying: but not where they are offloaded,
    which copies them too, nor in a traced graph, which has no tensors to write to."""
    if not own.offloading and not is_compiling():
        own.layers = [_growing_layer(layer) for layer in own.layers]
    return own


def _growing_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    if layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        growing = GrowingSlidingLayer(sliding_window=layer.sliding_window)
        growing.record_past = layer.record_past
        return growing
    return layer


def _keeps_all(cross: Cache, config: PreTrainedConfig) -> bool:
    return len(cross) == config.num_hidden_layers and not any(cross.is_sliding)


def _all_full(config: PreTrainedConfig) -> PreTrainedConfig:
    full = copy.deepcopy(config)
    full.sliding_window = None
    full.layer_types = [FULL] * config.num_hidden_layers
    return full
