"""What begins, pads and ends a text, and what plain transformers makes of it (hazards 39, 40, 45, 46)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, pipeline

from modeling_t5gemma import stacks
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.labels import complaints, shifted_right
from modeling_t5gemma.text.rules import source_begin, source_ids, turn_ends, with_rows, with_rule
from modeling_t5gemma.text.tokenizer import Seq2SeqTokenizer
from tests.inference.conftest import MAKE, TURN_END, make_tokenizer

PAD, EOS, BOS, IGNORED = 0, 1, 2, -100
KINDS = {name: MAKE[name] for name in ("separate", "layerwise")}
QUESTION = [{"role": "user", "content": "the cat"}]


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """A model, and its tokenizer as it was saved."""
    torch.manual_seed(0)
    model = KINDS[request.param]()
    with_rule(make_tokenizer(), model.config).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    return model, AutoTokenizer.from_pretrained(tmp_path)


def test_targets_end_and_sources_begin(pair):
    model, tokenizer = pair
    words = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    begin = [BOS] if model.config.decoder.cross_attention_type == "layerwise" else []
    both = tokenizer("the cat", text_target="the cat")
    assert (both["input_ids"], both["labels"]) == ([*begin, *words], [*words, EOS])
    assert tokenizer("the cat")["input_ids"] == [*begin, *words]  # and it is back where it was
    cut = tokenizer(text_target=["the cat", "a"], max_length=3, truncation=True)["input_ids"]
    assert cut == [[*words[:2], EOS], [*tokenizer("a", add_special_tokens=False)["input_ids"], EOS]]


def test_a_rendered_prompt_gets_no_second_bos(pair):
    model, tokenizer = pair
    begin = source_begin(tokenizer, model.config)
    rendered = make_tokenizer().apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<bos>")
    ids = source_ids(tokenizer, rendered, begin)
    assert ids.count(BOS) == (begin is not None)
    assert ids == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    write = pipeline("seq2seq-generation", model=model, tokenizer=tokenizer)
    assert write.preprocess(rendered)["input_ids"].tolist() == [ids]


def test_a_rule_that_was_changed_is_saved(pair, tmp_path):
    model, tokenizer = pair
    other = source_begin(tokenizer, model.config) is None
    with_rule(tokenizer, model.config, other).save_pretrained(tmp_path / "other")
    again = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert isinstance(again, Seq2SeqTokenizer) and (source_begin(again, model.config) is not None) == other
    assert (BOS in again.apply_chat_template(QUESTION)["input_ids"]) == other


def test_a_tokenizer_of_an_older_checkpoint_goes_by_its_kind():
    """It puts <bos> before everything, as its original's did."""
    assert source_begin(make_tokenizer(), KINDS["separate"]().config) is None
    assert source_begin(make_tokenizer(), KINDS["layerwise"]().config) == BOS


@pytest.mark.parametrize("special", [True, False])
def test_turns_end_with_the_templates_token(special):
    assert turn_ends(make_tokenizer(special=special)) == [TURN_END]
    with pytest.raises(UserError, match="refuses a question and its answer: no"):
        turn_ends(make_tokenizer("{{ raise_exception('no') }}"))


def test_words_without_an_embedding():
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    assert with_rows(tokenizer, rows) is tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    assert rows in tokenizer("<image>")["input_ids"]
    kept = with_rows(tokenizer, rows)
    ids = kept("<image>")["input_ids"]
    assert max(ids) < rows and kept.decode(ids[1:]) == "<image>" and ids[0] == BOS
    assert kept.get_vocab() == tokenizer.get_vocab() and kept.special_tokens_map == tokenizer.special_tokens_map
    with pytest.raises(UserError, match="of ordinary text it makes"):
        with_rows(make_tokenizer(), 100)


@pytest.mark.parametrize(
    ("labels", "inputs"),
    [
        ([5, 6, EOS], [BOS, 5, 6]),
        ([5, EOS, IGNORED], [BOS, 5, EOS]),
        ([IGNORED, 5, EOS], [PAD, BOS, 5]),
        ([BOS, 5, EOS], [PAD, BOS, 5]),
        ([IGNORED, BOS, 5], [PAD, PAD, BOS]),
        ([5, BOS, EOS], [BOS, 5, BOS]),
        ([5, IGNORED, EOS], [BOS, 5, PAD]),
        ([IGNORED, IGNORED, IGNORED], [BOS, PAD, PAD]),
    ],
)
def test_the_start_token_stands_before_the_first_label(labels, inputs):
    assert shifted_right(torch.tensor([labels]), BOS, PAD).tolist() == [inputs]


@torch.no_grad()
@pytest.mark.parametrize("spoilt", [lambda ids: [IGNORED, IGNORED, *ids], lambda ids: [BOS, *ids]])
def test_labels_on_the_other_side_or_behind_bos_are_learnt_alike(pair, spoilt):
    model, _ = pair
    source, answer = torch.tensor([[BOS, 9, 8, 7]]), [5, 6, 7, EOS]
    right = model(input_ids=source, labels=torch.tensor([answer]))
    other = model(input_ids=source, labels=torch.tensor([spoilt(answer)]))
    torch.testing.assert_close(other.loss, right.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.logits[:, -len(answer) :], right.logits, rtol=1e-4, atol=1e-4)


def test_labels_that_look_wrong_are_told_once(monkeypatch):
    def found(labels):
        return [text.partition(" (")[0] for text in complaints(torch.tensor(labels), BOS, PAD, {EOS})]

    assert found([[5, EOS, IGNORED], [5, 6, 7]]) == []  # one that was cut
    assert found([[5, 6], [7, 8]]) == ["None of them ends with an end of sequence"]
    assert found([[BOS, EOS]]) == ["They begin with the start token"]
    assert found([[5, EOS, PAD], [5, 6, EOS]]) == ["The padding token"]
    assert found([[5, IGNORED, EOS]])[0].startswith("Some are -100 in the middle")
    told = []
    monkeypatch.setattr(stacks.logger, "warning", lambda *message: told.append(message))
    model = KINDS["separate"]()
    for _ in range(2):
        model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]))
    assert len(told) == 1


def test_a_model_without_a_target_names_the_text_encoder(pair):
    """As SentenceTransformer(checkpoint) calls it, which knows no such encoder."""
    model, _ = pair
    with pytest.raises(ValueError, match=r"sentence_transformer\(checkpoint\)"):
        model.model(input_ids=torch.tensor([[5, 6]]))


def test_the_standard_recipe(pair, tmp_path):
    """``text_target``, DataCollatorForSeq2Seq and Seq2SeqTrainer: it learns, answers and stops."""
    model, tokenizer = pair
    data = {"a b": "the cat", "c": "yes", "d e f": "no it is", "the": "a"}
    encoded = tokenizer(list(data), text_target=list(data.values()))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Seq2SeqTrainer(
        model,
        arguments,
        DataCollatorForSeq2Seq(tokenizer, model),
        [{name: encoded[name][i] for name in encoded} for i in range(len(data))],
    ).train()
    batch = tokenizer(list(data), padding=True, return_tensors="pt")
    answers = model.eval().generate(**batch, max_new_tokens=12, do_sample=False)
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == list(data.values())
    assert (answers == EOS).any(1).all()
