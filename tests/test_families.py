"""Each row of ``FAMILY_SWITCHES`` against the family itself: a layerwise pair with a causal encoder is its source."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_t5gemma as m
from modeling_t5gemma.configuration_t5gemma import FAMILY_SWITCHES
from tests.tiny import BALANCED, stir, tokens

# The name of the norm before the FFN, which some families call after the one before it.
RENAMED = {"input_layernorm": "pre_self_attn_layernorm", "post_attention_layernorm": "pre_feedforward_layernorm"}
RENAMED_WITH_POST_NORMS = {**RENAMED, "post_attention_layernorm": "post_self_attn_layernorm"}
PLAIN = {name: value for name, value in BALANCED.items() if "softcapping" not in name}
CASES = {
    "gemma": ("gemma", {}, {"query_pre_attn_scalar": 8}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, {}),
    "gemma2 without attention softcap": ("gemma2", {"attn_logit_softcapping": None}, {}),
    "gemma3": ("gemma3_text", {}, {}),
    "llama, mistral": ("llama", {"attention_bias": True}, {"query_pre_attn_scalar": 8, "hidden_activation": "silu"}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, {"hidden_activation": "silu"}),
    "qwen3": ("qwen3", {}, {"hidden_activation": "silu"}),
}


def source_and_pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    model_type, fields, own = CASES[family]
    config = AutoConfig.for_model(model_type, **{**PLAIN, "sliding_window": 6, **fields})
    config.head_dim = 8
    source = stir(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    switches = FAMILY_SWITCHES[family]._asdict()
    softcaps = switches.pop("softcaps_attention")
    names = set(m.AdaptedSeq2SeqModuleConfig.__annotations__) & set(config.to_dict()) - {"is_decoder", "dtype"}
    stack = {name: getattr(config, name) for name in names} | switches | own
    stack["attn_logit_softcapping"] = 5.0 if softcaps else None
    pair = m.AdaptedSeq2SeqForConditionalGeneration(
        m.AdaptedSeq2SeqConfig(
            encoder={**stack, "bidirectional_layers": "none"},
            decoder=stack,
            cross_attention_type="layerwise",
            tie_word_embeddings=False,
        )
    )
    renamed = RENAMED_WITH_POST_NORMS if switches["norm_placement"] == "pre_post" else RENAMED
    weights = {"lm_head.out_proj.weight": source.lm_head.weight}
    for name, tensor in source.model.state_dict().items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        weights |= {f"model.{side}.{name}": tensor for side in ("encoder", "decoder")}
    pair.load_state_dict(weights)
    return source, pair.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_SWITCHES)
def test_a_causal_layerwise_pair_is_its_source(family):
    source, pair = source_and_pair(family)
    ids = tokens(2, 20)
    expected = source(ids).logits[:, 12:]
    got = pair(input_ids=ids[:, :12], decoder_input_ids=ids[:, 12:], use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
