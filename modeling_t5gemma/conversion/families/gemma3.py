"""Gemma 3: Gemma 2's norms, normed queries and keys, no softcaps, five sliding layers to a full one, two RoPE bases.

Of a multimodal checkpoint only the text stack is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling_t5gemma.configuration_t5gemma import FAMILY_SWITCHES
from modeling_t5gemma.conversion.families import gemma2
from modeling_t5gemma.conversion.families.gemma import GEMMA_TERMS, LEFT_OUT
from modeling_t5gemma.conversion.family import Family, GgufLayout, common_gguf_config

# The one size whose attention is scaled by hidden_size / num_attention_heads rather than by head_dim.
_LAYERS_OF_27B = 62


def gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    fields = common_gguf_config(metadata, "gemma3")
    is_27b = fields["num_hidden_layers"] == _LAYERS_OF_27B
    full_rope = {"rope_type": "default", "rope_theta": metadata.get("gemma3.rope.freq_base", 1_000_000.0)}
    if metadata.get("gemma3.rope.scaling.type", "none") != "none":
        full_rope["rope_type"] = metadata["gemma3.rope.scaling.type"]
        full_rope["factor"] = metadata["gemma3.rope.scaling.factor"]
    return {
        **fields,
        # The file does not say how attention is scaled; llama.cpp tells by the number of layers, and so do we.
        "query_pre_attn_scalar": (
            fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
        ),
        "sliding_window": metadata.get("gemma3.attention.sliding_window", 1024),
        "final_logit_softcapping": metadata.get("gemma3.final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.get("gemma3.rope.freq_base_swa", 10000.0),
            },
        },
    }


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_type="gemma3_text",
    aliases={
        **{name: f"google/gemma-3-{name}" for name in ("270m", "270m-it", "1b-it", "4b-it", "12b-it", "27b-it")},
        **{name: f"google/gemma-3-{name}-pt" for name in ("1b", "4b", "12b", "27b")},
    },
    switches=FAMILY_SWITCHES["gemma3"],
    stack_fields=gemma2.stack_fields,
    # A text checkpoint, and the two layouts that transformers has written for the multimodal one.
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
    tensors={
        **gemma2.FAMILY.tensors,
        "layers.{i}.self_attn.q_norm.weight": "layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.self_attn.k_norm.weight": "layers.{i}.self_attn.k_norm.weight",
    },
    left_out={
        **LEFT_OUT,
        r"(model\.)?vision_tower\..*": "vision tower",
        r"(model\.)?multi_modal_projector\..*": "projection of images",
    },
    tokenizer_class="GemmaTokenizer",
    legal=GEMMA_TERMS,
    gguf=GgufLayout(
        architecture="gemma3",
        tensors={
            **gemma2.FAMILY.gguf.tensors,
            "blk.{i}.attn_q_norm.weight": "layers.{i}.self_attn.q_norm.weight",
            "blk.{i}.attn_k_norm.weight": "layers.{i}.self_attn.k_norm.weight",
        },
        added_to_norms=1.0,
        config=gguf_config,
    ),
)
