"""Questions and answers as tokens: together what a decoder-only model would read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.rendering import Renderer, UnusableRecord, check_order
from tests.post_training.chat import TEMPLATE, assistant, chat_tokenizer, user

TOKENIZER = chat_tokenizer()
BOS, EOS, END = (TOKENIZER.convert_tokens_to_ids(t) for t in ("<bos>", "<eos>", "<end_of_turn>"))
WITH_TOOLS = "{{ tools | tojson if tools else '' }}" + TEMPLATE
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": "int"}}}
TEXTS = st.text("abc the\n.", min_size=1, max_size=12).filter(str.strip)


def renderer(template: str | None = TEMPLATE, source: int = 1000, target: int = 100, **kwargs) -> Renderer:
    return Renderer(chat_tokenizer(template), max_source=source, max_target=target, **kwargs)


def rendered(messages: list, **kwargs) -> list[int]:
    """What a decoder-only model reads, without its <bos>."""
    ids = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)
    assert ids[0] == BOS and BOS not in ids[1:]
    return ids[1:]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.booleans())
def test_question_and_answer_are_what_a_decoder_only_model_reads(turns, with_system):
    messages = [{"role": "system", "content": "be the c"}] * with_system
    made = renderer()
    for question, answer in turns:
        messages.append(user(question))
        source = made.source(messages)
        target = made.target([assistant(answer)], messages)
        assert source.ids.tolist() == rendered(messages, add_generation_prompt=True) and source.cut == 0
        messages.append(assistant(answer))
        assert [*source.ids, *target] == rendered(messages)
        assert END in target and made.target([assistant(answer)]).tolist() == target.tolist()


def test_plain_strings_are_tokenised_alone_and_end_the_sequence():
    made = renderer(template=None)
    assert made.source("the cat").ids.tolist() == TOKENIZER("the cat", add_special_tokens=False)["input_ids"]
    assert made.target("the").tolist() == [*TOKENIZER("the", add_special_tokens=False)["input_ids"], EOS]
    assert made.ends() == [EOS] and renderer().ends() == [EOS, END]


def test_a_long_question_keeps_its_two_ends():
    text = "b" * 10 + "c" * 20 + "d" * 11
    whole = renderer(None).source(text).ids.tolist()
    short = renderer(None, source=21).source(text)
    assert short.ids.tolist() == whole[:11] + whole[-10:] and short.cut == len(whole) - 21


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_system_and_question():
    system = {"role": "system", "content": "be c"}
    messages = [system, user("a" * 30), assistant("b" * 30), user("c"), assistant("d"), user("the")]
    rest = rendered([system, *messages[3:]], add_generation_prompt=True)
    whole = rendered(messages, add_generation_prompt=True)
    found = renderer(source=len(whole) - 1).source(messages)
    said = sum(len(TOKENIZER(each["content"], add_special_tokens=False)["input_ids"]) for each in messages[1:3])
    assert found.ids.tolist() == rest and found.cut == said and found.prompt == [system, *messages[3:]]
    question = rendered([system, messages[-1]], add_generation_prompt=True)
    shortest = renderer(source=len(question) - 4).source(messages)
    assert len(shortest.ids) == len(question) - 4 and shortest.ids[-3:].tolist() == question[-3:]


def test_a_long_answer_loses_its_end():
    found = renderer(target=5).answer([assistant("b" * 9)], [user("a")])
    assert found.ids.tolist() == renderer().target([assistant("b" * 9)])[:5].tolist() and found.cut == 6


def test_tools_are_rendered_where_the_template_has_a_place():
    made = renderer(WITH_TOOLS)
    text = made.tokenizer.decode(made.source([user("a")], tools=[TOOL]).ids)
    assert '"add"' in text
    assert (made.source([user("a")], tools='[{"type": "x"}]').cut, made.source([user("a")], tools=[]).cut) == (0, 0)
    assert (
        renderer(WITH_TOOLS, tools=[TOOL]).source([user("a")]).ids.tolist()
        == made.source([user("a")], tools=[{**TOOL, "never": None}]).ids.tolist()
    )
    with pytest.raises(UnusableRecord, match="no place"):
        renderer().source([user("a")], tools=[TOOL])
    with pytest.raises(UnusableRecord, match="not valid JSON"):
        made.source([user("a")], tools="{")


@pytest.mark.parametrize(
    "roles, words",
    [
        ([], "no messages"),
        (["assistant"], "message 1 is of assistant, after nothing"),
        (["user", "user"], "message 2 is of user, after user"),
        (["user", "assistant", "system"], "message 3 is of system"),
        (["user", "assistant", "assistant"], "message 3 is of assistant, after assistant"),
        (["user", "robot"], "the role 'robot'"),
        (["system", "assistant"], "message 2 is of assistant, after system"),
    ],
)
def test_roles_out_of_order_are_refused(roles, words):
    with pytest.raises(UnusableRecord, match=words):
        check_order([{"role": role, "content": "a"} for role in roles])


def test_tool_results_come_between_calls_and_answers():
    check_order([{"role": role} for role in ("developer", "user", "assistant", "tool", "tool", "assistant")])


@pytest.mark.parametrize("answer", ["", "  \n", [assistant("")], [assistant(None)], [assistant(" ")]])
def test_empty_answers_are_refused(answer):
    with pytest.raises(UnusableRecord, match="empty answer"):
        renderer().answer(answer)


def test_what_the_template_refuses_is_told_in_its_words():
    strict = TEMPLATE.replace("{%- set system", "{%- if 'x' in messages[0]['content'] -%}{{- raise_exception('no x!') -}}{%- endif -%}{%- set system")  # fmt: skip  # noqa: E501
    with pytest.raises(UnusableRecord, match=r"refuses it \(no x!\)"):
        renderer(strict).source([user("x")])


def test_a_template_that_changes_the_question_when_it_is_answered_is_refused():
    changing = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(UnusableRecord, match="changes the question"):
        renderer(changing).target([assistant("b")], [user("a")])


def test_messages_without_a_template_stop_the_run():
    with pytest.raises(UserError, match=r"has no chat template.*data.chat_template") as error:
        renderer(None).source([user("a")])
    assert not isinstance(error.value, UnusableRecord)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": " c"}]


def test_what_the_template_does_not_write_is_refused_and_not_learnt_as_nothing():
    lenient = TEMPLATE.replace("message['content'] | trim", "(message['content'] or '') | trim")
    with pytest.raises(UnusableRecord, match="tool_calls of assistant, for which the chat template has no place"):
        renderer(lenient).answer([CALL], [user("a")])
    with pytest.raises(UnusableRecord, match="tool_calls of assistant"):
        renderer(lenient).answer([{**CALL, "content": "b"}], [user("a")])
    with pytest.raises(UnusableRecord, match="tool_calls of assistant"):
        renderer(lenient).source([user("a"), {**CALL, "content": "b"}, user("c")])
    with pytest.raises(UnusableRecord, match="reasoning_content of assistant"):
        renderer().answer([{**assistant("b"), "reasoning_content": "c"}], [user("a")])
    deaf = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}" + TEMPLATE
    with pytest.raises(UnusableRecord, match="content of system"):
        renderer(deaf).source([{"role": "system", "content": "the"}, user("a")])


def test_calls_are_learnt_where_the_template_has_a_place():
    calling = TEMPLATE.replace("message['content'] | trim", "(message['content'] or message['tool_calls'] | tojson)")
    made = renderer(calling)
    assert '"arguments": {"x": 1}' in made.tokenizer.decode(made.target([CALL], [user("a")]))


def test_content_in_parts_is_their_text():
    made = renderer()
    assert made.target([assistant(PARTS)]).tolist() == made.target([assistant("a c")]).tolist()
    assert made.source([user(PARTS)]).ids.tolist() == made.source([user("a c")]).ids.tolist()
    with pytest.raises(UnusableRecord, match=r"a part that is no text \(image\)"):
        made.source([user([{"type": "image"}])])
    with pytest.raises(UnusableRecord, match="empty answer"):
        made.answer([assistant([{"type": "text", "text": " "}])])


@pytest.mark.parametrize("question", ["", " ", [user("")], [user(" \n")], [user([])], [user(None)]])
def test_empty_questions_are_refused(question):
    with pytest.raises(UnusableRecord, match="empty question"):
        renderer().source(question)


def test_a_conversation_of_thousands_of_turns_renders_what_is_read(monkeypatch):
    """Each of its questions: rendering all that came before would take a time that grows with the square."""
    made = renderer(source=100)
    rendered_messages = []
    template = made._template
    monkeypatch.setattr(made, "_template", lambda m, *a: rendered_messages.append(len(m)) or template(m, *a))
    messages = [user("the c"), assistant("b")] * 3000
    found = made.source([*messages, user("d")])
    assert 50 < len(found.ids) <= 100 < found.cut
    made.target([assistant("b")], found.prompt)
    assert sum(rendered_messages) < 500
