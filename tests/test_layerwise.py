"""With a causal encoder and the same tokens, a layerwise encoder-decoder is the decoder-only model it came from.

The encoder reads the prompt without its last token, the decoder begins with that token.
"""

from __future__ import annotations

import pytest
import torch

import modeling_t5gemma as m
from modeling_t5gemma.blocks import T5GemmaEncoderLayer
from modeling_t5gemma.masks import AttentionPattern
from tests.selections import pairwise
from tests.tiny import gemma3, layerwise, padded, tokens

BACKENDS = ["eager", "sdpa", "blocked", "flex_attention"]
LENGTHS = [25, 18]
GENERATE = [
    {},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "use_cache": False},
]


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
@pytest.mark.parametrize(("side", "kwargs"), pairwise(["left", "right"], GENERATE, together=1), ids=str)
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


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_layers_keep_what_their_first_target_token_reads(pair, side, kwargs):
    """A window of 6 reads 5 source tokens: more are kept only where a row of the batch is shorter, padding between."""
    _, model = pair
    lengths = [20, 17]
    ids, mask = padded(tokens(2, 20), lengths, side, 20)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=9, return_dict_in_generate=True, do_sample=False, **kwargs
    )
    kept = 5 if side == "left" else 5 + 20 - 17
    held = [layer.keys.shape[2] for layer in out.past_key_values.cross_attention_cache.layers]
    assert held == [kept if kind == "sliding_attention" else 20 for kind in model.config.decoder.layer_types]
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids=tokens(2, 20)[row : row + 1, :length], max_new_tokens=9, **kwargs)
        assert alone[0].tolist() == out.sequences[row][: alone.shape[1]].tolist()


@torch.no_grad()
def test_the_encoder_ends_where_nothing_more_is_read(pair):
    source, _ = pair
    model = layerwise(source, cross_attention_map=[0, 1, 2, None], bidirectional_layers="all")
    encoder, ids = model.get_encoder(), tokens(2, 20)
    whole, read = encoder(input_ids=ids), encoder(input_ids=ids, source_only=True)
    assert read.last_hidden_state.shape == (2, 20, 0) and read.key_values[3] is None
    for kind, ours, all_of_it in zip(model.config.encoder.layer_types, read.key_values[:3], whole.key_values):
        for one, other in zip(ours, all_of_it, strict=True):
            assert one.shape[2] == (5 if kind == "sliding_attention" else 20)
            torch.testing.assert_close(one, other[:, :, -one.shape[2] :], atol=0, rtol=0)
    decoder = tokens(2, 4, seed=1)
    expected = model(encoder_outputs=whole, decoder_input_ids=decoder).logits
    got = model(encoder_outputs=read, decoder_input_ids=decoder).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    asked = encoder(input_ids=ids, source_only=True, output_hidden_states=True)
    torch.testing.assert_close(asked.last_hidden_state, whole.last_hidden_state, atol=0, rtol=0)
    assert len(asked.hidden_states) == 5
    generated = model.generate(
        input_ids=ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
    )
    assert generated.encoder_hidden_states[-1].shape == (2, 20, 32)


@torch.no_grad()
def test_a_layer_without_a_source_reads_its_first_token(pair):
    """By hand: <bos> goes through the decoder alone, at position 0; its keys stand before the layer's own."""
    source, _ = pair
    model = layerwise(source, cross_attention_map=[0, None, 2, None])
    ids, targets = tokens(1, 9), tokens(1, 4, seed=1)
    ids[0, 0] = bos = model.config.decoder.bos_token_id
    got = model(input_ids=ids, decoder_input_ids=targets, use_cache=False).logits
    encoded, decoder = model.get_encoder()(input_ids=ids), model.model.decoder
    anchor, x = decoder.embed(torch.tensor([[bos]]), None), decoder.embed(targets, None)
    first, positions = torch.zeros(1, 1, dtype=torch.long), torch.arange(4)[None] + 9
    for layer, kind, paired in zip(
        decoder.layers, model.config.decoder.layer_types, model.config.cross_attention_map, strict=True
    ):
        window = 6 if kind == "sliding_attention" else None
        keys = torch.arange(9)[None] if paired is not None else positions[:, :1] - 1
        pattern = AttentionPattern(positions, torch.cat([keys, positions], dim=1), True, window)
        alone = T5GemmaEncoderLayer.forward(
            layer, anchor, decoder.ropes(x, first)[kind], AttentionPattern(first, first)
        )
        read = alone[2:] if paired is None else encoded.key_values[paired]
        x, *_ = layer(x, decoder.ropes(x, positions)[kind], pattern, *read)
        anchor = alone[0]
    torch.testing.assert_close(got, model.lm_head(decoder.norm(x)), atol=1e-5, rtol=0)
    # Step by step with a cache, and packed beside another document.
    text = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    logits = model(input_ids=ids, decoder_input_ids=text[:, :-1], use_cache=False).logits
    assert logits.argmax(-1)[0].tolist() == text[0, 1:].tolist()
    both = torch.cat([tokens(1, 5, seed=3), ids], dim=1), torch.cat([tokens(1, 6, seed=4), targets], dim=1)
    segments = [torch.tensor([[1] * first + [2] * second]) for first, second in ((5, 9), (6, 4))]
    packed = model(
        both[0],
        decoder_input_ids=both[1],
        segment_ids=segments[0],
        decoder_segment_ids=segments[1],
        use_cache=False,
    )
    torch.testing.assert_close(packed.logits[:, 6:], got, atol=1e-5, rtol=0)
