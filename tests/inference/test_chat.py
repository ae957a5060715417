"""``t5gemma chat``: turns through the template, answers as they come."""

from __future__ import annotations

import pytest
import torch

from modeling_t5gemma.commands.chat import chat
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.conversation import Conversation
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.inference.prompts import Prompts
from modeling_t5gemma.inference.sampling import generation_config
from tests.inference.conftest import MAKE, TURN_END, WORDS, make_tokenizer

LETTERS = [WORDS.index(letter) for letter in "▁cab"]


class Spoken:
    """A model's ``generate`` that says given ids and keeps what it was asked."""

    def __init__(self, model, *answers):
        self.model, self.answers, self.asked = model, list(answers), []
        model.generate = self

    def __call__(self, input_ids, attention_mask, streamer, **_):
        self.asked.append(input_ids[0].tolist())
        begin = input_ids if not self.model.config.is_encoder_decoder else torch.tensor([[2]])
        streamer.put(begin)
        answer = self.answers.pop(0)
        for token in answer:
            if token is None:
                raise KeyboardInterrupt
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([begin, torch.tensor([answer])], dim=1)


def conversation(kind: str, *answers, system=None, template=None, **config):
    model, tokenizer = MAKE[kind](**config), make_tokenizer(*([] if template is None else [template]))
    prompts = Prompts.of(model, tokenizer)
    settings = generation_config(model, tokenizer, max_new_tokens=30, ends=prompts.turn_ends())
    spoken = Spoken(model, *answers) if answers else None
    return Conversation(model, prompts, settings, system), spoken, tokenizer


@pytest.mark.parametrize("kind", MAKE)
def test_every_turn_is_read_again(kind):
    talk, spoken, tokenizer = conversation(kind, [*LETTERS, TURN_END], [LETTERS[1], 1])
    said = []
    assert talk.ask("the cat ", said.append) == "cab"
    assert "".join(said) == " cab", "without the end of the turn"
    assert talk.ask("a", said.append) == "c"
    turns = [
        {"role": "user", "content": "the cat "},
        {"role": "assistant", "content": "cab"},
        {"role": "user", "content": "a"},
    ]
    assert talk.messages == [*turns, {"role": "assistant", "content": "c"}]
    for asked, count in zip(spoken.asked, (1, 3), strict=True):
        ids = tokenizer.apply_chat_template(turns[:count], add_generation_prompt=True, return_dict=False)
        assert asked == (ids[1:] if kind == "separate" else ids)
    talk.clear()
    assert talk.messages == []


@pytest.mark.parametrize("kind", MAKE)
def test_an_answer_ends_with_its_turn(kind):
    """With the model's real generate: the same words with and without an end, up to it."""
    talk, _, tokenizer = conversation(kind)
    whole = []
    talk._config.eos_token_id = talk._model.generation_config.eos_token_id = None
    talk.ask("the cat", whole.append)
    talk.clear()
    ids = talk._prompts.chat([{"role": "user", "content": "the cat"}])
    output = talk._model.generate(torch.tensor([ids]), generation_config=talk._config)
    new = output[0, 1 if talk._model.config.is_encoder_decoder else len(ids) :].tolist()
    assert "".join(whole) == tokenizer.decode(new, skip_special_tokens=True)
    talk._config.eos_token_id = [new[5]]
    said = []
    talk.ask("the cat", said.append)
    assert "".join(said) == tokenizer.decode(new[: new.index(new[5])], skip_special_tokens=True)


def test_ctrl_c_keeps_what_was_said():
    talk, *_ = conversation("separate", [*LETTERS[:3], None], [None])
    said = []
    assert talk.ask("the cat", said.append) == "ca" and "".join(said) == " ca"
    before = list(talk.messages)
    assert before[-1] == {"role": "assistant", "content": "ca"}
    assert talk.ask("a", said.append) == "" and talk.messages == before


def test_a_conversation_that_is_too_long_stays_as_it_was():
    talk, spoken, _ = conversation("layerwise", [*LETTERS, 1], max_position_embeddings=80)
    talk.ask("a", str)
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"tokens long and the model reads at most 50\. /clear"):
        talk.ask("the cat sat on the mat " * 5, str)
    assert talk.messages == before and len(spoken.asked) == 1


def test_a_system_message():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end_of_turn>{% endfor %}"
    talk, spoken, tokenizer = conversation("separate", [*LETTERS, 1], system="be the cat", template=template)
    talk.ask("a", str)
    assert tokenizer.decode(spoken.asked[0]) == "system: be the cat<end_of_turn>user: a<end_of_turn>"
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "be the cat"}]
    with pytest.raises(UserError, match="template refuses"):
        conversation("separate", system="be the cat")


@pytest.fixture
def spoken(checkpoints, monkeypatch):
    """``spoken(*answers)``: the command's model says these, and keeps what it is asked."""

    def patch(*answers):
        found = load_checkpoint(str(checkpoints("layerwise")))
        monkeypatch.setattr("modeling_t5gemma.commands.chat.load_checkpoint", lambda *_, **__: found)
        return Spoken(found.model, *answers), found.tokenizer

    return patch


def test_the_command(spoken, checkpoints, invoke):
    model, tokenizer = spoken([*LETTERS, TURN_END], [LETTERS[1], 1], [LETTERS[2], 1])
    lines = "the cat\n\n/help\na\n/clear\nthe mat\n/exit\nnever\n"
    result = invoke(chat, checkpoints("layerwise"), "--max-new-tokens", 20, input=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == " cab\nc\na\n" and "/clear begins" in result.stderr
    contents = [["the cat"], ["the cat", "cab", "a"], ["the mat"]]
    assert [
        tokenizer.apply_chat_template(
            [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
            add_generation_prompt=True,
            return_dict=False,
        )
        for texts in contents
    ] == model.asked


def test_the_command_with_the_real_generate(checkpoints, invoke):
    folder = checkpoints("decoder_only")
    result = invoke(chat, folder, "--max-new-tokens", 12, "--seed", 0, "--temperature", 0.8, input="the cat\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    again = invoke(chat, folder, "--max-new-tokens", 12, "--seed", 0, "--temperature", 0.8, input="the cat\n")
    assert again.stdout == result.stdout


def test_errors_of_the_command(spoken, checkpoints, invoke, tmp_path):
    folder = tmp_path / "base"
    MAKE["separate"]().save_pretrained(folder)
    make_tokenizer(None).save_pretrained(folder)
    result = invoke(chat, folder, "--max-new-tokens", 20, input="a\n")
    assert isinstance(result.exception, UserError)
    assert "no chat template" in str(result.exception) and "t5gemma generate" in str(result.exception)
    result = invoke(chat, checkpoints("separate"), "--max-new-tokens", 20, input="the cat " * 90 + "\n")
    assert isinstance(result.exception, UserError) and "/clear" in str(result.exception)
