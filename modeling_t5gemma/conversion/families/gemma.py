"""Gemma 1: a norm before each sublayer and none after, no softcaps, full attention everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling_t5gemma.configuration_t5gemma import FAMILY_SWITCHES
from modeling_t5gemma.conversion.family import (
    GGUF_PROJECTIONS,
    OUTPUT_HEAD,
    PROJECTIONS,
    Family,
    GgufLayout,
    Legal,
    common_gguf_config,
    common_stack_fields,
)

GEMMA_TERMS = Legal(
    license="gemma",
    terms_url="https://ai.google.dev/gemma/terms",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    terms_file="GEMMA_TERMS.md",
)
LEFT_OUT = {
    r".*rotary_emb\.inv_freq": "rotary frequencies, which the config gives",
}


def stack_fields(config: Any) -> dict[str, Any]:
    return {
        **common_stack_fields(config),
        "hidden_activation": config.hidden_act,
        # Gemma 1 divides by sqrt(head_dim) and has no setting for it.
        "query_pre_attn_scalar": config.head_dim,
    }


def gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **common_gguf_config(metadata, "gemma"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("gemma.rope.freq_base", 10000.0)},
    }


FAMILY = Family(
    name="gemma",
    title="Gemma 1",
    architectures=("GemmaForCausalLM",),
    model_type="gemma",
    aliases={name: f"google/gemma-{name}" for name in ("2b", "2b-it", "7b", "7b-it")},
    switches=FAMILY_SWITCHES["gemma"],
    stack_fields=stack_fields,
    prefixes=("model.", ""),
    tensors={
        "embed_tokens.weight": "embed_tokens.weight",
        "norm.weight": "norm.weight",
        "lm_head.weight": OUTPUT_HEAD,
        **PROJECTIONS,
        "layers.{i}.input_layernorm.weight": "layers.{i}.pre_self_attn_layernorm.weight",
        # Despite its name the norm before the MLP; Gemma 2 and 3 give the name to another one.
        "layers.{i}.post_attention_layernorm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
    },
    left_out=LEFT_OUT,
    tokenizer_class="GemmaTokenizer",
    legal=GEMMA_TERMS,
    gguf=GgufLayout(
        architecture="gemma",
        tensors={
            "token_embd.weight": "embed_tokens.weight",
            "output_norm.weight": "norm.weight",
            "output.weight": OUTPUT_HEAD,
            **GGUF_PROJECTIONS,
            "blk.{i}.attn_norm.weight": "layers.{i}.pre_self_attn_layernorm.weight",
            "blk.{i}.ffn_norm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
        },
        added_to_norms=1.0,
        config=gguf_config,
    ),
)
