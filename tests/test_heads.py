"""Classification heads: parity with stock, pooling by mask, loading, resizing."""

from __future__ import annotations

import pytest
import torch
from transformers import T5GemmaForSequenceClassification as StockSequence
from transformers import T5GemmaForTokenClassification as StockToken

import modeling_t5gemma as m
from tests.tiny import BALANCED, NARROW, VOCAB, gemma3, layerwise, padded, stir, t5gemma, tokens

HEADS = [m.T5GemmaForSequenceClassification, m.T5GemmaForTokenClassification]


def head(cls, is_encoder_decoder: bool, **kwargs):
    config = m.T5GemmaConfig(encoder=dict(BALANCED), decoder=dict(NARROW), num_labels=3, **kwargs)
    return stir(cls(config, is_encoder_decoder=is_encoder_decoder))


@torch.no_grad()
@pytest.mark.parametrize("both", [True, False], ids=["encoder-decoder", "encoder"])
@pytest.mark.parametrize(("ours", "stock"), list(zip(HEADS, (StockSequence, StockToken), strict=True)))
def test_heads_equal_stock(ours, stock, both, tmp_path):
    model = head(ours, both)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    twin = stock.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, mask = padded(tokens(3, 12), [12, 5, 9], "right", 12)
    labels = torch.tensor([0, 2, 1]) if ours is HEADS[0] else torch.randint(0, 3, (3, 12))
    got, expected = (x(input_ids=ids, attention_mask=mask, labels=labels) for x in (model, twin))
    kept = slice(None) if ours is HEADS[0] else mask.bool()
    torch.testing.assert_close(got.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-5)
    if ours is HEADS[0]:
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert got.loss.isfinite()


@torch.no_grad()
def test_the_last_token_is_found_by_the_mask():
    """Padding on the left, a real token with the padding id, embeddings instead of ids: all by the mask."""
    model = head(m.T5GemmaForSequenceClassification, False)
    ids = tokens(2, 12)
    ids[:, 4] = 0
    alone = torch.cat(
        [model(input_ids=ids[:1], attention_mask=torch.ones(1, 12)).logits]
        + [model(input_ids=ids[1:, :5], attention_mask=torch.ones(1, 5)).logits]
    )
    for side in ("left", "right"):
        batch = torch.zeros_like(ids)
        mask = torch.zeros_like(ids)
        batch[0], mask[0] = ids[0], 1
        place = slice(0, 5) if side == "right" else slice(7, 12)
        batch[1, place], mask[1, place] = ids[1, :5], 1
        torch.testing.assert_close(model(input_ids=batch, attention_mask=mask).logits, alone, atol=1e-4, rtol=0)
        embeds = model.get_input_embeddings()(batch)
        got = model(inputs_embeds=embeds, attention_mask=mask).logits
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=0)


def test_a_classifier_from_a_full_checkpoint(tmp_path):
    full = t5gemma(BALANCED, NARROW)
    full.save_pretrained(tmp_path)
    for cls in HEADS:
        for both in (True, False):
            model, report = cls.from_pretrained(
                tmp_path, num_labels=4, is_encoder_decoder=both, output_loading_info=True
            )
            assert not report["unexpected_keys"]
            assert set(report["missing_keys"]) == {"score.out_proj.weight", "score.out_proj.bias"}
            torch.testing.assert_close(
                model.model.encoder.layers[0].mlp.up_proj.weight, full.model.encoder.layers[0].mlp.up_proj.weight
            )


def test_encoder_decoder_classifier_says_what_it_needs():
    model = head(m.T5GemmaForSequenceClassification, True)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_resize_save_reload(tied, tmp_path):
    model = t5gemma(BALANCED, NARROW, tie_word_embeddings=tied)
    before = model(input_ids=tokens(1, 5), decoder_input_ids=tokens(1, 3)).logits
    model.resize_token_embeddings(VOCAB + 7)
    after = model(input_ids=tokens(1, 5), decoder_input_ids=tokens(1, 3)).logits
    torch.testing.assert_close(after[..., :VOCAB], before, atol=1e-6, rtol=0)
    assert after.shape[-1] == VOCAB + 7
    sizes = {model.config.vocab_size, model.config.encoder.vocab_size, model.config.decoder.vocab_size}
    assert sizes == {VOCAB + 7}
    assert (model.lm_head.out_proj.weight is model.model.decoder.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    got = again(input_ids=tokens(1, 5), decoder_input_ids=torch.tensor([[VOCAB + 1, 5, 6]])).logits
    expected = model(input_ids=tokens(1, 5), decoder_input_ids=torch.tensor([[VOCAB + 1, 5, 6]])).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("cls", [*HEADS, m.T5GemmaModel, m.T5GemmaEncoderModel])
def test_every_head_resizes_and_reloads(cls, both, tmp_path):
    if cls in HEADS:
        model = head(cls, both)
    else:
        model = cls(m.T5GemmaConfig(encoder=dict(BALANCED), decoder=dict(NARROW)))
    model.resize_token_embeddings(VOCAB + 3, pad_to_multiple_of=8)
    assert model.get_input_embeddings().weight.shape[0] == 104
    model.save_pretrained(tmp_path)
    _, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]


@torch.no_grad()
def test_shared_embeddings(tmp_path):
    source = gemma3()
    model = layerwise(source, share_embeddings=True)
    names = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head.out_proj")
    assert len({model.get_submodule(name).weight.data_ptr() for name in names}) == 1
    model.resize_token_embeddings(VOCAB + 7)
    assert len({model.get_submodule(name).weight.data_ptr() for name in names}) == 1
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert len({again.get_submodule(name).weight.data_ptr() for name in names}) == 1
    encoder, report = m.AdaptedSeq2SeqEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    ids = tokens(1, 9)
    torch.testing.assert_close(encoder(ids).last_hidden_state, model.get_encoder()(ids).last_hidden_state)
