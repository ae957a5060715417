"""What the harness gets for its texts: which tokens are read and scored, and what is generated."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.evaluation.language_model import EvaluatedModel
from modeling_t5gemma.evaluation.scoring import Pair
from modeling_t5gemma.inference.loading import Checkpoint
from tests.evaluation.conftest import KINDS
from tests.evaluation.test_scoring import plainly
from tests.inference.conftest import MAKE, WORDS, make_tokenizer

TOKENIZER = make_tokenizer()
BOS, EOS = WORDS.index("<bos>"), WORDS.index("<eos>")
POSITIONS = 96


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = {kind: MAKE[kind](max_position_embeddings=POSITIONS) for kind in KINDS}
    return {kind: model if kind == "decoder_only" else model.double() for kind, model in made.items()}


@pytest.fixture
def model(models, kind):
    return models[kind]


def evaluated(model, **how) -> EvaluatedModel:
    return EvaluatedModel(Checkpoint(model, TOKENIZER, ()), **how)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def begin(kind: str) -> tuple[int, ...]:
    return () if kind == "separate" else (BOS,)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number, ("task", number, 1)) for number, each in enumerate(arguments)]


def scores(model, *pairs: tuple[str, str], **how) -> list[float]:
    return [value for value, _ in evaluated(model, **how).loglikelihood(requests("loglikelihood", *pairs))]


def close(model) -> dict[str, float]:
    return {"abs": 1e-9 if model.dtype == torch.float64 else 2e-3}


# Log-likelihoods


def test_a_continuation_begins_with_its_space(model, kind):
    """ " the" is the token sequence that it was in the whole text, wherever the caller put the space."""
    source, target = begin(kind) + ids("the cat"), ids("the cat the dog")[len(ids("the cat")) :]
    assert target[0] == WORDS.index("▁") and target[1] == WORDS.index("the")
    expected = plainly(model, Pair(source, target))[0]
    assert scores(model, ("the cat", " the dog"), ("the cat ", "the dog")) == pytest.approx(
        [expected] * 2, **close(model)
    )
    without = plainly(model, Pair(source, ids("the dog")))[0]
    assert scores(model, ("the cat", "the dog")) == pytest.approx([without], **close(model))
    assert abs(expected - without) > 0.1


def test_no_end_is_scored_unless_it_is_spelled(model, kind):
    source, target = begin(kind) + ids("the cat"), ids(" sat")
    ended = plainly(model, Pair(source, (*target, EOS)))[0]
    plain = plainly(model, Pair(source, target))[0]
    assert scores(model, ("the cat", " sat"), ("the cat", " sat<eos>")) == pytest.approx(
        [plain, ended], **close(model)
    )
    assert ended < plain


def test_a_token_across_the_cut_is_cut(model, kind):
    """ "t" and "he" together are the one token "the", of which no part can be scored."""
    assert ids("the") == (WORDS.index("the"),)
    expected = plainly(model, Pair(begin(kind) + ids("t"), ids("he")))[0]
    assert scores(model, ("t", "he")) == pytest.approx([expected], **close(model))


def test_an_empty_context_is_the_beginning(model):
    expected = plainly(model, Pair((BOS,), ids("the cat")))[0]
    spaced = plainly(model, Pair((BOS,), ids(" the cat")))[0]
    assert scores(model, ("", "the cat"), (" ", "the cat")) == pytest.approx([expected, spaced], **close(model))


def test_a_long_context_loses_its_beginning_and_is_counted(model, kind):
    long, target = "a cat " * 60, ids(" sat")
    room = POSITIONS - len(target) if kind != "separate" else POSITIONS
    first = begin(kind)
    source = first + ids(long.rstrip())[-(room - len(first)) :]
    lm = evaluated(model)
    found = lm.loglikelihood(requests("loglikelihood", (long, "sat"), ("a", " cat")))
    assert found[0][0] == pytest.approx(plainly(model, Pair(source, target))[0], **close(model))
    assert (lm.shortened["task"], lm.asked["task"]) == (1, 2)
    with pytest.raises(UserError, match=r"continuation of task has \d+ tokens, more"):
        lm.loglikelihood(requests("loglikelihood", ("a", "cat " * 60)))


# Texts without a context


def test_a_text_is_scored_in_blocks_each_token_once(model, kind):
    text = "the cat sat on a mat and the dog sat too"
    tokens, total = ids(text), 0.0
    assert 16 < len(tokens) < 64
    for start in range(0, len(tokens), 8):
        total += plainly(model, Pair((begin(kind) + tokens[:start]) or (BOS,), tokens[start : start + 8]))[0]
    (found,) = evaluated(model, block=8).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(total, **close(model))
    if kind == "decoder_only":
        assert found == pytest.approx(plainly(model, Pair((BOS,), tokens))[0], **close(model)), "cuts are of no matter"


def test_a_short_text_is_cut_in_half(models):
    tokens = ids("the cat")
    half = -(-len(tokens) // 2)
    model = models["separate"]
    expected = plainly(model, Pair((BOS,), tokens[:half]))[0] + plainly(model, Pair(tokens[:half], tokens[half:]))[0]
    lm = evaluated(model, block=64)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("the cat",))) == pytest.approx(
        [expected], abs=1e-9
    )
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]


def test_a_long_text_is_read_as_far_as_it_fits(models):
    model, text = models["separate"], "the cat sat on a mat " * 30
    tokens, block = ids(text), 32
    expected = sum(
        plainly(model, Pair(tokens[max(0, start - POSITIONS) : start] or (BOS,), tokens[start : start + block]))[0]
        for start in range(0, len(tokens), block)
    )
    lm = evaluated(model, block=block)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,))) == pytest.approx([expected], abs=1e-8)
    assert not lm.shortened, "that is how texts are cut"


def test_the_result_says_how_a_text_was_cut(models):
    told = {kind: evaluated(model, block=32).how_cut for kind, model in models.items()}
    assert "32 tokens" in told["separate"] and told["separate"] == told["layerwise"] != told["decoder_only"]


# Generation


@pytest.fixture(scope="module")
def written(models):
    """What each model writes by hand: 24 tokens behind each context."""
    texts = {}
    for kind, model in models.items():
        for context in ("the cat", "a", "the cat sat on the mat and "):
            source = torch.tensor([begin(kind) + ids(context)])
            output = model.generate(input_ids=source, do_sample=False, max_new_tokens=24)[0].tolist()
            given = 1 if model.config.is_encoder_decoder else source.shape[1]
            texts[kind, context] = TOKENIZER.decode(output[given:], skip_special_tokens=True)
    return texts


def test_generation_is_greedy_whatever_the_batches(model, kind, written):
    contexts = [context for of, context in written if of == kind]
    asked = requests("generate_until", *((each, {"until": ["<never>"], "max_gen_toks": 24}) for each in contexts))
    for rows in (1, None):
        assert evaluated(model, rows=rows).generate_until(asked) == [written[kind, each] for each in contexts]


def test_a_stop_ends_a_text_and_is_left_out(model, kind, written, monkeypatch):
    (context, text) = next((each, text) for (of, each), text in written.items() if of == kind and len(text) > 12)
    stop = text[6:8]
    calls = []
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    asked = {"until": [stop, "<never>"], "max_gen_toks": 24}
    assert evaluated(model).generate_until(requests("generate_until", (context, asked))) == [text.split(stop)[0]]
    assert len(calls) < 24, "nothing is generated behind it"


def test_a_stop_in_the_context_is_none(model, kind, written):
    asked = {"until": ["the cat"], "max_gen_toks": 24}
    found = evaluated(model).generate_until(requests("generate_until", ("the cat", asked)))
    assert found == [written[kind, "the cat"].split("the cat")[0]]


@pytest.mark.parametrize("asked", [{"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}, {"num_beams": 4}])
def test_drawn_text_is_refused(models, asked):
    with pytest.raises(UserError, match="task asks for drawn text or beams"):
        evaluated(models["separate"]).generate_until(requests("generate_until", ("a", {"until": ["b"], **asked})))


def test_more_text_than_positions_is_refused(models):
    with pytest.raises(UserError, match="answer to task may have 500 tokens"):
        evaluated(models["separate"]).generate_until(requests("generate_until", ("a", {"max_gen_toks": 500})))


# Conversations


def test_a_conversation_is_read_once_begun_and_its_answer_as_in_training(model, kind):
    lm = evaluated(model, chat=True)
    text = lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    turn = "<start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n"
    # As the template writes it; a source begins as its checkpoint says, whatever the text spells.
    assert text == "<bos>" + turn
    expected = plainly(model, Pair(begin(kind) + ids(turn), ids("sat")))[0]
    assert scores(model, (text, "sat"), chat=True) == pytest.approx([expected], **close(model))


def test_a_refused_system_message_goes_before_the_question(models):
    lm = evaluated(models["layerwise"], chat=True)
    text = lm.apply_chat_template([{"role": "system", "content": "Answer."}, {"role": "user", "content": "Why?"}])
    assert text.startswith("<bos><start_of_turn>user\nAnswer.\n\nWhy?<end_of_turn>")


def test_an_answer_that_has_begun_goes_on(models):
    lm = evaluated(models["layerwise"], chat=True)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("<start_of_turn>model\nBecause")


def test_without_a_template_there_are_no_conversations(models):
    with pytest.raises(UserError, match=r"no chat template.*--no-chat"):
        EvaluatedModel(Checkpoint(models["separate"], make_tokenizer(template=None), ()), chat=True)


# The harness's own model


def test_a_decoder_only_model_scores_as_in_the_harness(models):
    from lm_eval.models.huggingface import HFLM

    model = models["decoder_only"]
    theirs = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=make_tokenizer(),
        max_length=POSITIONS,
        batch_size=1,
        dtype="float32",
    )
    pairs = [
        ("the cat", " sat"),
        ("the cat sat ", "on a mat"),
        ("", "the dog"),
        ("Question: a\nAnswer:", " A"),
        ("a", "  b\n"),
    ]
    asked = requests("loglikelihood", *pairs)
    ours = evaluated(model)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    until = {"until": ["a"], "max_gen_toks": 16, "do_sample": False}
    asked = requests("generate_until", ("the cat", until), ("the dog sat on", until))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    theirs.add_bos_token = False  # or it would score a <bos> behind a <bos> as well
    asked = requests("loglikelihood_rolling", ("the cat sat on a mat and the dog sat too",))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked, disable_tqdm=True), abs=5e-3
    )
