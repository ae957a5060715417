"""Batches: the texts are those of one row at a time, in the order of the sources."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_t5gemma.inference import batching
from modeling_t5gemma.inference.batching import _batches, generate_ids, generate_texts
from tests.inference.conftest import MAKE, make_tokenizer
from tests.tiny import tokens

NEW = 7
LENGTHS = [5, 31, 1, 17, 40, 17, 11]
SOURCES = [row[:length] for row, length in zip(tokens(len(LENGTHS), 40).tolist(), LENGTHS)]


@pytest.fixture(scope="module", params=MAKE)
def model(request):
    torch.manual_seed(0)  # whichever test comes first
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def alone(model):
    """The new tokens of each source by transformers' own generate, a row at a time and without any padding."""
    rows = []
    for source in SOURCES:
        output = model.generate(torch.tensor([source]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        rows.append(output[0, 1 if model.config.is_encoder_decoder else len(source) :].tolist())
    return rows


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 64}])
@pytest.mark.parametrize("batch_tokens", [None, 60])
def test_rows_do_not_depend_on_their_batch(how, batch_tokens, model, alone):
    assert len({tuple(row) for row in alone}) == len(alone), "rows that are told apart"
    found = generate_ids(
        model, SOURCES, 0, **how, batch_tokens=batch_tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert found == alone


def test_rows_end_with_the_first_end(model, alone):
    ends = [alone[0][2], alone[3][4]]
    expected = []
    for row in alone:
        places = [row.index(end) for end in ends if end in row]
        expected.append(row[: min(places) + 1] if places else row)
    assert any(len(row) < NEW for row in expected)
    found = generate_ids(model, SOURCES, 0, 4, max_new_tokens=NEW, do_sample=False, eos_token_id=ends)
    assert found == expected


def test_texts_are_those_of_the_ids(model, alone):
    tokenizer = make_tokenizer()
    end = alone[0][2]
    done = []
    texts = generate_texts(
        model, tokenizer, iter(SOURCES), batch_size=3, progress=done.append, max_new_tokens=NEW, eos_token_id=end
    )
    expected = [row[: row.index(end)] if end in row else row for row in alone]
    assert list(texts) == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert sum(done) == len(SOURCES)


def test_text_begins_as_the_model_reads_it(model):
    tokenizer = make_tokenizer()
    plain = tokenizer("the cat", add_special_tokens=False).input_ids
    with_bos = [tokenizer.bos_token_id, *plain]
    separate = model.config.is_encoder_decoder and model.config.decoder.cross_attention_type == "separate"
    (found,) = generate_texts(model, tokenizer, ["the cat"], max_new_tokens=NEW)
    for ids, equal in ((plain, separate), (with_bos, not separate)):
        assert (next(generate_texts(model, tokenizer, [ids], max_new_tokens=NEW)) == found) == equal


def test_a_long_file_is_read_a_window_at_a_time(monkeypatch):
    model, read = MAKE["separate"](), []
    monkeypatch.setattr(batching, "WINDOW", 2)
    texts = generate_texts(
        model, make_tokenizer(), (read.append(0) or [5, 6] for _ in range(20)), batch_size=3, max_new_tokens=1
    )
    assert not read
    for count in range(1, 21):
        next(texts)
        assert len(read) == min(20, 6 * -(-count // 6))


def test_the_mode_stays(model):
    for training in (True, False):
        model.train(training)
        generate_ids(model, SOURCES[:1], 0, 1, max_new_tokens=1)
        assert model.training == training


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9), st.none() | st.integers(1, 200))
def test_batches_hold_every_row_once_and_keep_their_limits(lengths, batch_size, batch_tokens):
    batches = list(_batches(lengths, batch_size, batch_tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    widths = [max(lengths[row] for row in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(batches, widths):
        assert len(batch) <= batch_size
        assert batch_tokens is None or len(batch) == 1 or len(batch) * width <= batch_tokens
