"""Casting, labels and metrics of the tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.superglue.data import SPLITS, hub_rows, read_cases
from modeling_t5gemma.superglue.metrics import measure
from modeling_t5gemma.superglue.submission import submission
from modeling_t5gemma.superglue.tasks import TASKS, tasks_named
from tests.superglue.parts import FIXTURES

SIZES = {"boolq": (12, 8, 4), "cb": (12, 8, 4), "copa": (12, 8, 4), "multirc": (12, 8, 4)} | {
    name: (12, 8, 4) for name in ("rte", "wic", "wsc")
}


def first(task: str, split: str = "train", number: int = 0):
    return read_cases(str(FIXTURES), TASKS[task], split)[number]


@pytest.mark.parametrize(
    ("task", "texts"),
    [
        ("boolq", ["boolq passage: The mill at Harrow Bend .* question: was the wheel of the mill .*"]),
        ("cb", ["cb premise: A: Did .* hypothesis: Mara signed for the parcel"]),
        (
            "copa",
            [
                "copa premise: The kettle began to whistle. question: cause choice: The water was boiling.",
                "copa premise: The kettle .* choice: The cup was empty.",
            ],
        ),
        ("multirc", ["multirc paragraph: Sent 1: Ada and .* Marl. Sent 2: They .* question: Who .* answer: Ada"]),
        ("rte", ["rte premise: The museum .* hypothesis: The firm .*"]),
        ("wic", ["wic sentence1: We sat .* sentence2: The bank of .* word: bank"]),
        ("wsc", [r"wsc text: \* The nurse \* thanked the driver because he had waited for # her. #"]),
    ],
)
def test_texts_have_the_form_name_value(task, texts):
    import re

    found = [text.joined() for text in first(task).texts]
    assert len(found) == len(texts)
    for got, expected in zip(found, texts, strict=True):
        assert re.fullmatch(expected, got), got


@pytest.mark.parametrize("task", TASKS)
def test_fixtures_are_read_whole(task):
    for split, count in zip(("train", "val", "test"), SIZES[task], strict=True):
        cases = read_cases(str(FIXTURES), TASKS[task], split)
        assert len(cases) == count
        assert {case.label for case in cases} == ({None} if split == "test" else set(range(len(TASKS[task].labels))))
        assert len({case.key for case in cases}) == count


def test_labels_mean_what_the_hub_means():
    assert first("boolq").label == 0 and first("boolq", number=1).label == 1
    assert [first("cb", number=n).label for n in range(3)] == [0, 2, 1]
    assert first("rte").label == 0 and first("rte", number=1).label == 1


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=2, max_size=9), st.data())
def test_wsc_marks_two_spans_and_nothing_else(words, data):
    spans = []
    for _ in range(2):
        begin = data.draw(st.integers(0, len(words) - 1))
        spans.append((begin, data.draw(st.integers(begin + 1, len(words)))))
    row = {"text": " ".join(words), "idx": 0}
    for n, (begin, end) in enumerate(spans, 1):
        row |= {f"span{n}_index": begin, f"span{n}_text": " ".join(words[begin:end])}
    (case,) = TASKS["wsc"].cases(row, "here", labelled=False)
    marked = case.texts[0].long.split()
    assert [word for word in marked if word not in "*#"] == words
    for (begin, end), mark, other in zip(spans, "*#", "#*", strict=True):
        one = [word for word in marked if word != other]
        assert one == [*words[:begin], mark, *words[begin:end], mark, *words[end:]]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("boolq", {"label": 2}, r"train.jsonl:1: the label of boolq is 2.*false, true"),
        ("boolq", {"label": "entailment"}, "the label of boolq"),
        ("cb", {"label": True}, "label of cb is True"),
        ("cb", {"label": -1}, "label of cb is -1"),
        ("copa", {"label": None}, "label of copa is None"),
        ("rte", {"label": ...}, r"no column 'label'. It has 'premise', 'hypothesis', 'idx'"),
        ("rte", {"premise": ...}, r"no column 'premise'. It has"),
        ("rte", {"premise": 3}, "premise is 3, of the wrong kind"),
        ("wsc", {"target": ...}, "no column 'span1_index'"),
        (
            "wsc",
            {"target": {"span1_index": 40, "span1_text": "x", "span2_index": 0, "span2_text": "y"}},
            "span1 is at word 40",
        ),
        ("multirc", {"passage": {"text": "a"}}, "no column 'questions'"),
    ],
)
def test_bad_records_are_named(task, change, message, tmp_path):
    folder = tmp_path / TASKS[task].folder
    folder.mkdir()
    row = json.loads((FIXTURES / TASKS[task].folder / "train.jsonl").read_text().splitlines()[0])
    row = {name: value for name, value in {**row, **change}.items() if value is not ...}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read_cases(str(tmp_path), TASKS[task], "train")


def test_data_that_is_not_there(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"neither BoolQ/train.jsonl .* boolq/train\*.parquet .* It holds other"):
        read_cases(str(tmp_path), TASKS["boolq"], "train")
    with pytest.raises(UserError, match="is no folder"):
        read_cases(str(tmp_path / "none"), TASKS["boolq"], "train")
    (tmp_path / "BoolQ").mkdir()
    (tmp_path / "BoolQ" / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_cases(str(tmp_path), TASKS["boolq"], "train")
    (tmp_path / "BoolQ" / "train.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"train.jsonl:1 is not valid JSON"):
        read_cases(str(tmp_path), TASKS["boolq"], "train")


def test_names_of_tasks():
    assert [task.name for task in tasks_named("all")] == list(TASKS)
    assert [task.name for task in tasks_named("cb, boolq,cb")] == ["cb", "boolq"]
    with pytest.raises(UserError, match="no task record"):
        tasks_named("record")


def test_the_hubs_columns_say_the_same(tmp_path):
    """Parquet files as they are on the Hub give the cases of the official files."""
    datasets = pytest.importorskip("datasets")
    for task in TASKS.values():
        for split, hub in (("train", "train"), ("test", "test")):
            rows = []
            for line in (FIXTURES / task.folder / f"{split}.jsonl").read_text().splitlines():
                rows += _as_on_the_hub(task, json.loads(line))
            (tmp_path / task.name).mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / task.name / f"{hub}-00000-of-00001.parquet")
            official, parquet = (read_cases(str(p), task, split) for p in (FIXTURES, tmp_path))
            assert [(c.texts, c.label, c.key) for c in official] == [(c.texts, c.label, c.key) for c in parquet]


def test_the_hubs_names_of_tasks_and_splits(tmp_path):
    """What is asked of ``datasets`` finds a repository laid out like aps/super_glue: a configuration for each task."""
    datasets = pytest.importorskip("datasets")
    configs = []
    for task in TASKS.values():
        data_files = []
        for split in SPLITS.values():
            (tmp_path / task.name).mkdir(exist_ok=True)
            rows = datasets.Dataset.from_list([{"idx": 0, "task": task.name, "split": split}])
            rows.to_parquet(tmp_path / task.name / f"{split}-00000-of-00001.parquet")
            data_files.append({"split": split, "path": f"{task.name}/{split}-*"})
        configs.append({"config_name": task.name, "data_files": data_files})
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for task in TASKS.values():
        for split in SPLITS.values():
            (row,) = hub_rows(str(tmp_path), name=task.name, split=split, revision=None)
            assert (row["task"], row["split"]) == (task.name, split)
    with pytest.raises(UserError, match="cannot be read"):
        hub_rows(str(tmp_path), name="record", split="train")


def _as_on_the_hub(task, row):
    number = {str(label).lower(): n for n, label in enumerate(task.labels)}
    if task.name == "multirc":
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                yield {
                    "paragraph": row["passage"]["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
                    "label": answer.get("label", -1),
                }
        return
    row |= row.pop("target", {})
    yield {**row, "label": number[str(row["label"]).lower()] if "label" in row else -1}


labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@settings(deadline=None)
@given(labels)
def test_macro_f1_is_scikit_learns(pairs):
    oracle = pytest.importorskip("sklearn.metrics")
    gold, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    found = measure(TASKS["cb"], [(n,) for n in range(len(gold))], gold, predicted)
    assert found["f1"] == pytest.approx(oracle.f1_score(gold, predicted, average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(gold, predicted))
    assert found["score"] == pytest.approx((found["f1"] + found["accuracy"]) / 2)


@settings(deadline=None)
@given(labels)
def test_multirc_counts_answers_and_whole_questions(pairs):
    oracle = pytest.importorskip("sklearn.metrics")
    gold, predicted = (np.array([min(x, 1) for x in side]) for side in zip(*pairs, strict=True))
    keys = [(n // 6, n // 2, n) for n in range(len(gold))]
    found = measure(TASKS["multirc"], keys, gold, predicted)
    assert found["f1a"] == pytest.approx(oracle.f1_score(gold, predicted, zero_division=0))
    questions = {key[:2] for key in keys}
    right = [all(g == p for k, g, p in zip(keys, gold, predicted, strict=True) if k[:2] == q) for q in questions]
    assert found["em"] == pytest.approx(np.mean(right))


def test_submissions_are_the_official_ones():
    def lines(task, keys, classes):
        return [json.loads(line) for line in submission(TASKS[task], keys, classes).splitlines()]

    assert lines("boolq", [(7,), (8,)], [1, 0]) == [{"idx": 7, "label": "true"}, {"idx": 8, "label": "false"}]
    assert lines("wic", [(0,)], [1]) == [{"idx": 0, "label": "true"}]
    assert lines("wsc", [(0,)], [1]) == [{"idx": 0, "label": "True"}]
    assert lines("cb", [(0,)], [2]) == [{"idx": 0, "label": "neutral"}]
    assert lines("rte", [(0,)], [1]) == [{"idx": 0, "label": "not_entailment"}]
    assert lines("copa", [(3,)], [1]) == [{"idx": 3, "label": 1}]
    assert lines("multirc", [(0, 0, 0), (0, 0, 1), (0, 1, 2), (4, 9, 30)], [1, 0, 0, 1]) == [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                    {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
                ]
            },
        },
        {"idx": 4, "passage": {"questions": [{"idx": 9, "answers": [{"idx": 30, "label": 1}]}]}},
    ]
