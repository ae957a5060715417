"""Attention modules and transformer layers.

A layer is a chain of sublayers with the residual around each: "x = x + norm(attention(norm(x)))". What a family does
not have is an ``Identity``, chosen when the module is built.

Shapes: B batch, T queries, S source length, N query heads, G key/value heads, H head_dim, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attended, attention
from .cache import KeyValues, cross_key_values
from .configuration_t5gemma import StackConfig
from .layers import GatedMLP, RMSNorm, Rope, apply_rope, dropout
from .masks import AttentionPattern


def norm(config: StackConfig, dim: int) -> RMSNorm:
    return RMSNorm(dim, config.rms_norm_eps, config.norm_unit_offset)


def post_norm(config: StackConfig) -> nn.Module:
    """The norm after a sublayer, where the family has one."""
    return norm(config, config.hidden_size) if config.norm_placement == "pre_post" else nn.Identity()


def head_norm(config: StackConfig) -> nn.Module:
    """The norm on queries or keys, where the family has one."""
    return norm(config, config.head_dim) if config.qk_norm else nn.Identity()


class _Attention(nn.Module):
    """The projections that self- and cross-attention share; queries come from width D, keys and values from
    ``source_width``."""

    def __init__(self, config: StackConfig, layer_idx: int, source_width: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        qkv_bias = config.attention_bias or config.qkv_bias
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(source_width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(source_width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = head_norm(config)
        self.k_norm = head_norm(config)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * H) to (B, heads, T, H); tensor parallelism leaves fewer heads than the config says."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        q_BNTH: torch.Tensor = self.q_norm(self.split_heads(self.q_proj(x)))
        return q_BNTH

    def key_values(self, source: torch.Tensor) -> KeyValues:
        return self.k_norm(self.split_heads(self.k_proj(source))), self.split_heads(self.v_proj(source))

    def attend(
        self,
        q_BNTH: torch.Tensor,
        key_values: KeyValues,
        pattern: AttentionPattern,
        need_weights: bool,
        before: KeyValues | None = None,
    ) -> Attended:
        out_BNTH, weights = attention(
            q_BNTH,
            *key_values,
            pattern,
            backend=self.config._attn_implementation,
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.config.attention_dropout if self.training else 0.0,
            need_weights=need_weights,
            before=before,
        )
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2)), weights


class T5GemmaSelfAttention(_Attention):
    """Self-attention with RoPE, and in a layerwise decoder attention to the source in the same softmax."""

    def __init__(self, config: StackConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.hidden_size)

    def project(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, KeyValues]:
        """Queries (B, N, T, H), and keys and values (B, G, T, H), rotated where they are."""
        return apply_rope(self.queries(x), rope), self.rotated_key_values(x, rope)

    def rotated_key_values(self, x: torch.Tensor, rope: Rope) -> KeyValues:
        keys, values = self.key_values(x)
        return apply_rope(keys, rope), values

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope,
        pattern: AttentionPattern,
        source: KeyValues | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Output (B, T, D), weights or None, and the layer's own keys and values."""
        q_BNTH, own = self.project(x, rope)
        if past_key_values is not None:
            own = past_key_values.self_attention_cache.update(*own, self.layer_idx)
        out, weights = self.attend(q_BNTH, own, pattern, need_weights, before=source)
        return out, weights, *own


class T5GemmaCrossAttention(_Attention):
    """Separate cross-attention: own weights, no RoPE, always global, over the encoder's final output."""

    def __init__(self, config: StackConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.cross_attention_hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor,
        pattern: AttentionPattern,
        past_key_values: EncoderDecoderCache | None = None,
        need_weights: bool = False,
    ) -> Attended:
        def compute() -> KeyValues:
            keys, values = self.key_values(source)
            return repeat_rows(keys, x.shape[0]), repeat_rows(values, x.shape[0])

        key_values = cross_key_values(past_key_values, self.layer_idx, x.device, compute)
        return self.attend(self.queries(x), key_values, pattern, need_weights)


class T5GemmaEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and FFN. Also returns its keys and values, which a layerwise decoder attends to."""

    def __init__(self, config: StackConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = T5GemmaSelfAttention(config, layer_idx)
        self.pre_self_attn_layernorm = norm(config, config.hidden_size)
        self.post_self_attn_layernorm = post_norm(config)
        self.mlp = GatedMLP(config)
        self.pre_feedforward_layernorm = norm(config, config.hidden_size)
        self.post_feedforward_layernorm = post_norm(config)
        self.dropout = dropout(config.dropout_rate)

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope,
        pattern: AttentionPattern,
        need_weights: bool = False,
        key_values_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        if key_values_only:
            return x, None, *self.self_attn.rotated_key_values(self.pre_self_attn_layernorm(x), rope)
        hidden, weights, keys, values = self.self_attn(
            self.pre_self_attn_layernorm(x), rope, pattern, need_weights=need_weights
        )
        x = x + self.dropout(self.post_self_attn_layernorm(hidden))
        x = x + self.dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        return x, weights, keys, values


class T5GemmaDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, separate cross-attention, FFN."""

    def __init__(self, config: StackConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = T5GemmaSelfAttention(config, layer_idx)
        self.pre_self_attn_layernorm = norm(config, config.hidden_size)
        self.post_self_attn_layernorm = post_norm(config)
        self.cross_attn = T5GemmaCrossAttention(config, layer_idx)
        self.pre_cross_attn_layernorm = norm(config, config.hidden_size)
        self.post_cross_attn_layernorm = post_norm(config)
        self.mlp = GatedMLP(config)
        self.pre_feedforward_layernorm = norm(config, config.hidden_size)
        self.post_feedforward_layernorm = post_norm(config)
        self.dropout = dropout(config.dropout_rate)

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope,
        own_pattern: AttentionPattern,
        source_pattern: AttentionPattern,
        source: torch.Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden, weights, *_ = self.self_attn(
            self.pre_self_attn_layernorm(x), rope, own_pattern, None, past_key_values, need_weights
        )
        x = x + self.dropout(self.post_self_attn_layernorm(hidden))
        hidden, cross_weights = self.cross_attn(
            self.pre_cross_attn_layernorm(x), source, source_pattern, past_key_values, need_weights
        )
        x = x + self.dropout(self.post_cross_attn_layernorm(hidden))
        x = x + self.dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        return x, weights, cross_weights


class LayerwiseDecoderLayer(T5GemmaEncoderLayer):
    """A decoder layer without cross-attention weights: in one softmax it attends to a paired encoder layer's keys and
    values and to its own. Those of the source are not needed once they are cached."""

    without_source = T5GemmaEncoderLayer.forward

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        rope: Rope,
        pattern: AttentionPattern,
        source_keys: torch.Tensor | None,
        source_values: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        def compute() -> KeyValues:
            assert source_keys is not None and source_values is not None, "nothing is cached yet"
            return repeat_rows(source_keys, x.shape[0]), repeat_rows(source_values, x.shape[0])

        source = cross_key_values(past_key_values, self.self_attn.layer_idx, x.device, compute)
        hidden, weights, *_ = self.self_attn(
            self.pre_self_attn_layernorm(x), rope, pattern, source, past_key_values, need_weights
        )
        x = x + self.dropout(self.post_self_attn_layernorm(hidden))
        x = x + self.dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        # One softmax spans both: its part over the source is what other models call cross-attention.
        return x, weights, None if weights is None else weights[..., : source[0].shape[2]]


DECODER_LAYERS: dict[str, Callable[[StackConfig, int], nn.Module]] = {
    "separate": T5GemmaDecoderLayer,
    "layerwise": LayerwiseDecoderLayer,
}


def repeat_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Serve several consecutive decoder rows (beams, samples of one prompt) from each encoder row.

    Raises:
        ValueError: ``rows`` is no multiple of the rows there are.
    """
    if x.shape[0] in (1, rows) or rows % x.shape[0] == 0:
        return x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], dim=0)
    raise ValueError(
        f"The decoder has {rows} rows and the encoder {x.shape[0]}: each encoder row serves the same number of "
        "consecutive decoder rows, so the first has to be a multiple of the second."
    )
