"""Logits, losses and generated text equal stock transformers' T5Gemma on the same weights, in both directions."""

from __future__ import annotations

import pytest
import torch

import modeling_t5gemma as m
from tests.selections import pairwise
from tests.tiny import BALANCED, NARROW, VOCAB, padded, stock_twin, t5gemma, tokens

PAIRS = {"balanced": (BALANCED, BALANCED), "unbalanced": (BALANCED, NARROW)}
START = 2
GENERATE = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
]


@pytest.fixture(scope="module", params=PAIRS)
def twins(request, tmp_path_factory):
    torch.manual_seed(0)
    ours = t5gemma(*PAIRS[request.param])
    return ours, stock_twin(ours, str(tmp_path_factory.mktemp("twin")))


def decoder_ids(rows: int, length: int) -> torch.Tensor:
    ids = tokens(rows, length, seed=1)
    ids[:, 0] = START
    return ids


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "blocked", "flex_attention"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits(twins, backend, side):
    ours, stock = twins
    ours.set_attn_implementation(backend)
    inputs = {"input_ids": tokens(3, 12), "decoder_input_ids": decoder_ids(3, 14)}
    if side != "none":
        inputs["input_ids"], inputs["attention_mask"] = padded(tokens(3, 12), [12, 5, 9], side, 12)
    got, expected = ours(**inputs).logits, stock(**inputs).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_decoders_window(twins):
    """Longer than the window of 16 in the decoder alone: there stock and the release agree."""
    ours, stock = twins
    inputs = {"input_ids": tokens(2, 12), "decoder_input_ids": decoder_ids(2, 40)}
    torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_encoders_window_is_the_releases(twins):
    """The release sees |q - k| < window; stock's eager path |q - k| <= window. So a stock model whose encoder has a
    window one smaller is ours."""
    ours, stock = twins
    ids, decoder = tokens(2, 40), decoder_ids(2, 6)
    got = ours(input_ids=ids, decoder_input_ids=decoder).logits
    assert (got - stock(input_ids=ids, decoder_input_ids=decoder).logits).abs().max() > 1e-3
    stock.config.encoder.sliding_window -= 1
    try:
        expected = stock(input_ids=ids, decoder_input_ids=decoder).logits
    finally:
        stock.config.encoder.sliding_window += 1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_hidden_states_and_attentions(twins):
    ours, stock = twins
    ours.set_attn_implementation("auto")
    inputs = {"input_ids": tokens(2, 12), "decoder_input_ids": decoder_ids(2, 7)}
    got = ours(**inputs, output_hidden_states=True, output_attentions=True)
    expected = stock(**inputs, output_hidden_states=True, output_attentions=True)
    for name in (
        "encoder_hidden_states",
        "decoder_hidden_states",
        "encoder_attentions",
        "decoder_attentions",
        "cross_attentions",
    ):
        assert len(got[name]) == len(expected[name])
        for ours_layer, stock_layer in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours_layer, stock_layer, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_loss_with_ignored_labels(twins):
    labels = tokens(3, 9, seed=2)
    labels[0, 5:] = -100
    ids, mask = padded(tokens(3, 12), [12, 5, 9], "right", 12)
    got, expected = (model(input_ids=ids, attention_mask=mask, labels=labels) for model in twins)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    # At ignored positions stock has lost the target's padding mask.
    kept = labels != -100
    torch.testing.assert_close(got.logits[kept], expected.logits[kept], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("twins", "side", "kwargs"), pairwise(PAIRS, ["left", "right"], GENERATE), indirect=["twins"], ids=str
)
def test_generate_in_batches(twins, side, kwargs):
    ids, mask = padded(tokens(3, 12), [12, 5, 9], side, 12)
    kwargs = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, **kwargs}
    outputs = []
    for model in twins:
        torch.manual_seed(3)
        outputs.append(model.generate(ids, attention_mask=mask, **kwargs))
    got, expected = outputs
    assert len(expected.unique()) > 5, "the text has to vary, or the comparison says nothing"
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "itself as assistant"])
def test_generate_assisted(twins, how):
    ours, stock = twins
    other = t5gemma(BALANCED, NARROW)
    kwargs = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": other},
        "itself as assistant": {"assistant_model": ours},
    }[how]
    ids = tokens(1, 12)
    common = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **common, **kwargs), stock.generate(ids, **common))


@torch.no_grad()
def test_a_checkpoint_that_stock_wrote(twins, tmp_path):
    _, stock = twins
    stock.save_pretrained(tmp_path)
    again, report = m.T5GemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = {"input_ids": tokens(2, 12), "decoder_input_ids": decoder_ids(2, 7)}
    torch.testing.assert_close(again(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)
    assert again.config.to_dict().keys() == stock.config.to_dict().keys()


@torch.no_grad()
def test_no_mask_given_is_inferred_once_for_both_stacks():
    """Padding in the input without an attention_mask changes nothing (it leaks into upstream's cross-attention)."""
    model = t5gemma()
    ids, mask = padded(tokens(2, 12), [12, 6], "right", 12)
    decoder = decoder_ids(2, 7)
    inferred = model(input_ids=ids, decoder_input_ids=decoder).logits
    given = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    alone = model(input_ids=ids[1:, :6], decoder_input_ids=decoder[1:]).logits
    torch.testing.assert_close(inferred, given)
    torch.testing.assert_close(inferred[1:], alone, atol=1e-4, rtol=0)
    common = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    got = model.generate(ids, num_beams=2, **common)
    assert torch.equal(got[1:], model.generate(ids[1:, :6], num_beams=2, **common))


@torch.no_grad()
def test_loss_is_the_same_in_training_and_evaluation():
    """Labels in the middle that are padding: upstream's evaluation builds a cache and loses the target's mask."""
    model = t5gemma()
    labels = tokens(2, 9)
    labels[0, :3] = -100
    losses = []
    for training in (True, False):
        model.train(training)
        output = model(input_ids=tokens(2, 12), labels=labels)
        losses.append(output.loss)
        assert output.past_key_values is None
    # One comes from hidden states, the other from logits.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@torch.no_grad()
def test_training_and_generation_begin_with_the_same_token():
    model = t5gemma()
    assert model.prepare_decoder_input_ids_from_labels(tokens(1, 4))[0, 0] == START
    model.generation_config.decoder_start_token_id = 7
    assert model.prepare_decoder_input_ids_from_labels(tokens(1, 4))[0, 0] == 7
    assert model.generate(tokens(1, 5), max_new_tokens=2)[0, 0] == 7


def test_a_fresh_model_is_not_doubled():
    """1 + weight with weights initialised to 1 would double every gain."""
    model = m.T5GemmaModel(m.T5GemmaConfig(encoder=BALANCED, decoder=BALANCED))
    hidden = model.encoder(input_ids=tokens(2, 12)).last_hidden_state
    assert hidden.pow(2).mean().sqrt().item() == pytest.approx(1, abs=0.01)
    # An encoder in bfloat16 keeps its frequencies in float32: they are no weights.
    assert not [name for name, _ in model.named_buffers()]
    assert model.encoder.embed_tokens.num_embeddings == VOCAB
