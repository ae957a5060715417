"""Gemma 2: norms before and after each sublayer, softcaps, sliding and full attention in turn. T5Gemma's own block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling_t5gemma.configuration_t5gemma import FAMILY_SWITCHES
from modeling_t5gemma.conversion.families.gemma import GEMMA_TERMS, LEFT_OUT
from modeling_t5gemma.conversion.family import (
    GGUF_PROJECTIONS,
    OUTPUT_HEAD,
    PROJECTIONS,
    Family,
    GgufLayout,
    common_gguf_config,
    common_stack_fields,
)

# The one size whose attention is scaled by hidden_size / num_attention_heads rather than by head_dim.
_LAYERS_OF_27B = 46


def stack_fields(config: Any) -> dict[str, Any]:
    return {
        **common_stack_fields(config),
        "hidden_activation": config.hidden_activation,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "final_logit_softcapping": config.final_logit_softcapping,
        "attn_logit_softcapping": config.attn_logit_softcapping,
    }


def gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    fields = common_gguf_config(metadata, "gemma2")
    is_27b = fields["num_hidden_layers"] == _LAYERS_OF_27B
    return {
        **fields,
        # The file does not say how attention is scaled; llama.cpp tells by the number of layers, and so do we.
        "query_pre_attn_scalar": (
            fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
        ),
        "sliding_window": metadata.get("gemma2.attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.get("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("gemma2.final_logit_softcapping", 30.0),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("gemma2.rope.freq_base", 10000.0)},
    }


FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    aliases={f"{size}{kind}": f"google/gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("", "-it")},
    switches=FAMILY_SWITCHES["gemma2"],
    stack_fields=stack_fields,
    prefixes=("model.", ""),
    tensors={
        "embed_tokens.weight": "embed_tokens.weight",
        "norm.weight": "norm.weight",
        "lm_head.weight": OUTPUT_HEAD,
        **PROJECTIONS,
        "layers.{i}.input_layernorm.weight": "layers.{i}.pre_self_attn_layernorm.weight",
        "layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_self_attn_layernorm.weight",
        "layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
        "layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.post_feedforward_layernorm.weight",
    },
    left_out=LEFT_OUT,
    tokenizer_class="GemmaTokenizer",
    legal=GEMMA_TERMS,
    gguf=GgufLayout(
        architecture="gemma2",
        tensors={
            "token_embd.weight": "embed_tokens.weight",
            "output_norm.weight": "norm.weight",
            "output.weight": OUTPUT_HEAD,
            **GGUF_PROJECTIONS,
            "blk.{i}.attn_norm.weight": "layers.{i}.pre_self_attn_layernorm.weight",
            "blk.{i}.post_attention_norm.weight": "layers.{i}.post_self_attn_layernorm.weight",
            "blk.{i}.ffn_norm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
            "blk.{i}.post_ffw_norm.weight": "layers.{i}.post_feedforward_layernorm.weight",
        },
        added_to_norms=1.0,
        config=gguf_config,
    ),
)
