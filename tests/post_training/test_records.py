"""Records from files: what is there is read, what is not is told."""

from __future__ import annotations

import json

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.records import UNUSABLE, load_records, require_columns
from tests.post_training.chat import assistant, user, write

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)]


def test_every_kind_of_file_has_the_same_records(tmp_path):
    import datasets

    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert load_records(str(tmp_path / name)).to_list() == ROWS


def test_a_folder_has_splits_by_the_names_of_its_files(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:2])
    assert len(load_records(str(tmp_path))) == 5
    assert len(load_records(str(tmp_path), split="test")) == 2
    with pytest.raises(UserError, match="validation"):
        load_records(str(tmp_path), split="validation")


def test_arguments_of_different_tools_keep_their_own_keys(tmp_path):
    """A table whose rows share one schema would give each call the other's keys."""
    calls = [{"tool_calls": [{"function": {"name": "f", "arguments": {key: 1}}}]} for key in ("x", "y")]
    rows = [{"messages": [user("go"), {**assistant(""), **call}]} for call in calls]
    found = load_records(write(tmp_path / "calls.jsonl", rows)).to_list()
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert [{k: v for k, v in each.items() if v is not None} for each in arguments] == [{"x": 1}, {"y": 1}]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.jsonl", None, "does not exist"),
        ("./nowhere", None, "does not exist"),
        ("broken.jsonl", '{"a": \n', r"broken.jsonl:1: not valid JSON"),
        ("list.jsonl", "\n[1]\n", r"list.jsonl:2: not an object"),
        ("empty.jsonl", "", "cannot be read|no records"),
        ("text.txt", "hello", "none of .jsonl, .json, .parquet"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_records(name if name.startswith("./") else str(path))


def test_bad_lines_are_rows_with_a_reason(tmp_path):
    """Ones that end a table's own reader with an error, or its process with a crash."""
    lines = ['{"a": "b"}', '{"a": ', "[1]", '{"a": 3}', '{"b": "\\ud800"}', '{"a":' * 100_000 + "1" + "}" * 100_000]
    lines += ['{"a":' + "[" * 100 + "]" * 100 + "}"]
    (tmp_path / "rows.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b'\n{"a": "\xff"}')
    records = load_records(str(tmp_path / "rows.jsonl"))
    assert records["a"][:] == ["b", None, None, 3, None, None, None, None]
    assert records[UNUSABLE][:] == [
        None,
        "not valid JSON",
        "not an object with columns",
        None,
        "not Unicode (a lone surrogate)",
        "not valid JSON",
        "nested deeper than 64 levels",
        "not UTF-8",
    ]
    (tmp_path / "rows.jsonl").write_text('{"a": "changed"}\n')
    assert load_records(str(tmp_path / "rows.jsonl")).to_list() == [{"a": "changed"}]


def test_missing_columns_are_told_with_those_found(tmp_path):
    records = load_records(write(tmp_path / "rows.jsonl", ROWS))
    require_columns(records, ["prompt"], "rows")
    with pytest.raises(UserError, match=r"rows has no column 'chosen', 'rejected'. It has 'prompt', 'completion'"):
        require_columns(records, ["prompt", "chosen", "rejected"], "rows")
