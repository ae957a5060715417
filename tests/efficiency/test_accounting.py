"""What is calculated from a config, against torch's FLOP counter, real caches, real masks, and the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config, T5Config

import modeling_t5gemma as m
from modeling_t5gemma.efficiency import accounting
from modeling_t5gemma.efficiency.paper import PAPER
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.masks import AttentionPattern
from tests import tiny

INPUT, OUTPUT = 21, 9
PLAIN = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MODELS = {
    "separate": lambda: tiny.t5gemma(dict(tiny.BALANCED, sliding_window=6), dict(tiny.NARROW, sliding_window=5)),
    "layerwise": lambda: tiny.layerwise(tiny.gemma3()),
    "layerwise, ends early": lambda: tiny.layerwise(tiny.gemma3(), cross_attention_map=[0, 1, None, None]),
    "gemma3": tiny.gemma3,
    "gemma": lambda: from_config(GemmaConfig(**PLAIN)),
    "llama": lambda: from_config(LlamaConfig(**{**PLAIN, "head_dim": None}, tie_word_embeddings=False)),
    "qwen3": lambda: from_config(Qwen3Config(**PLAIN)),
}


def from_config(config):
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_cache_of_generating(name):
    """torch's counter over ``generate`` with eager attention, and the cache that is left."""
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    ids = tiny.tokens(1, INPUT)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=OUTPUT,
            max_new_tokens=OUTPUT,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    calculated = accounting.flops(model.config, INPUT, OUTPUT, dense=True)
    # RoPE's frequencies times positions are a product in transformers, and nothing beside the rest.
    assert calculated.total == pytest.approx(counter.get_total_flops(), rel=2e-3)
    if model.config.is_encoder_decoder:
        assert calculated.total == counter.get_total_flops()
    cache = out.past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if model.config.is_encoder_decoder else [cache]
    held = sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)
    assert accounting.cache_bytes(model.config, INPUT, OUTPUT, 4) == held


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model = MODELS[name]()
    counted = accounting.parameters(model.config)
    assert counted.total == model.num_parameters()
    # Everything with a row for each word, tied matrices once.
    of_words = {id(p): p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[0] == tiny.VOCAB}
    assert counted.embeddings == sum(of_words.values())


@given(st.integers(1, 12), st.one_of(st.none(), st.integers(1, 15)), st.booleans())
def test_pairs_are_those_of_the_mask(tokens, window, bidirectional):
    positions = torch.arange(tokens)[None]
    visible = AttentionPattern(positions, positions, not bidirectional, window).visible()
    seen = tokens**2 if visible is None else int(visible.sum())
    assert accounting._pairs(tokens, window, bidirectional) == seen


@given(st.integers(1, 12), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 15)))
def test_layerwise_pairs_are_those_of_the_mask(source, target, window):
    queries, keys = source + torch.arange(target)[None], torch.arange(source)[None]
    visible = AttentionPattern(queries, keys, True, window).visible()
    seen = source * target if visible is None else int(visible.sum())
    assert accounting._joined_pairs(source, target, window) == seen


def test_seen_keys_are_fewer_than_dense_ones():
    config = MODELS["separate"]().config
    seen, dense = (accounting.flops(config, INPUT, OUTPUT, dense=dense) for dense in (False, True))
    assert seen.encoder < dense.encoder
    assert (seen.decoder, seen.cross_attention, seen.head) == (dense.decoder, dense.cross_attention, dense.head)


# The paper


def test_flops_of_the_paper():
    """Within 0.1%, so the ratios between its models too."""
    for name, reported in PAPER.items():
        assert accounting.paper_flops(accounting.preset(name)) == pytest.approx(reported.flops, rel=1e-3), name


def test_what_the_paper_leaves_out():
    """What is run has the decoder-only figures less the heads of the prompt, and cross-attention on top."""
    run = {name: accounting.flops(accounting.preset(name), 4096, 4096) for name in PAPER}
    ratio = {name: each.total / run["gemma2-2b"].total for name, each in run.items()}
    assert ratio["2b-2b"] == pytest.approx(1.13, abs=0.01)
    for name in ("gemma2-2b", "gemma2-9b"):
        reported = accounting.paper_flops(accounting.preset(name))
        stack = accounting.Stack.of(accounting.preset(name))
        assert reported - stack.head(4096) == pytest.approx(run[name].total, rel=1e-3)
    for name in ("2b-2b", "9b-2b", "9b-9b"):
        config = accounting.preset(name)
        encoder = accounting.Stack.of(config.encoder)
        bidirectional = encoder.layers * (4096**2 - 4096 * 4097 // 2)
        explained = run[name].total - run[name].cross_attention - encoder.scores(bidirectional) + encoder.head(4096)
        assert explained == accounting.paper_flops(config)


@pytest.mark.parametrize(("name", "total"), [("2b-2b", 5_596_853_760), ("9b-2b", 12_292_375_296)])
def test_presets_have_the_released_parameters(name, total):
    assert accounting.parameters(accounting.preset(name)).total == total


def test_unknown_presets_are_no_presets():
    assert [accounting.preset(name) for name in ("gemma2", "gemma2-3b", "2b", "2b-3b", "a/2b-2b")] == [None] * 5


# What cannot be counted


def test_unknown_models_are_refused():
    with pytest.raises(UserError, match="is a t5, whose costs are not known"):
        accounting.countable(T5Config(), "a t5")


def test_unknown_layers_are_refused():
    config = tiny.gemma3().config
    config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(UserError, match="kind linear_attention"):
        accounting.flops(config, 4, 4)


def test_a_causal_encoder_has_half_the_scores():
    both, none = (
        accounting.flops(tiny.adapted_config(tiny.gemma3(), bidirectional_layers=layers), 16, 2)
        for layers in ("all", "none")
    )
    assert both.encoder > none.encoder
    assert isinstance(tiny.adapted_config(tiny.gemma3()), m.AdaptedSeq2SeqConfig)
