"""What CTranslate2 computes beside the model: where it is the same, and that each limit named is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctranslate2.converters.transformers import T5GemmaLoader

from modeling_t5gemma import T5GemmaConfig
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.exporting import ctranslate2_model
from modeling_t5gemma.exporting.ctranslate2_model import CTranslate2
from modeling_t5gemma.exporting.decoding import Decoding
from modeling_t5gemma.exporting.deviation import Model
from modeling_t5gemma.exporting.formats import Runtime
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.inference.packing import QuantizedLinear, multiplies
from tests import tiny
from tests.exporting.conftest import FULL, STACK, save, source_and_target, untied

SAME = 1e-4


def both(model, folder: Path, quantization: str = "float32", tokenizer: Any = None) -> tuple[Model, Runtime]:
    """A model, and its export as this runtime has it."""
    save(model, folder / "checkpoint", tokenizer)
    (folder / "export").mkdir(parents=True)
    written = load_checkpoint(str(folder / "checkpoint"), dtype="float32")
    decoding = Decoding.of(written, "float32")
    backend = CTranslate2(quantization)
    backend.write(written, folder / "export", decoding)
    found = load_checkpoint(str(folder / "checkpoint"), dtype="float32")  # writing took the first one apart
    return Model(found), backend.load(folder / "export", decoding)


def difference(runtimes: tuple[Model, Runtime], source: list[int], target: list[int]) -> float:
    own, other = (torch.tensor(runtime.log_probs(source, target)) for runtime in runtimes)
    return (own - other).abs().max().item()


def unusual() -> torch.nn.Module:
    """All that could differ from Gemma 2 2B: widths, heads, scale, RoPE, biases, head, and rows without a word."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    changed = {"query_pre_attn_scalar": 3, "vocab_size": tiny.VOCAB + 5, "attention_bias": True, **rope}
    encoder = {**STACK, **changed, "layer_types": FULL, "hidden_size": 48, "num_attention_heads": 6}
    model = untied(encoder, {**STACK, **changed})
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_an_unusual_model_is_the_same_beyond_the_windows_too(tmp_path):
    """Its encoder has full attention, its decoder a window of 8: a long source, and a long text decoded."""
    runtimes = both(unusual(), tmp_path)
    for seed in range(3):
        source, target = source_and_target(20, 8, seed)
        assert difference(runtimes, source, target) < SAME
        own, other = (runtime.greedy(source, 24) for runtime in runtimes)
        assert own == other and len(set(own)) > 2


def test_a_tokenizer_may_know_every_word(tmp_path):
    """As one of bytes does: it has no token for an unknown one."""
    tokenizer = tiny.word_tokenizer()
    tokenizer.unk_token = None
    runtimes = both(tiny.t5gemma(STACK, STACK), tmp_path, tokenizer=tokenizer)
    assert difference(runtimes, *source_and_target(8, 8)) < SAME


@pytest.mark.parametrize("left_out", ["get_model_spec", "get_vocabulary"])
def test_what_the_converter_leaves_out_matters(tmp_path, monkeypatch, left_out):
    """Should CTranslate2 put it right one day, this tells."""
    monkeypatch.setattr(ctranslate2_model._Loader, left_out, getattr(T5GemmaLoader, left_out))
    if left_out == "get_vocabulary":
        with pytest.raises(ValueError, match="vocabulary"):
            both(unusual(), tmp_path)
    else:
        assert difference(both(unusual(), tmp_path), *source_and_target(6, 6)) > 0.1


CAP = {"attn_logit_softcapping": 5.0}
# Changes of the encoder and of the decoder, a case that is the same and one that is not, and what is said of it.
LIMITS = {
    "encoder's window": ({}, {"layer_types": FULL}, (8, 8), (9, 8), "no window.*more than 8 tokens"),
    "decoder's window": ({"layer_types": FULL}, {}, (30, 8), (30, 9), "score_batch has none.*more than 8 tokens"),
    "softcap": ({**CAP}, {**CAP}, None, (4, 4), "not capped at 5"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_where_they_are_said_to_be(tmp_path, name):
    encoder, decoder, same, other, said = LIMITS[name]
    model = tiny.t5gemma({**STACK, **encoder}, {**STACK, **decoder})
    runtimes = both(model, tmp_path)
    if same is not None:
        assert difference(runtimes, *source_and_target(*same)) < SAME
    assert difference(runtimes, *source_and_target(*other)) > 10 * SAME
    limits = CTranslate2("float32").limits(model.config)
    assert any(re.search(said, limit) for limit in limits)


def test_a_model_within_its_limits_has_none_named():
    stack = {**STACK, "layer_types": FULL}
    config = T5GemmaConfig(encoder=dict(stack), decoder=dict(stack))
    assert CTranslate2("float32").limits(config) == []
    assert "float32" in CTranslate2("bfloat16").limits(config)[0]


def test_bfloat16_weights_are_the_rounded_ones(tmp_path):
    """Computed in float32 on a CPU: the same as the model whose weights were rounded, norms with their 1 added."""
    model = tiny.t5gemma(STACK, STACK)
    _, export = both(model, tmp_path, "bfloat16")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1 if "norm" in name else 0
            parameter.copy_((parameter + offset).bfloat16().float() - offset)
    source, target = source_and_target(8, 8)
    losses = model(input_ids=torch.tensor([source]), labels=torch.tensor([target]), return_token_losses=True)
    assert export.log_probs(source, target) == pytest.approx((-losses.token_losses[0]).tolist(), abs=SAME)


WIDE = {**STACK, "hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}


def test_int8_weights_are_a_quarter(tmp_path):
    model = tiny.t5gemma(WIDE, WIDE)
    both(model, tmp_path, "int8")
    stored = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (tmp_path / "export" / "model.bin").stat().st_size < 0.3 * stored


EXACT_IN_8_BITS = multiplies(QuantizedLinear, torch.float32)


def in_8_bits(model: torch.nn.Module) -> torch.nn.Module:
    """The model with integers of 8 bits: weights and embeddings by row, states by token. Without VNNI, the processor
    adds two products of a signed and an unsigned one at a time, in 16 bits that stop at their largest value."""

    def rounded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = values.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (values.detach() / scales).round(), scales

    def linear(module: torch.nn.Linear) -> None:
        weight, scales = rounded(module.weight)

        def forward(x: torch.Tensor) -> torch.Tensor:
            state, size = rounded(x)
            products = (state + 128).unsqueeze(-2) * weight
            if not EXACT_IN_8_BITS:
                products = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
            return (products.sum(-1) - 128 * weight.sum(-1)) * size * scales.squeeze(-1)

        module.forward = forward

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            linear(module)
        elif isinstance(module, torch.nn.Embedding):
            weight, scales = rounded(module.weight)
            module.weight.data = weight * scales
    return model


def test_int8_is_the_model_in_8_bits(tmp_path):
    torch.manual_seed(0)
    own, export = both(tiny.t5gemma(WIDE, WIDE), tmp_path / "one", "int8")
    another, _ = both(tiny.t5gemma(WIDE, WIDE), tmp_path / "another", "int8")
    in_integers = load_checkpoint(str(tmp_path / "one" / "checkpoint"), dtype="float32")
    in_8_bits(in_integers.model)
    source, target = source_and_target(8, 8)
    near, unrounded, far = (
        np.abs(np.subtract(other.log_probs(source, target), export.log_probs(source, target))).mean()
        for other in (Model(in_integers), own, another)
    )
    assert near < far / 20 and near < unrounded
    assert unrounded < far / 4 or not EXACT_IN_8_BITS


def t5gemma_config(**changes) -> T5GemmaConfig:
    return T5GemmaConfig(encoder=dict(STACK), decoder={**STACK, **changes})


SCALED = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
REFUSED = {
    r"layerwise cross-attention.*--format torch or onnx.*--cross-attention copy": lambda: (
        tiny.layerwise(tiny.gemma3()).config
    ),
    "another block or encoder": lambda: tiny.adapted_config(tiny.gemma3(), cross_attention_type="separate"),
    r"RoPE is scaled \(default, linear\)": lambda: t5gemma_config(**SCALED),
    "different rms_norm_eps": lambda: t5gemma_config(rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_it_cannot_represent_is_refused(pattern):
    with pytest.raises(UserError, match=pattern):
        CTranslate2("int8").refuse(REFUSED[pattern](), Path("folder"))
