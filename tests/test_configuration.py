from __future__ import annotations

import pytest
import torch
from transformers import T5GemmaConfig as StockConfig

import modeling_t5gemma as m
from modeling_t5gemma.configuration_t5gemma import RELEASED_PAIRS, STACK_PRESETS
from tests.tiny import BALANCED

# The totals of the eight released checkpoints.
PARAMETERS = {
    "s-s": 312_517_632,
    "b-b": 591_490_560,
    "l-l": 1_241_761_792,
    "ml-ml": 2_200_345_344,
    "xl-xl": 3_766_980_608,
    "2b-2b": 5_596_853_760,
    "9b-2b": 12_292_375_296,
    "9b-9b": 20_333_401_088,
}


@pytest.mark.parametrize("pair", RELEASED_PAIRS)
def test_parameter_totals_of_the_released_pairs(pair):
    with torch.device("meta"):
        model = m.T5GemmaForConditionalGeneration(m.T5GemmaConfig.from_preset(pair))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[pair]


def test_presets_pair_freely_and_name_what_is_allowed():
    config = m.T5GemmaConfig.from_preset("27b-9b", vocab_size=1000)
    assert (config.encoder.hidden_size, config.decoder.hidden_size) == (4608, 3584)
    assert config.vocab_size == config.encoder.vocab_size == config.decoder.vocab_size == 1000
    assert config.decoder.cross_attention_hidden_size == 4608
    for wrong in ("2b", "2b-3b", "2b-2b-2b", ""):
        with pytest.raises(ValueError, match=r"ENCODER-DECODER.*27b"):
            m.T5GemmaConfig.from_preset(wrong)


def test_t5gemma_is_stock_key_for_key(tmp_path):
    ours = m.T5GemmaConfig.from_preset("9b-2b")
    stock = StockConfig(encoder=STACK_PRESETS["9b"], decoder=STACK_PRESETS["2b"])
    assert ours.to_dict() == stock.to_dict()
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "stock/config.json").read_text() == (tmp_path / "ours/config.json").read_text()
    assert m.T5GemmaConfig.from_pretrained(tmp_path / "stock").to_dict() == stock.to_dict()
    assert StockConfig.from_pretrained(tmp_path / "ours").to_dict() == stock.to_dict()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cross_attention_type": "layerwise"},
        {"share_embeddings": True},
        {"encoder": {"qk_norm": True}},
        {"encoder": {"bidirectional_layers": "none"}},
        {"decoder": {"norm_placement": "pre"}},
        {"decoder": {"scale_embeddings": False}},
    ],
)
def test_t5gemma_refuses_what_stock_would_ignore(kwargs):
    with pytest.raises(ValueError, match="AdaptedSeq2SeqConfig"):
        m.T5GemmaConfig(**kwargs)


def test_a_stack_cannot_have_its_own_dropout():
    with pytest.raises(ValueError, match=r"set dropout_rate on T5GemmaConfig"):
        m.T5GemmaConfig(encoder={"dropout_rate": 0.1})
    assert m.T5GemmaConfig(encoder={"dropout_rate": 0.1}, dropout_rate=0.1).decoder.dropout_rate == 0.1


def test_constructors_leave_the_callers_objects_alone():
    stack = m.T5GemmaModuleConfig(**BALANCED)
    before = stack.to_dict()
    config = m.T5GemmaConfig(encoder=stack, decoder=stack)
    assert stack.to_dict() == before and config.decoder.is_decoder and not config.encoder.is_decoder
    before = config.to_dict()
    m.T5GemmaEncoderModel(config)
    m.T5GemmaForSequenceClassification(config, is_encoder_decoder=False)
    assert config.to_dict() == before


def test_adapted_config_survives_saving(tmp_path):
    config = m.AdaptedSeq2SeqConfig(
        encoder={"num_hidden_layers": 4, "bidirectional_layers": [1, 3]},
        decoder={"num_hidden_layers": 2},
        cross_attention_type="layerwise",
        cross_attention_map=[1, 3],
    )
    config.save_pretrained(tmp_path)
    again = m.AdaptedSeq2SeqConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.encoder.cross_attention_map == again.decoder.cross_attention_map == [1, 3]


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"qk_norm": False, "norm_unit_offset": False}, "No supported family combines"),
        ({"norm_placement": "post"}, "No supported family combines"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"bidirectional_layers": [18]}, "from 0 to 17"),
        ({"bidirectional_layers": "some"}, "'all', 'none' or a list"),
        ({"layer_types": ["sliding_attention"] * 18}, "sliding_window has to be a positive"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type of full"),
    ],
)
def test_stacks_that_cannot_be_built_are_refused(stack, message):
    with pytest.raises(ValueError, match=message):
        m.AdaptedSeq2SeqModuleConfig(**stack)


@pytest.mark.parametrize(
    ("encoder", "decoder", "kwargs", "message"),
    [
        ({}, {"num_hidden_layers": 6}, {}, "give cross_attention_map"),
        ({}, {"num_key_value_heads": 2}, {}, "num_key_value_heads has to be equal"),
        ({}, {"head_dim": 64}, {}, "head_dim has to be equal"),
        ({}, {}, {"cross_attention_map": [18] * 18}, "from 0 to 17"),
        (
            {"layer_types": ["sliding_attention"] * 18, "sliding_window": 8},
            {"sliding_window": 8},
            {},
            "paired layers of one kind",
        ),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {}, "one RoPE"),
    ],
)
def test_layerwise_pairs_that_cannot_share_keys_are_refused(encoder, decoder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        m.AdaptedSeq2SeqConfig(encoder=encoder, decoder=decoder, cross_attention_type="layerwise", **kwargs)


def test_other_refusals_of_a_pair():
    with pytest.raises(ValueError, match="'separate', 'layerwise'"):
        m.AdaptedSeq2SeqConfig(cross_attention_type="merged")
    with pytest.raises(ValueError, match="leave it out"):
        m.AdaptedSeq2SeqConfig(cross_attention_map=[0] * 18)
    with pytest.raises(ValueError, match="equal vocabularies and widths"):
        m.AdaptedSeq2SeqConfig(decoder={"hidden_size": 320}, share_embeddings=True)


@pytest.mark.parametrize("make", [m.T5GemmaConfig, m.AdaptedSeq2SeqConfig])
def test_what_is_passed_down_follows_what_is_set(make, tmp_path):
    stack = BALANCED if make is m.T5GemmaConfig else {**BALANCED, "qk_norm": False}
    config = make(encoder=dict(stack), decoder=dict(stack))
    config.save_pretrained(tmp_path)
    loaded = make.from_pretrained(tmp_path, dropout_rate=0.1, attention_dropout=0.2)
    config.dropout_rate, config.attention_dropout = 0.1, 0.2
    for pair in (config, loaded):
        for each in (pair, pair.encoder, pair.decoder):
            assert (each.dropout_rate, each.attention_dropout) == (0.1, 0.2)
    assert config.to_dict() == make(**config.to_dict()).to_dict()
