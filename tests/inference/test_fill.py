"""Masks: sources as in training, answers cut at their sentinels, and nothing guessed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from modeling_t5gemma.commands import fill as module
from modeling_t5gemma.commands.fill import fill
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.filling import Masked, Spans
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.objectives import Denoiser, SpanCorruption, example_rng, save_sentinels
from tests.inference.conftest import SENTINELS, WORDS, make_tokenizer

IDS = tuple(WORDS.index(word) for word in SENTINELS)
EOS = 1
FEW = ("--max-new-tokens", 9)
A, B, C = (WORDS.index(letter) for letter in "abc")


@pytest.mark.parametrize("index", range(50))
def test_answers_of_the_objective_are_read_back(index):
    """Source and target of training, put together again, are the window."""
    sentinels = tuple(range(200, 260))
    objective = SpanCorruption(Denoiser(3.0, 0.3), sentinels, EOS)
    window = example_rng(1, 0, index).integers(10, 190, 20 + 3 * index).astype(np.int32)
    example = objective(window, example_rng(0, 0, index))
    masks = sum(int(token) in sentinels for token in example.source)
    spans = Spans.parse(example.target.tolist(), sentinels, masks, {EOS})
    assert not spans.problems
    fills, whole = iter(spans.tokens), []
    for token in example.source.tolist():
        whole += next(fills) if token in sentinels else [token]
    assert whole == window.tolist() and next(fills, None) is None


def test_the_source_is_that_of_training():
    """Where the masked words are, with the space before them, the tokens of the text have sentinels."""
    tokenizer = make_tokenizer()
    text, words = "the cat sat on the mat", (" cat", " on the")
    pieces = [tokenizer(piece, add_special_tokens=False).input_ids for piece in ("the", " sat", " mat")]
    assert [*pieces[0], *tokenizer(" cat", add_special_tokens=False).input_ids] == tokenizer(
        "the cat", add_special_tokens=False
    ).input_ids
    masked = Masked.parse("the <mask> sat <mask> mat")
    assert masked.source(tokenizer, IDS) == [*pieces[0], IDS[0], *pieces[1], IDS[1], *pieces[2]]
    assert masked.source(tokenizer, IDS, mode=77)[:2] == [77, *pieces[0][:1]]
    assert "".join(part for part, _ in masked.filled(list(words))) == text
    assert masked.filled(["cat", None]) == [
        ("the", False), (" cat", True), (" sat", False), (" <mask>", False), (" mat", False)
    ]  # fmt: skip


def test_special_tokens_in_the_text_are_text():
    source = Masked.parse("a <eos> <mask>").source(make_tokenizer(), IDS)
    assert EOS not in source and source[-1] == IDS[0]


@pytest.mark.parametrize("text", ["no mask", "<MASK>", "a <mask><mask> b", "a <mask> <mask> b"])
def test_masks_that_cannot_be(text):
    with pytest.raises(UserError, match=r"has no <mask>|nothing between"):
        Masked.parse(text)


def test_too_many_masks():
    with pytest.raises(UserError, match="5 masks, and the model has 4 sentinels"):
        Masked.parse("<mask> a " * 5).source(make_tokenizer(), IDS)


S0, S1, S2, _ = IDS


@pytest.mark.parametrize(
    "answer, tokens, problems",
    [
        ([S0, A, B, S1, C, EOS], ((A, B), (C,)), []),
        ([S0, A, S1, C, EOS, S0, B], ((A,), (C,)), []),
        ([S0, A, S1, C], ((A,), (C,)), ["does not end"]),
        ([], (None, None), ["does not end", "mask 1 has no sentinel", "mask 2 has no sentinel"]),
        ([S0, A, EOS], ((A,), None), ["mask 2 has no sentinel"]),
        ([A, B, EOS], (None, None), ["2 tokens before", "mask 1", "mask 2"]),
        ([B, S0, A, S1, C, EOS], ((A,), (C,)), ["1 tokens before"]),
        ([S1, C, S0, A, EOS], ((A,), (C,)), ["out of order: 2, 1"]),
        ([S0, A, S1, C, S2, B, EOS], ((A,), (C,)), ["does not have: 3"]),
        ([S0, A, S1, C, S0, B, EOS], (None, (C,)), ["out of order", "mask 1 has 2 fills"]),
        ([S0, A, S0, A, S1, C, EOS], (None, (C,)), ["mask 1 has 2 fills"]),
        ([S0, S1, C, EOS], ((), (C,)), ["mask 1 has an empty fill"]),
    ],
)
def test_what_is_wrong_with_an_answer_is_told(answer, tokens, problems):
    spans = Spans.parse(answer, IDS, 2, {EOS})
    assert spans.tokens == tokens
    assert len(spans.problems) == len(problems)
    for found, expected in zip(spans.problems, problems):
        assert expected in found


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("layerwise"), tmp_path / "model")


@pytest.fixture
def answered(monkeypatch):
    """``answered(ids)``: the model says these; returns what it is asked."""

    def patch(answer):
        asked = []
        monkeypatch.setattr(module, "generate_ids", lambda model, rows, *_, **__: asked.extend(rows) or [answer])
        return asked

    return patch


def test_round_trip(folder, answered, invoke):
    save_sentinels(folder, IDS[::-1])
    tokenizer = make_tokenizer()
    cat, on = (tokenizer(text, add_special_tokens=False).input_ids for text in (" cat", " on the"))
    asked = answered([IDS[3], *cat, IDS[2], *on, EOS])
    text = "the <mask> sat <mask> mat"
    result = invoke(fill, folder, text, *FEW)
    assert result.exit_code == 0, result.output
    assert result.stdout == "the cat sat on the mat\n" and not result.stderr
    assert asked[0] == [2, *Masked.parse(text).source(tokenizer, IDS[::-1])], "behind <bos>: layerwise"
    made = json.loads(invoke(fill, folder, text, *FEW, "--json").stdout)
    assert made == {"text": "the cat sat on the mat", "spans": ["cat", "on the"], "problems": []}


def test_problems_end_with_exit_code_1(folder, answered, invoke):
    save_sentinels(folder, IDS)
    answered([IDS[1], A, EOS])
    result = invoke(fill, folder, "the <mask> sat <mask>.", *FEW)
    assert result.exit_code == 1
    assert result.stdout == "the <mask> sat a.\n"
    assert "problem: mask 1 has no sentinel" in result.stderr


def test_the_real_generate(folder, invoke):
    save_sentinels(folder, IDS)
    result = invoke(fill, folder, "the <mask> sat", *FEW, "--json")
    assert set(json.loads(result.stdout)) == {"text", "spans", "problems"}, result.output


def test_sentinels_of_the_vocabulary_are_told(folder, answered, invoke):
    asked = answered([IDS[0], A, EOS])
    result = invoke(fill, folder, "the <mask> sat", *FEW)
    assert result.exit_code == 0 and "taking <unused0>" in result.stderr
    assert IDS[0] in asked[0]


def test_modes(folder, answered, invoke):
    save_sentinels(folder, IDS[:2])
    asked = answered([IDS[0], A, EOS])
    (folder / "run.json").write_text(json.dumps({"recipe": {"mode_tokens": {"R": IDS[3]}}}))
    for mode, token in (("R", IDS[3]), ("<unused2>", IDS[2])):
        assert invoke(fill, folder, "the <mask>", *FEW, "--mode", mode).exit_code == 0
        assert asked.pop()[:2] == [2, token]
    result = invoke(fill, folder, "the <mask>", *FEW, "--mode", "X")
    assert isinstance(result.exception, UserError) and "the run's modes are R" in str(result.exception)


def test_errors_of_the_command(folder, checkpoints, answered, invoke):
    answered([])

    def refused(checkpoint, text="the <mask>"):
        result = invoke(fill, checkpoint, text, *FEW)
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    assert "has no <mask>" in refused(folder, "the cat")
    assert "decoder-only" in refused(checkpoints("decoder_only"))
    save_sentinels(folder, [])
    assert "lists no sentinels" in refused(folder)
    save_sentinels(folder, [5000])
    assert "sentinel 5000, and the model has 320 words" in refused(folder)
    save_sentinels(folder, IDS)
    assert "reads at most 247" in refused(folder, "the <mask> " + "cab " * 90)
    (folder / "sentinels.json").unlink()
    tokenizer = make_tokenizer()
    words = {word: i for i, word in enumerate(WORDS) if word not in SENTINELS}
    type(tokenizer)(vocab=words, merges=[]).save_pretrained(folder)
    assert "<unusedN>" in refused(folder)
    assert load_checkpoint(str(folder)).file("sentinels.json") is None
