"""Packed models compute what they did, 8 bits what the integers say, and nothing else is done with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modeling_t5gemma.commands.generate import generate
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference import packing
from modeling_t5gemma.inference.packing import (
    NarrowLinear,
    PackedHead,
    PackedLinear,
    PackedNorm,
    QuantizedLinear,
    multiplies,
    pack_weights,
)
from modeling_t5gemma.layers import LMHead, RMSNorm
from modeling_t5gemma.lora import lora_config
from tests.inference.conftest import MAKE as CHECKPOINTS
from tests.tiny import gemma3, layerwise, padded, t5gemma, tokens

MAKE = {"separate": t5gemma, "layerwise": lambda: layerwise(gemma3(), bidirectional_layers="all")}
MODES = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "top_k": 20},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
]

INT8 = [
    pytest.param(
        QuantizedLinear,
        127,
        marks=pytest.mark.skipif(
            not multiplies(QuantizedLinear, torch.float32), reason="the processor has no products of 8-bit integers"
        ),
    ),
    pytest.param(NarrowLinear, 63),
]


@pytest.fixture(scope="module", params=MAKE)
def model(request):
    torch.manual_seed(0)  # whichever test comes first
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def same(model):
    """The model, packed."""
    return packed(model)


def packed(model, **kwargs):
    return pack_weights(copy.deepcopy(model), **kwargs)


def linear(*shape: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(*shape, bias=bias).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
def test_packed_tokens_are_the_same(model, same, side, kwargs):
    """Beyond the windows of 16 (separate) and 6 (layerwise)."""
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 3
    ids, mask = tokens(rows, 24), torch.ones(rows, 24, dtype=torch.long)
    if side != "none":
        ids, mask = padded(ids, [19, 5, 17][:rows], side, 24)
    outputs = []
    for each in (model, same):
        torch.manual_seed(5)
        outputs.append(each.generate(ids, attention_mask=mask, max_new_tokens=30, eos_token_id=None, **kwargs))
    assert len(outputs[0].unique()) > 5
    assert torch.equal(*outputs)


@torch.no_grad()
def test_packed_logits_and_losses_are_the_same(model, same):
    batch = {"input_ids": tokens(2, 30), "labels": tokens(2, 20, seed=1)}
    expected, got = (each(**batch, output_hidden_states=True) for each in (model, same))
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.loss, expected.loss)
    for mine, theirs in zip(got.decoder_hidden_states, expected.decoder_hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.skipif(
    not multiplies(PackedLinear, torch.bfloat16), reason="the processor has no products of packed bfloat16"
)
def test_bfloat16_is_no_further_from_float32_when_packed(model):
    batch = {"input_ids": tokens(2, 30), "decoder_input_ids": tokens(2, 20, seed=1)}
    exact = model(**batch).logits
    rounded = copy.deepcopy(model).bfloat16()
    errors = [(each(**batch).logits.float() - exact).std() for each in (rounded, packed(rounded))]
    assert 0 < errors[1] < 1.2 * errors[0]
    assert packed(rounded).generate(tokens(2, 9), num_beams=2, max_new_tokens=5).shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("pack, largest", INT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_stay_near(model, dtype, pack, largest, monkeypatch):
    """Weights of a tiny random model round to 1 part in 100; its layers carry that to the logits."""
    monkeypatch.setattr(packing, "QuantizedLinear", pack)
    batch = {"input_ids": tokens(4, 30), "decoder_input_ids": tokens(4, 20, seed=1)}
    expected, got = model(**batch).logits, packed(copy.deepcopy(model).to(dtype), int8=True)(**batch).logits.float()
    assert torch.isfinite(got).all()
    assert 0 < (got - expected).std() < 0.12 * expected.std()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.75


@torch.no_grad()
@pytest.mark.parametrize("pack, largest", INT8)
def test_8_bit_products_are_those_of_the_integers(pack, largest):
    layers = [linear(96, 40), linear(96, 24)]
    x = torch.randn(5, 3, 96)
    got = pack(*layers)(x)
    weight = torch.cat([layer.weight for layer in layers])
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    x_scale = x.abs().amax(-1, keepdim=True) / largest
    q_w, q_x = (weight / w_scale).round().double(), (x / x_scale + 0.5).floor().double()
    expected = (q_x @ q_w.T) * x_scale * w_scale[:, 0]
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    assert q_x.abs().max() == largest and q_w.abs().max() == 127
    # Half a step of rounding on either side.
    bound = (x_scale / 2) @ weight.abs().sum(1)[None] + x.abs().sum(-1, keepdim=True) @ (w_scale.T / 2)
    assert ((got - x @ weight.T).abs() <= bound + 96 * x_scale * w_scale.T / 4 + 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("pack, largest", INT8)
def test_8_bit_sums_are_not_cut_off(pack, largest):
    """Two products of the largest integers are above 16 bits where states have 8."""
    layer = linear(256, 8)
    layer.weight.copy_(torch.tensor([1.0, -1.0] * 4)[:, None])
    torch.testing.assert_close(pack(layer)(torch.ones(1, 256)), torch.tensor([[256.0, -256.0] * 4]))


@torch.no_grad()
@pytest.mark.parametrize("pack, largest", INT8)
def test_8_bit_rows_do_not_depend_on_their_batch_and_nothing_is_nothing(pack, largest):
    layer = pack(linear(64, 32))
    x = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    together = layer(x)
    for row in range(8):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 32))


@torch.no_grad()
@pytest.mark.parametrize("pack, largest", [(PackedLinear, None), *INT8])
def test_a_bias_is_added(pack, largest):
    layers = [linear(16, 24, bias=True), linear(16, 8, bias=True)]
    x = torch.randn(2, 5, 16)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(pack(*layers)(x), expected, atol=3 / largest if largest else 1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("unit_offset", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_norm_is_the_norm(dtype, unit_offset):
    norm = RMSNorm(24, 1e-2, unit_offset).to(dtype)
    norm.weight.copy_(torch.randn(24))
    x = (torch.randn(6, 24) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    x[0] = 0
    got = PackedNorm(packing._gain(norm), norm.eps)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, norm(x), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)


@torch.no_grad()
def test_a_packed_head_caps_as_the_head_does(model):
    head = LMHead(copy.deepcopy(t5gemma().config.decoder))
    x = torch.randn(3, 32) * torch.logspace(-3, 2, 3)[:, None]
    torch.testing.assert_close(PackedHead(head, PackedLinear)(x), head(x), atol=2e-6, rtol=0)


@torch.no_grad()
def test_embeddings_stay_and_nothing_else_has_parameters(model):
    made = packed(model, int8=True)
    assert {name for name, _ in made.named_parameters()} == {
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }
    assert torch.equal(made.model.decoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight)
    assert made.dtype == torch.float32 and made.device.type == "cpu"


def test_what_cannot_be_packed_is_refused(model):
    from peft import get_peft_model

    cases = {
        "only an encoder-decoder": gemma3(),
        "q_proj is not .* adapter": get_peft_model(copy.deepcopy(model), lora_config(r=2)).get_base_model(),
        "float16 Tensor on cpu": copy.deepcopy(model).half(),
        "float32 Tensor on meta": copy.deepcopy(model).to("meta"),
        "is not .* packed already": packed(model),
    }
    for reason, case in cases.items():
        with pytest.raises(UserError, match=reason):
            pack_weights(case)


def test_a_processor_that_cannot_is_told_apart(model, monkeypatch):
    class Saturating(QuantizedLinear):
        def forward(self, x):
            return super().forward(x).clamp(max=60.0)

    class Missing(PackedLinear):
        def __init__(self, *layers):
            raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(packing, "QuantizedLinear", Saturating)
    monkeypatch.setattr(packing, "NarrowLinear", Missing)
    monkeypatch.setattr(packing, "PackedLinear", Missing)
    for int8, what in ((True, "8-bit integers"), (False, "torch.float32")):
        before = copy.deepcopy(model)
        with pytest.raises(UserError, match=f"cannot multiply .*{what}"):
            pack_weights(before, int8=int8)
        assert before.state_dict().keys() == model.state_dict().keys(), "left as it was"


def test_a_packed_model_is_not_saved_and_not_trained(model, tmp_path):
    made = packed(model)
    with pytest.raises(UserError, match="cannot be saved"):
        made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be saved"):
        made.state_dict()
    loss = made(input_ids=tokens(1, 4), labels=tokens(1, 4)).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("kind", ["separate", "layerwise"])
def test_the_command_packs(kind, checkpoints, invoke):
    texts = "the cat\nthe man that sat on the mat\n"
    few = ("--max-new-tokens", 8, "--quiet")
    plain, same, rounded = (
        invoke(generate, checkpoints(kind), "--weights", weights, *few, input=texts)
        for weights in ("plain", "packed", "int8")
    )
    assert plain.exit_code == same.exit_code == rounded.exit_code == 0, rounded.output
    assert plain.stdout == same.stdout
    assert rounded.stdout.count("\n") == 2


def test_the_command_refuses_a_decoder_only_model(checkpoints, invoke):
    assert "decoder_only" in CHECKPOINTS
    result = invoke(generate, checkpoints("decoder_only"), "--weights", "packed", input="the cat\n")
    assert isinstance(result.exception, UserError) and "only an encoder-decoder" in str(result.exception)
