"""Steps of decoding: a cache that grows in place is the cache that copies, and a step masks only what has to be."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from modeling_t5gemma.attention import attention
from modeling_t5gemma.cache import ROOM, GrowingLayer, GrowingSlidingLayer, fitted, new_cache
from modeling_t5gemma.masks import AttentionPattern
from tests.tiny import gemma3, layerwise, padded, t5gemma, tokens

WINDOW = 6
LAYERS = {
    "whole": (GrowingLayer, DynamicLayer, {}),
    "sliding": (GrowingSlidingLayer, DynamicSlidingWindowLayer, {"sliding_window": WINDOW}),
}
MAKE = {"separate": t5gemma, "layerwise": lambda: layerwise(gemma3(), bidirectional_layers="all")}


@pytest.fixture(scope="module", params=MAKE)
def model(request):
    torch.manual_seed(0)
    return MAKE[request.param]()


def states(rows: int, length: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, 4, **kwargs), torch.randn(rows, 2, length, 4, **kwargs)


def same(layers, rows: int, length: int) -> None:
    """Both layers return and keep the same after the same new tokens."""
    new = states(rows, length)
    for got, expected in zip(*(layer.update(*new) for layer in layers), strict=True):
        assert torch.equal(got, expected)
    assert layers[0].get_mask_sizes(1) == layers[1].get_mask_sizes(1)
    kept(layers)


def kept(layers) -> None:
    ours, stock = layers
    assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    assert ours.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize("records_past", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("seed", range(5))
def test_a_growing_layer_is_transformers_own(kind, records_past, seed):
    """Any order of what generate does to a layer: tokens, beams, rejected candidates, and what else there is."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    ours, stock, kwargs = LAYERS[kind]
    layers = (ours(**kwargs), stock(**kwargs))
    rows = 2
    if records_past and kind == "sliding":
        for layer in layers:
            layer.activate_past_recording()
    same(layers, rows, 3)
    for _ in range(60):
        match draw.choice(["tokens", "tokens", "tokens", "beams", "crop", "repeat", "select", "replace", "reset"]):
            case "tokens":
                same(layers, rows, draw.choice([1, 1, 1, 5]))
            case "beams":
                order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
                for layer in layers:
                    layer.reorder_cache(order)
            case "crop" if kind == "whole" or records_past:
                removed = draw.randrange(min(3, layers[1].keys.shape[2]))
                for layer in layers:
                    layer.crop(-removed)
            case "repeat" if rows < 4:
                rows *= 2
                for layer in layers:
                    layer.batch_repeat_interleave(2)
            case "select" if rows > 2:
                rows = 2
                for layer in layers:
                    layer.batch_select_indices(torch.tensor([0, 3]))
            case "replace":
                for layer in layers:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            case "reset" if draw.random() < 0.2:
                for layer in layers:
                    layer.reset()
                same(layers, rows, 2)
        kept(layers)


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_are_added_in_place(kind):
    ours, _, kwargs = LAYERS[kind]
    layer = ours(**kwargs)
    places = []
    for _ in range(1 + ROOM):
        keys, values = layer.update(*states(1, 1))
        places.append((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
    assert len(set(places)) == 1
    layer.update(*states(1, 1))
    assert layer.keys.untyped_storage().data_ptr() != places[0][0]


def test_what_a_backward_pass_reads_is_not_written_over():
    layer = GrowingLayer()
    first = states(1, 2, requires_grad=True)
    keys, _ = layer.update(*first)
    loss = (keys**2).sum()
    layer.update(*states(1, 1, requires_grad=True))
    loss.backward()
    torch.testing.assert_close(first[0].grad, 2 * first[0].detach())


def test_generate_grows_in_place(model):
    expected = {"sliding_attention": GrowingSlidingLayer, "full_attention": GrowingLayer}
    output = model.generate(tokens(1, 5), max_new_tokens=3, return_dict_in_generate=True)
    for cache in (output.past_key_values, new_cache(model.config.decoder)):
        types = [type(layer) for layer in cache.self_attention_cache.layers]
        assert types == [expected[kind] for kind in model.config.decoder.layer_types]


def test_a_layer_in_use_is_left_alone(model):
    config = model.config.decoder
    own = DynamicCache(config=config)
    own.update(*states(1, 1), 1)
    before = own.layers[1]
    cache = fitted(EncoderDecoderCache(own, DynamicCache(config=config)), config, 5)
    assert cache.self_attention_cache.layers[1] is before
    assert not any(cache.cross_attention_cache.is_sliding)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
def test_steps_are_the_whole_at_once(model, side, kwargs):
    """The tokens of cached steps are those of calls without a cache, which the whole target goes through at once;
    longer than the windows."""
    ids, mask = tokens(3, 24), torch.ones(3, 24, dtype=torch.long)
    if side != "none":
        ids, mask = padded(ids, [24, 5, 17], side, 24)
    # Without a cache, a padding token in the target is taken for one.
    given = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None, "suppress_tokens": [0], **kwargs}
    plain = {name: value for name, value in given.items() if name != "cache_implementation"}
    outputs = []
    for arguments in (given, {**plain, "use_cache": False}):
        torch.manual_seed(5)
        outputs.append(model.generate(ids, **arguments))
    assert len(outputs[0].unique()) > 5
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_step_without_padding_builds_no_mask(monkeypatch):
    """Of a separate decoder, as its source has no window; not before the window is full, nor after."""
    model = t5gemma()
    built = []
    original = AttentionPattern._build_visible
    monkeypatch.setattr(AttentionPattern, "_build_visible", lambda pattern: built.append(pattern) or original(pattern))
    ids = tokens(2, 20)
    encoded = model.get_encoder()(input_ids=ids)
    built.clear()
    common = {"max_new_tokens": 30, "eos_token_id": None}
    model.generate(encoder_outputs=encoded, attention_mask=torch.ones_like(ids), **common)
    assert not built
    _, mask = padded(ids, [20, 9], "left", 20)
    model.generate(encoder_outputs=encoded, attention_mask=mask, **common)
    assert len(built) == 30, "one a step, which all layers share"


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "blocked", "dense"])
@pytest.mark.parametrize("queries", [1, 7])
def test_keys_in_two_places_are_keys_in_one(backend, queries):
    index = torch.arange(queries)[None] + 20 - queries
    pattern = AttentionPattern(index, torch.arange(20)[None], causal=True, window=9)
    q, (k, v) = torch.randn(2, 4, queries, 4), states(2, 20)
    kwargs = {"backend": backend, "scale": 0.5}
    expected, _ = attention(q, k, v, pattern, **kwargs)
    source, own = ((k[:, :, part], v[:, :, part]) for part in (slice(0, 13), slice(13, None)))
    got, _ = attention(q, *own, pattern, before=source, **kwargs)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
