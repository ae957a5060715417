"""What models read: the template's ids, the right beginning, the right end."""

from __future__ import annotations

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_ids
from modeling_t5gemma.inference.prompts import Prompts, longest_prompt
from modeling_t5gemma.inference.sampling import ends_of, generation_config
from tests.inference.conftest import MAKE, TURN_END, make_tokenizer

TURNS = [
    {"role": "user", "content": " the cat\nsat "},
    {"role": "assistant", "content": "a mat"},
    {"role": "user", "content": "the end"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=MAKE)
def prompts(request):
    return request.param, Prompts.of(MAKE[request.param](), make_tokenizer())


def test_chat_is_the_template_s(prompts):
    kind, prompts = prompts
    whole = prompts.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert whole[0] == prompts.tokenizer.bos_token_id
    assert prompts.chat(TURNS) == (whole[1:] if kind == "separate" else whole)


def test_text_has_bos_where_it_was_trained_with(prompts):
    kind, prompts = prompts
    plain = prompts.tokenizer("the cat", add_special_tokens=False).input_ids
    assert prompts.text("the cat") == ([] if kind == "separate" else [2]) + plain


def test_the_end_of_a_turn_is_the_template_s():
    model = MAKE["separate"]()
    for special in (True, False):
        assert Prompts.of(model, make_tokenizer(special=special)).turn_ends() == [TURN_END]
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["\n", "<|im_start|>", "<|im_end|>"])
    assert Prompts.of(model, tokenizer).turn_ends() == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert Prompts.of(model, make_tokenizer("{{ messages[-1]['content'] }}")).turn_ends() == []


def test_no_template_names_the_other_command():
    with pytest.raises(UserError, match=r"no chat template.*t5gemma generate"):
        Prompts.of(MAKE["separate"](), make_tokenizer(None)).chat(TURNS)


def test_messages_are_written_whole_or_refused():
    prompts = Prompts.of(MAKE["separate"](), make_tokenizer())
    (question, answer, *rest) = TURNS
    parts = {**question, "content": [{"type": "text", "text": question["content"]}]}
    assert prompts.chat([parts, answer, *rest]) == prompts.chat(TURNS)
    with pytest.raises(UserError, match="tool_calls of assistant, for which the chat template has no place"):
        prompts.chat([question, {**answer, "tool_calls": [{"function": {"name": "f"}}]}, *rest])


def test_what_a_template_refuses():
    with pytest.raises(UserError, match=r"refuses.*alternate"):
        Prompts.of(MAKE["separate"](), make_tokenizer()).chat(TURNS[1:])


def test_shortened(prompts):
    prompts = prompts[1]
    ids = [2, *range(10, 30)]
    for limit in (4, 5, 20):
        text, chat = (prompts.shortened(ids, limit, middle=middle) for middle in (False, True))
        assert len(text) == len(chat) == limit
        assert text == [2, *ids[-(limit - 1) :]]
        cut = next(place for place, (one, other) in enumerate(zip(chat, ids)) if one != other)
        assert chat[0] == 2 and chat[cut:] == ids[len(ids) - (limit - cut) :] and abs(2 * cut - limit) <= 2
    assert prompts.shortened(ids, 21, middle=False) == ids
    assert prompts.shortened(ids[1:], 3, middle=False) == ids[-3:]


def test_room_for_new_tokens():
    longest = {kind: longest_prompt(make(max_position_embeddings=100), 30) for kind, make in MAKE.items()}
    assert longest == {"separate": 100, "layerwise": 70, "decoder_only": 70}
    with pytest.raises(UserError, match=r"--max-new-tokens 100.*100 positions"):
        longest_prompt(MAKE["separate"](max_position_embeddings=100), 100)


def test_generation_is_greedy_unless_asked(caplog):
    model, tokenizer = MAKE["separate"](), make_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.5, top_k=3)
    greedy = generation_config(model, tokenizer, max_new_tokens=3, ends=[TURN_END])
    assert ends_of(greedy) == [1, TURN_END]
    rows = [generate_ids(model, [[5, 6, 7]], 0, 1, generation_config=greedy)[0] for _ in range(3)]
    assert rows == 3 * generate_ids(model, [[5, 6, 7]], 0, 1, max_new_tokens=3, do_sample=False)
    assert not caplog.records, "nothing to complain about"
    assert generation_config(model, tokenizer, max_new_tokens=3, temperature=0.0).do_sample is False
    drawn = generation_config(model, tokenizer, max_new_tokens=3, temperature=0.3)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p) == (True, 0.3, None)
    assert model.generation_config.top_p == 0.5, "the model's own stays"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0, "top_p": 0.5}, {"num_beams": 0}],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=r"--(temperature|top-p|num-beams|max-new-tokens)"):
        generation_config(MAKE["separate"](), make_tokenizer(), **{"max_new_tokens": 1, **wrong})
