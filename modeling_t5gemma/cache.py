"""The decoder's cache: self-attention by layer type, cross-attention always whole.

A cross-attention cache that inherits the decoder's sliding layers loses the beginning of the input; ``generate`` and
stock caches build it so, hence ``with_whole_cross_attention``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from .configuration_t5gemma import FULL

KeyValues = tuple[torch.Tensor, torch.Tensor]


def new_cache(config: PreTrainedConfig) -> EncoderDecoderCache:
    """An empty growing cache for a decoder with this stack config."""
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=_all_full(config)))


def with_whole_cross_attention(
    cache: EncoderDecoderCache, config: PreTrainedConfig, source_length: int
) -> EncoderDecoderCache:
    """The same cache before its first use, its cross-attention half replaced by one that keeps every position.

    Args:
        cache: what ``generate`` or a caller made.
        config: the decoder's stack config.
        source_length: the encoder's length S, which sizes a static cache.

    Raises:
        TypeError: ``cache`` is not an ``EncoderDecoderCache``.
    """
    if not isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; an encoder-decoder needs an EncoderDecoderCache, such as "
            "EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())."
        )
    if any(cache.is_updated.values()) or _keeps_all(cache.cross_attention_cache, config):
        return cache
    cross = cache.cross_attention_cache
    if isinstance(cross, StaticCache):
        cache.cross_attention_cache = StaticCache(
            config=_all_full(config), max_cache_len=source_length, offloading=cross.offloading
        )
    else:
        cache.cross_attention_cache = DynamicCache(config=_all_full(config), offloading=cross.offloading)
    return cache


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


def _keeps_all(cross: Cache, config: PreTrainedConfig) -> bool:
    return len(cross) == config.num_hidden_layers and not any(cross.is_sliding)


def _all_full(config: PreTrainedConfig) -> PreTrainedConfig:
    full = copy.deepcopy(config)
    full.sliding_window = None
    full.layer_types = [FULL] * config.num_hidden_layers
    return full
