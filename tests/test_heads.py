"""Classification heads: parity with stock, pooling by mask, loading, resizing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoModelForQuestionAnswering
from transformers import T5GemmaForSequenceClassification as StockSequence
from transformers import T5GemmaForTokenClassification as StockToken

import modeling_t5gemma as m
from tests.tiny import BALANCED, NARROW, VOCAB, adapted_config, gemma3, layerwise, padded, stir, t5gemma, tokens

HEADS = [m.T5GemmaForSequenceClassification, m.T5GemmaForTokenClassification]


def head(cls, is_encoder_decoder: bool | None, **kwargs):
    config = m.T5GemmaConfig(encoder=dict(BALANCED), decoder=dict(NARROW), num_labels=3, **kwargs)
    if is_encoder_decoder is None:
        return stir(cls(config))
    return stir(cls(config, is_encoder_decoder=is_encoder_decoder))


@torch.no_grad()
@pytest.mark.parametrize("both", [True, False], ids=["encoder-decoder", "encoder"])
@pytest.mark.parametrize(("ours", "stock"), list(zip(HEADS, (StockSequence, StockToken), strict=True)))
def test_heads_equal_stock(ours, stock, both, tmp_path):
    model = head(ours, both)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    twin = stock.from_pretrained(tmp_path, attn_implementation="eager").eval()
    # Stock's decoder loses the last token of a batch's longest row; with padding behind it there is none to lose.
    ids, mask = padded(tokens(3, 12), [11, 5, 9], "right", 12)
    labels = torch.tensor([0, 2, 1]) if ours is HEADS[0] else torch.randint(0, 3, (3, 12))
    got, expected = (x(input_ids=ids, attention_mask=mask, labels=labels) for x in (model, twin))
    kept = slice(None) if ours is HEADS[0] else mask.bool()
    torch.testing.assert_close(got.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-5)
    if ours is HEADS[0]:
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert got.loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("both", [True, False], ids=["encoder-decoder", "encoder"])
@pytest.mark.parametrize("kind", ["separate", "layerwise"])
@pytest.mark.parametrize("cls", ["SequenceClassification", "TokenClassification", "MultipleChoice"])
def test_scores_of_a_row_do_not_depend_on_its_batch(cls, kind, both):
    config = adapted_config(gemma3(), cross_attention_type=kind, num_labels=3)
    model = stir(getattr(m, f"AdaptedSeq2SeqFor{cls}")(config, is_encoder_decoder=both))
    ids, length = tokens(1, 7), 7
    ids[0, 0] = config.bos_token_id

    def scores(side: str, width: int) -> torch.Tensor:
        batch, mask = padded(ids, [length], side, width)
        if cls == "MultipleChoice":
            return model(input_ids=batch[None], attention_mask=mask[None]).logits
        logits = model(input_ids=batch, attention_mask=mask).logits
        return logits[mask.bool()] if cls == "TokenClassification" else logits

    alone = scores("right", length)
    for side in ("left", "right"):
        for width in (length + 1, length + 4):
            torch.testing.assert_close(scores(side, width), alone, atol=5e-5, rtol=0)


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


def adapted_head(cls, pooling: str, **kwargs):
    config = m.T5GemmaConfig(encoder=dict(BALANCED), decoder=dict(NARROW), num_labels=3, **kwargs)
    config = m.AdaptedSeq2SeqConfig.from_t5gemma(config, num_labels=3, classifier_pooling=pooling)
    return stir(cls(config))


@torch.no_grad()
@pytest.mark.parametrize("both", [True, False])
def test_the_same_weights_under_the_wider_config(both, tmp_path):
    """A T5Gemma as an AdaptedSeq2Seq computes the same; only there can another pooling be saved."""
    model = head(m.T5GemmaForSequenceClassification, both)
    model.save_pretrained(tmp_path / "stock")
    for pooling in ("last", "mean"):
        config = m.AdaptedSeq2SeqConfig.from_t5gemma(model.config, num_labels=3, classifier_pooling=pooling)
        same, report = m.AdaptedSeq2SeqForSequenceClassification.from_pretrained(
            tmp_path / "stock", config=config, output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids, mask = padded(tokens(3, 12), [12, 5, 9], "right", 12)
        expected = model(input_ids=ids, attention_mask=mask).logits
        equal = torch.allclose(same.eval()(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-6)
        assert equal == (pooling == "last")
        same.save_pretrained(tmp_path / pooling)
        again = m.AdaptedSeq2SeqForSequenceClassification.from_pretrained(tmp_path / pooling)
        assert again.config.classifier_pooling == pooling


@torch.no_grad()
def test_the_mean_is_over_real_tokens():
    model = adapted_head(m.AdaptedSeq2SeqForSequenceClassification, "mean", is_encoder_decoder=False)
    ids = tokens(1, 7)
    hidden = model.model(input_ids=ids).last_hidden_state
    expected = model.score(hidden.mean(1))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    for side in ("left", "right"):
        batch, mask = padded(ids, [7], side, 12)
        torch.testing.assert_close(model(batch, attention_mask=mask).logits, expected, atol=1e-4, rtol=0)


def test_t5gemma_refuses_another_pooling(tmp_path):
    with pytest.raises(ValueError, match="AdaptedSeq2SeqConfig"):
        m.T5GemmaConfig(classifier_pooling="mean")
    t5gemma(BALANCED, NARROW).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_t5gemma"):
        m.T5GemmaForSequenceClassification.from_pretrained(tmp_path, classifier_pooling="mean")
    with pytest.raises(ValueError, match="'last', 'mean'"):
        m.AdaptedSeq2SeqConfig(classifier_pooling="first")


@torch.no_grad()
@pytest.mark.parametrize("both", [True, False], ids=["encoder-decoder", "encoder"])
@pytest.mark.parametrize("cls", [m.T5GemmaForMultipleChoice, m.AdaptedSeq2SeqForMultipleChoice])
def test_multiple_choice_is_a_score_for_each_text(cls, both):
    if cls is m.T5GemmaForMultipleChoice:
        model = head(cls, both)
    else:
        model = adapted_head(cls, "mean", is_encoder_decoder=both)
    assert model.score.out_proj.out_features == 1
    lengths = [[9, 5], [4, 9], [7, 6]]
    rows = [padded(tokens(2, 9, seed=n), pair, "right", 9) for n, pair in enumerate(lengths)]
    ids, mask = (torch.stack(side) for side in zip(*rows, strict=True))
    labels = torch.tensor([0, 1, 1])
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    read = model.read(ids.flatten(0, 1), mask.flatten(0, 1), None, None, {})
    expected = model.score(read.pooled(model.config.classifier_pooling)).view(3, 2)
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, labels))
    swapped = model(input_ids=ids.flip(1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(swapped, out.logits.flip(1), atol=1e-5, rtol=0)
    embeds = model.get_input_embeddings()(ids)
    if not both:
        again = model(inputs_embeds=embeds, attention_mask=mask).logits
        torch.testing.assert_close(again, out.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_question_answering_points_into_the_input():
    model = head(m.T5GemmaForQuestionAnswering, None)
    assert isinstance(model.model, m.T5GemmaEncoderModel) and model.score.out_proj.out_features == 2
    ids, mask = padded(tokens(2, 12), [12, 7], "left", 12)
    out = model(ids, attention_mask=mask, start_positions=torch.tensor([3, 6]), end_positions=torch.tensor([4, 12]))
    assert out.start_logits.shape == out.end_logits.shape == (2, 12)
    lowest = torch.finfo(torch.float32).min
    for each in (out.start_logits, out.end_logits):
        assert torch.equal(each == lowest, mask == 0)
    start = torch.nn.functional.cross_entropy(out.start_logits, torch.tensor([3, 6]))
    # An answer that is not in the input does not count.
    end = torch.nn.functional.cross_entropy(out.end_logits[:1], torch.tensor([4]))
    torch.testing.assert_close(out.loss, (start + end) / 2)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out.start_logits[0], model.score(hidden)[0, :, 0])


@pytest.mark.parametrize(
    ("auto", "name"),
    [(AutoModelForMultipleChoice, "ForMultipleChoice"), (AutoModelForQuestionAnswering, "ForQuestionAnswering")],
)
def test_auto_classes_load_heads_that_stock_has_not(auto, name, tmp_path):
    for prefix, full in (("T5Gemma", t5gemma(BALANCED, NARROW)), ("AdaptedSeq2Seq", layerwise(gemma3()))):
        full.save_pretrained(tmp_path / prefix)
        model, report = auto.from_pretrained(tmp_path / prefix, output_loading_info=True)
        assert type(model) is getattr(m, prefix + name)
        assert not report["unexpected_keys"]
        assert set(report["missing_keys"]) == {"score.out_proj.weight", "score.out_proj.bias"}
        model.save_pretrained(tmp_path / name)
        assert type(auto.from_pretrained(tmp_path / name)) is type(model)
    assert model.config.auto_map[auto.__name__] == f"modeling_t5gemma.AdaptedSeq2Seq{name}"


@torch.no_grad()
def test_heads_count_the_items_of_an_accumulated_batch():
    """With ``num_items_in_batch`` micro-batches sum to the loss of their batch (hazard 24)."""
    ids, wide = tokens(4, 6), tokens(8, 6).view(4, 2, 6)
    cases = [
        (m.T5GemmaForSequenceClassification, {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}, 4),
        (m.T5GemmaForTokenClassification, {"input_ids": ids, "labels": tokens(4, 6) % 3}, 24),
        (m.T5GemmaForMultipleChoice, {"input_ids": wide, "labels": torch.tensor([0, 1, 1, 0])}, 4),
        (
            m.T5GemmaForQuestionAnswering,
            {"input_ids": ids, "start_positions": torch.arange(4), "end_positions": torch.arange(4)},
            4,
        ),
    ]
    for cls, batch, count in cases:
        model = head(cls, None)
        whole = model(**batch).loss
        halves = [{name: value[part] for name, value in batch.items()} for part in (slice(1), slice(1, 4))]
        total = sum(model(**half, num_items_in_batch=count).loss for half in halves)
        torch.testing.assert_close(total, whole, atol=1e-5, rtol=0)


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
