"""Records to examples: every usable answer once, everything else counted."""

from __future__ import annotations

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training import encoding
from modeling_t5gemma.post_training.encoding import encode_records
from modeling_t5gemma.post_training.records import load_records
from modeling_t5gemma.post_training.rendering import Renderer
from modeling_t5gemma.post_training.settings import ColumnsSettings
from tests.post_training.chat import assistant, chat_tokenizer, user, words, write

TOKENIZER = chat_tokenizer()
TALK = [user("a"), assistant("b"), user("c"), assistant("d")]


def encode(path: str, source: int = 100, target: int = 50, **kwargs):
    return encode_records(
        load_records(path), Renderer(TOKENIZER, max_source=source, max_target=target), "rows", **kwargs
    )


def texts(examples) -> list[tuple[str, str, str]]:
    return [(each.where, TOKENIZER.decode(each.source), TOKENIZER.decode(each.target)) for each in examples]


def turn(*parts: str) -> str:
    names = ["user", "model"] * len(parts)
    said = [f"<start_of_turn>{name}\n{part}<end_of_turn>\n" for name, part in zip(names, parts)]
    return "".join(said) + "<start_of_turn>model\n"


def test_a_conversation_has_an_example_a_turn_or_the_last_alone(tmp_path):
    path = write(tmp_path / "talks.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    first, second = ("rows:1/2", turn("a"), "b<end_of_turn>\n"), ("rows:1/4", turn("a", "b", "c"), "d<end_of_turn>\n")
    third = ("rows:2/2", turn("a"), "b<end_of_turn>\n")
    assert texts(encode(path).examples()) == [first, second, third]
    assert texts(encode(path, turns="last").examples()) == [second, third]


def test_prompts_and_completions_are_texts_or_messages_under_any_name(tmp_path):
    plain = write(tmp_path / "plain.jsonl", [{"article": "the", "summary": "a"}])
    found = texts(encode(plain, columns=ColumnsSettings(prompt="article", completion="summary")).examples())
    assert found == [("rows:1", "the", "a<eos>")]
    # Answers in the prompt are not learnt, those of a completion of several messages are.
    chat = write(tmp_path / "chat.jsonl", [{"prompt": TALK[:3], "completion": [TALK[3], *TALK[:2]]}])
    assert [where for where, _, _ in texts(encode(chat).examples())] == ["rows:1/4", "rows:1/6"]


def test_bad_records_are_counted_and_named_and_too_many_stop_the_run(tmp_path):
    rows = [
        {"messages": TALK},
        {"messages": [user("a"), assistant("")]},
        {"messages": [user("a"), user("b"), assistant("c")]},
        {"messages": [user("a")]},
        {"messages": None},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    report = encode(path).report
    assert (report.records, report.examples, sum(report.skipped.values())) == (5, 2, 4)
    assert report.first_skipped[0] == "rows:2/2: empty answer" and "empty answer" in str(report)
    with pytest.raises(UserError, match=r"4 bad records.*rows:2/2: empty answer.*roles out of order"):
        encode(path, max_bad=3)


def test_a_pair_is_two_texts_or_two_lists_of_messages(tmp_path):
    for rows, told in (
        ({"prompt": "a", "completion": [assistant("b")]}, "prompt is a text and completion a list: not two texts"),
        ({"prompt": 1, "completion": 2}, "prompt is of type int and completion of type int"),
    ):
        with pytest.raises(UserError, match=told):
            encode(write(tmp_path / "rows.jsonl", [rows])).examples()
    rows = [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}]
    assert "completion missing" in str(encode(write(tmp_path / "rows.jsonl", rows)).report)


def test_what_is_too_long_is_cut_or_skipped_and_counted(tmp_path):
    rows = [{"prompt": "b" * 30, "completion": "c" * 9}, {"prompt": "b", "completion": "c"}]
    path = write(tmp_path / "rows.jsonl", rows)
    cut = encode(path, source=20, target=5)
    assert (cut.report.cut_sources, cut.report.cut_targets, cut.report.cut_tokens) == (1, 1, 10 + 5)
    assert cut.lengths.tolist() == [[20, 5], [1, 2]]
    skipped = encode(path, source=20, target=5, longer="skip", max_bad=0)
    assert skipped.report.examples == 1 and "longer than max_source" in str(skipped.report)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "a"}, "neither a column 'messages', nor 'prompt' and 'completion'. It has 'text'"),
        ({"prompt": "a", "answer": "b"}, "no column 'completion'. It has 'prompt', 'answer'"),
        ({"prompt": "a", "completion": "b", "messages": TALK}, "set columns.messages to null"),
    ],
)
def test_records_of_no_known_form_are_refused(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        encode(write(tmp_path / "rows.jsonl", [row]))


def test_records_without_an_example_are_told_before_anything_is_trained(tmp_path):
    encoded = encode(write(tmp_path / "rows.jsonl", [{"messages": [user("a")]}]))
    assert (encoded.report.examples, sum(encoded.report.skipped.values())) == (0, 1)
    for take in (encoded.examples, lambda: encoded.split(0)):
        with pytest.raises(UserError, match=r"0 good ones.*rows:1: the last message is of user"):
            take()


def test_lengths_and_held_out_records(tmp_path):
    path = write(tmp_path / "talks.jsonl", [{"messages": TALK}] * 6)
    encoded = encode(path)
    train, held = encoded.split(2)
    assert [each.where for each in held] == ["rows:1/2", "rows:1/4", "rows:4/2", "rows:4/4"]
    assert len(train) == 8 and not {each.where for each in train} & {each.where for each in held}
    for part in (train, held):
        assert np.array_equal(part.lengths, [[len(each.source), len(each.target)] for each in part])
        assert all(each.source.dtype == np.int32 for each in part)
    with pytest.raises(UserError, match="cannot be held out"):
        encoded.split(6)


def test_the_same_examples_from_two_processes_and_from_the_cache(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", words(40))
    once = texts(encode(path).examples())
    monkeypatch.setattr(encoding._Encode, "_row", None)  # not called again
    assert texts(encode(path).examples()) == once
    monkeypatch.undo()
    other = write(tmp_path / "same.jsonl", words(40))
    assert texts(encode(other, processes=2).examples()) == once
    assert texts(encode(path, target=2).examples()) != once
