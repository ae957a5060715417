"""With a causal encoder and the same tokens, a layerwise encoder-decoder is the decoder-only model it came from.

The encoder reads the prompt without its last token, the decoder begins with that token.
"""

from __future__ import annotations

import pytest
import torch

import modeling_t5gemma as m
from tests.tiny import gemma3, layerwise, padded, tokens

BACKENDS = ["eager", "sdpa", "blocked", "flex_attention"]
LENGTHS = [25, 18]


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    source = gemma3()
    return source, layerwise(source)


def split(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encoder ids and mask of prompts with LENGTHS tokens, and the tokens from each prompt's last on."""
    encoder, mask = padded(ids, [length - 1 for length in LENGTHS], side, 30)
    decoder = torch.stack([ids[row, length - 1 : length + 11] for row, length in enumerate(LENGTHS)])
    return encoder, mask, decoder


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_the_decoder_only_models(pair, backend, side):
    source, model = pair
    model.set_attn_implementation(backend)
    ids = tokens(2, 40)
    encoder, mask, decoder = split(ids, side)
    got = model(input_ids=encoder, attention_mask=mask, decoder_input_ids=decoder).logits
    reference = source(ids).logits
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(got[row], reference[row, length - 1 : length + 11], atol=2e-5, rtol=0)
    assert reference.std() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
    ],
    ids=str,
)
def test_generated_text_is_the_decoder_only_models(pair, side, kwargs):
    source, model = pair
    model.set_attn_implementation("auto")
    ids = tokens(2, 40)
    encoder, mask, decoder = split(ids, side)
    common = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    got = model.generate(
        encoder, attention_mask=mask, decoder_start_token_id=decoder[:, 0].tolist(), **common, **kwargs
    )
    beams = {key: value for key, value in kwargs.items() if key == "num_beams"}
    assert len(got.unique()) > 5
    for row, length in enumerate(LENGTHS):
        expected = source.generate(ids[row : row + 1, :length], **common, **beams)
        assert torch.equal(got[row, 1:], expected[0, length:])


@torch.no_grad()
@pytest.mark.parametrize("how", ["lookup", "assistant", "itself"])
def test_assisted_text_is_the_decoder_only_models(pair, how):
    source, model = pair
    ids = tokens(1, 21)
    kwargs = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": layerwise(gemma3())},
        "itself": {"assistant_model": model},
    }[how]
    common = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    got = model.generate(ids[:, :20], decoder_start_token_id=ids[0, 20].item(), **common, **kwargs)
    assert torch.equal(got[0, 1:], source.generate(ids, **common)[0, 21:])


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}], ids=str)
def test_decoder_prompts_padded_on_the_left(pair, kwargs):
    source, model = pair
    ids = tokens(2, 30)
    lengths = [3, 6]
    decoder, mask = padded(ids[:, 20:], lengths, "left", 6)
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    got = model.generate(
        ids[:, :20],
        decoder_input_ids=decoder,
        decoder_attention_mask=mask,
        decoder_start_token_id=decoder[:, 0].tolist(),
        **common,
        **kwargs,
    )
    for row, length in enumerate(lengths):
        expected = source.generate(ids[row : row + 1, : 20 + length], **common)
        assert torch.equal(got[row, 6:], expected[0, 20 + length :])


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(pair, backend):
    _, model = pair
    model.set_attn_implementation(backend)
    ids = tokens(2, 30)
    (a, b), pad = ids, torch.zeros(3, dtype=torch.long)
    packed = model(
        input_ids=torch.cat([a[:10], b[:15], pad])[None],
        segment_ids=torch.tensor([[1] * 10 + [2] * 15 + [0] * 3]),
        decoder_input_ids=torch.cat([a[10:16], b[15:24], pad[:2]])[None],
        decoder_segment_ids=torch.tensor([[1] * 6 + [2] * 9 + [0] * 2]),
        use_cache=False,
    ).logits
    alone_a = model(input_ids=a[None, :10], decoder_input_ids=a[None, 10:16]).logits
    alone_b = model(input_ids=b[None, :15], decoder_input_ids=b[None, 15:24]).logits
    torch.testing.assert_close(packed[:, :6], alone_a, atol=2e-5, rtol=0)
    torch.testing.assert_close(packed[:, 6:15], alone_b, atol=2e-5, rtol=0)


@torch.no_grad()
def test_decoder_rows_share_an_encoder_row(pair):
    """Three samples of one prompt: the encoder runs once."""
    _, model = pair
    encoder_outputs = model.get_encoder()(input_ids=tokens(2, 20))
    decoder = tokens(6, 5, seed=1)
    shared = model(encoder_outputs=encoder_outputs, decoder_input_ids=decoder).logits
    repeated = model(input_ids=tokens(2, 20).repeat_interleave(3, 0), decoder_input_ids=decoder).logits
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="multiple of the second"):
        model(encoder_outputs=encoder_outputs, decoder_input_ids=tokens(5, 5))


@torch.no_grad()
def test_a_bidirectional_layer_sees_ahead_and_a_causal_one_does_not(pair):
    source, _ = pair
    ids, changed = tokens(1, 12), tokens(1, 12)
    changed[0, -1] = 3 if ids[0, -1] != 3 else 4
    encode = {}
    for layers in ("none", "all", [2]):
        encoder = layerwise(source, bidirectional_layers=layers).get_encoder()
        before, after = (encoder(input_ids=x, output_hidden_states=True).hidden_states for x in (ids, changed))
        encode[str(layers)] = [not torch.equal(x[0, 6], y[0, 6]) for x, y in zip(before, after, strict=True)]
    # hidden_states[i] is what layer i reads; the last is the final output. Token 11 is within token 6's window of 6.
    assert encode["none"] == [False] * 5
    assert encode["all"] == [False, True, True, True, True]
    assert encode["[2]"] == [False, False, False, True, True]


@torch.no_grad()
def test_a_smaller_decoder_follows_the_map():
    """A decoder of layers 1 and 3 is the source with those layers alone, its encoder keeping all four."""
    torch.manual_seed(0)
    source = gemma3()
    full = layerwise(source)
    config = full.config.to_dict()
    config["decoder"] |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    config["cross_attention_map"] = [1, 3]
    small = m.AdaptedSeq2SeqForConditionalGeneration(m.AdaptedSeq2SeqConfig.from_dict(config)).eval()
    weights = {}
    for name, tensor in full.state_dict().items():
        for kept, layer in enumerate((1, 3)):
            if f"decoder.layers.{layer}." in name:
                weights[name.replace(f"layers.{layer}.", f"layers.{kept}.")] = tensor
        if "decoder.layers." not in name:
            weights[name] = tensor
    small.load_state_dict(weights)
    ids, decoder = tokens(1, 9), tokens(1, 4, seed=1)
    encoded = small.get_encoder()(input_ids=ids)
    swapped = type(encoded)(**{**encoded, "key_values": tuple(reversed(encoded.key_values))})
    got = small(encoder_outputs=encoded, decoder_input_ids=decoder).logits
    assert not torch.allclose(got, small(encoder_outputs=swapped, decoder_input_ids=decoder).logits, atol=1e-3)
    # By hand: the decoder's two layers against key_values 1 and 3.
    x = small.model.decoder.embed(decoder, None)
    positions = torch.arange(4)[None] + 9
    from modeling_t5gemma.masks import AttentionPattern

    pattern = AttentionPattern(positions, torch.arange(13)[None], causal=True)
    rope = small.model.decoder.ropes(x, positions)["full_attention"]
    for layer, paired in zip(small.model.decoder.layers, (1, 3), strict=True):
        x, *_ = layer(x, rope, pattern, *encoded.key_values[paired])
    torch.testing.assert_close(got, small.lm_head(small.model.decoder.norm(x)), atol=1e-6, rtol=0)


def test_gradients_reach_the_encoder_through_keys_and_values(pair):
    source, _ = pair
    for reentrant in (None, False, True):
        model = layerwise(source, bidirectional_layers="all").train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tokens(2, 12), labels=tokens(2, 6, seed=1)).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if reentrant is None:
            plain = gradients
            assert plain["model.encoder.layers.0.self_attn.k_proj.weight"].abs().sum() > 0
            # The last layer's queries and FFN feed nothing: layerwise reads keys and values alone.
            assert "model.encoder.layers.3.mlp.down_proj.weight" not in plain
        else:
            for name, gradient in gradients.items():
                # Reentrant checkpointing gives unused weights a gradient of 0.
                expected = plain.get(name, torch.zeros_like(gradient))
                torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_encoder_outputs_of_another_model_are_refused(pair):
    from transformers.modeling_outputs import BaseModelOutput

    _, model = pair
    with pytest.raises(ValueError, match="this model's own encoder"):
        model(encoder_outputs=BaseModelOutput(torch.zeros(1, 5, 32)), decoder_input_ids=tokens(1, 3))
    with pytest.raises(ValueError, match="only one was given"):
        model(input_ids=tokens(1, 5), segment_ids=torch.ones(1, 5, dtype=torch.long), decoder_input_ids=tokens(1, 3))
    with pytest.raises(ValueError, match="past_key_values to the decoder alone"):
        model.get_encoder()(input_ids=tokens(1, 5), past_key_values=object())
