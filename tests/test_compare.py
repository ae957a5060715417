"""examples/compare.py: what is asked, scored and told; small models in this process instead of one of their own."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_t5gemma.errors import UserError
from tests import tiny

pytestmark = pytest.mark.needs("datasets", "rouge_score", "sacrebleu")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "examples" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A decoder-only model, the layerwise encoder-decoder that computes the same, one with separate cross-attention,
    and a test."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compare")
    source = tiny.gemma3()
    for name, model in {"do": source, "ed": tiny.layerwise(source), "separate": tiny.t5gemma()}.items():
        model.save_pretrained(folder / name)
        tiny.word_tokenizer().save_pretrained(folder / name)
    rng = random.Random(0)
    lines = [
        {"prompt": " ".join(f"w{rng.randrange(5, tiny.VOCAB)}" for _ in range(3 + n)), "completion": f"w5 w{9 + n}"}
        for n in range(7)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def setup(script, folder: Path, **changed):
    given = dict(limit=100, max_source=64, max_target=6, batch_size=3, dtype="float32", timed=2, new_tokens=4)
    return script.Setup(str(folder / "test.jsonl"), **{**given, **changed})


@pytest.mark.parametrize(("name", "begin"), [("do", [2]), ("ed", [2]), ("separate", [])])
def test_questions_are_asked_as_in_training(script, folder, name, begin):
    how = setup(script, folder)
    asked = script.Asked.of(str(folder / name), how)
    words = tiny.word_tokenizer()
    expected = [begin + words(prompt, add_special_tokens=False)["input_ids"] for prompt, _ in script.read_test(how)]
    assert asked.sources == expected and asked.ends == [1] and asked.cut == 0
    cut = script.Asked.of(str(folder / name), setup(script, folder, max_source=4, limit=6))
    assert cut.cut == 4 and max(map(len, cut.sources)) == 4 + len(begin)


def test_answers_are_those_of_generate_one_by_one(script, folder):
    how = setup(script, folder)
    for name in ("do", "ed"):
        found = script.answer_and_time(str(folder / name), how)
        asked = script.Asked.of(str(folder / name), how)
        for source, answer in zip(asked.sources, found["answers"], strict=True):
            ids = asked.model.generate(torch.tensor([source]), do_sample=False, max_new_tokens=6)[0].tolist()
            new = ids[len(source) :] if name == "do" else ids[1:]
            assert answer == asked.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert len(found["first_token_seconds"]) == len(found["next_token_seconds"]) == 2
        assert found["parameters"] == sum(each.numel() for each in asked.model.parameters())
        assert found["weight_bytes"] == 4 * found["parameters"]


def test_everything_is_measured_once(script, folder, tmp_path, monkeypatch, capsys):
    called: list[tuple[str, str]] = []

    def here(function, *arguments, for_memory=False):
        called.append((function.__name__, Path(arguments[0]).name))
        return function(*arguments)

    monkeypatch.setattr(script, "in_own_process", here)
    given = dict(limit=5, max_source=64, max_target=6, batch_size=3, timed=2, new_tokens=4, output=tmp_path / "out")
    models = [f"enc-dec={folder / 'ed'}", f"dec={folder / 'do'}", f"enc-dec={folder / 'separate'}"]
    test = str(folder / "test.jsonl")
    script.main(test, models, **given, dtype=script.DType.float32)
    names = ("answer_and_time", "working_bytes")
    assert called == [(name, model) for model in ("ed", "separate", "do") for name in names]
    script.main(test, models, **given, dtype=script.DType.float32)
    assert len(called) == 6
    script.main(test, models[:1], **{**given, "max_target": 7}, dtype=script.DType.float32)
    assert len(called) == 8
    told = (tmp_path / "out" / "compared.md").read_text()
    assert told in capsys.readouterr().out and "| enc-dec | 1 |" in told and script.FIRST_SENTENCE in told
    summary = json.loads((tmp_path / "out" / "compared.json").read_text())
    assert summary["examples"] == 5 and summary["models"]["enc-dec"]["working_bytes"] > 0


def test_scores_of_known_answers(script):
    right = ["the cat sat on mats", "a quick dog", "nothing at all"]
    result = {"parameters": 1, "weight_bytes": 4, "working_bytes": 5, "answers_per_second": 2.0}
    result |= {"first_token_seconds": [0.5, 0.1, 0.3], "next_token_seconds": [0.25, 0.5]}
    results = {
        "good": [{**result, "answers": right}, {**result, "answers": [right[0], right[1], ""]}],
        "poor": [{**result, "answers": ["cats sitting", "dogs", ""]}],
    }
    found = script.compare(results, ["A first. And more.\n\nAsked:"] * 3, right)
    good, poor = found["models"]["good"], found["models"]["poor"]
    assert good["rouge_l_by_seed"] == [100, pytest.approx(200 / 3)] and good["rouge_l"] == pytest.approx(250 / 3)
    assert (good["exact_match"], poor["exact_match"]) == (pytest.approx(250 / 3), 0)
    # Of the stems "cat sit", one is in the right answer's five in order; of "dog", one of three.
    assert poor["rouge_l"] == pytest.approx(100 * (2 / (2 + 5) + 2 / (1 + 3)) / 3)
    assert good["first_token_seconds"] == 0.3 and good["tokens_per_second"] == 1 / 0.375
    (difference,) = found["differences"]
    assert (difference["of"], difference["to"]) == ("good", "poor")
    assert difference["rouge_l"] == pytest.approx(good["rouge_l"] - poor["rouge_l"])
    assert found["models"][script.FIRST_SENTENCE]["seeds"] == 1 and "good less poor: +" in script.table(found)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_as_wide_as_scores_vary(script, seeds):
    rng = np.random.default_rng(0)
    scores = rng.normal(50, 20, (1, 400)).repeat(seeds, axis=0)
    low, high = script.interval(script.resampled(scores, 2000))
    assert (high - low) / 2 == pytest.approx(1.96 * scores.std() / 20, rel=0.1)  # the seeds agree
    assert low < scores.mean() < high


def test_differences_are_paired(script):
    rng = np.random.default_rng(0)
    easy_and_hard = rng.normal(50, 20, (1, 400))
    better = easy_and_hard + 1 + rng.normal(0, 2, (1, 400))
    paired = script.interval(script.resampled(better, 2000) - script.resampled(easy_and_hard, 2000))
    assert 0.5 < paired[0] < 1 < paired[1] < 1.5  # the scores alone would give +-2.8
    assert script.interval(script.resampled(better, 99) - script.resampled(better, 99)) == [0, 0]


def test_seeds_that_disagree_widen_the_interval(script):
    scores = np.random.default_rng(0).normal(50, 5, (3, 400)) + np.array([[-5], [0], [5]])
    low, high = script.interval(script.resampled(scores, 2000))
    assert high - low > 8


@pytest.mark.parametrize("given", ["runs/do-0", "=runs/do-0", "a/b=runs/do-0", "label="])
def test_models_need_labels(script, given):
    with pytest.raises(UserError, match="has to be LABEL=CHECKPOINT"):
        script.labelled([given])
    assert script.labelled(["a=x", "b=y=z", "a=v"]) == {"a": ["x", "v"], "b": ["y=z"]}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Reads v1.2 files. Writes too.", "Reads v1.2 files."),
        ("No stop\n\nThe title:\n", "No stop"),
        ("All of it", "All of it"),
    ],
)
def test_the_first_sentence(script, text, first):
    assert script.first_sentence(text) == first
