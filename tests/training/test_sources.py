"""Sources: every record once, bad ones named, whatever the kind of file."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training import sources
from modeling_t5gemma.training.sources import BadRecord, BadRecords, Record, TextSource

TEXTS = ["one", "two two", "three"]


def texts(source: TextSource, start: int = 0) -> list[str]:
    return [record.text for record in source.texts(BadRecords(0), start)]


def write_parquet(path: Path, rows: dict[str, list]) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(rows), path)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"texts.{kind.split('-')[0]}"
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    lines = "\n".join(json.dumps(row) for row in rows)
    if kind == "parquet":
        write_parquet(path, {"id": [0, 1, 2], "text": TEXTS})
    elif kind == "json-array":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "txt":
        path.write_text("\n".join(TEXTS))
    else:
        path.write_text("\n" + lines + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "json-array", "parquet"])
def test_every_kind_gives_the_records_from_any_start(tmp_path: Path, kind: str):
    source = TextSource(str(write(tmp_path, kind)))
    for start in range(4):
        assert texts(source, start) == TEXTS[start:]
    (first, *_) = source.read()
    assert isinstance(first, Record) and "texts." in first.where


def test_plain_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n\nthree\n")
    assert texts(TextSource(str(path))) == ["one\ntwo\n\n\nthree\n"]
    assert texts(TextSource(str(path), sample_by="paragraph")) == ["one\ntwo", "three"]
    assert texts(TextSource(str(path), sample_by="line")) == ["one", "two", "three"]
    assert [record.where for record in TextSource(str(path), sample_by="paragraph").read()] == [
        f"{path}:1",
        f"{path}:5",
    ]


def test_globs_and_folders_go_by_name(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert texts(TextSource(str(tmp_path))) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(TextSource(str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    assert texts(TextSource(str(tmp_path / "**" / "*.txt")), start=2) == ["sub/c.txt"]


def test_bad_records_are_named_and_skipped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"body": "b", "id": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": " \\n"}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "fine"}',
    ]
    path.write_bytes(b"\n".join(lines))
    bad = BadRecords(8)
    assert [record.text for record in TextSource(str(path)).texts(bad)] == ["good", "fine"]
    assert bad.reasons == {
        "not valid JSON": 1,
        "not UTF-8": 1,
        "no column 'text' (has 'body', 'id')": 1,
        "text is int, not a string": 1,
        "text is NoneType, not a string": 1,
        "empty text": 1,
        "not an object with columns": 1,
        "not Unicode (a lone surrogate)": 1,
    }
    assert bad.first[0] == f"{path}:2: not valid JSON" and len(bad.first) == 5
    with pytest.raises(UserError, match=r"More than 7 bad records.*a\.jsonl:2: not valid JSON"):
        list(TextSource(str(path)).texts(BadRecords(7)))


def test_text_of_another_system(tmp_path: Path):
    """Windows' line ends are one character, a missing last one is no matter, and NULs are no text."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert texts(TextSource(str(path))) == ["one\ntwo\n\nthree"]
    assert texts(TextSource(str(path), sample_by="paragraph")) == ["one\ntwo", "three"]
    assert texts(TextSource(str(path), sample_by="line")) == ["one", "two", "three"]
    path.write_bytes("one".encode("utf-16-le"))
    assert [record.reason for record in TextSource(str(path)).read()] == ["NUL characters (damaged, or UTF-16)"]


def test_text_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert list(TextSource(str(tmp_path)).read()) == [BadRecord("not UTF-8", str(tmp_path / "a.txt"))]


@pytest.mark.parametrize("content, name", [("[1,", "a.json"), ("PAR1", "a.parquet")])
def test_damaged_files_are_named(tmp_path: Path, content: str, name: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        list(TextSource(str(tmp_path / name)).read())


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path):
    with pytest.raises(UserError, match=r"no column 'body'\. It has 'id', 'text'"):
        list(TextSource(str(write(tmp_path, "parquet")), column="body").read())


def test_bad_records_of_parquet(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", {"text": ["one", None, ""]})
    found = list(TextSource(str(tmp_path)).read())
    assert [getattr(record, "reason", "good") for record in found] == [
        "good",
        "text is NoneType, not a string",
        "empty text",
    ]
    assert found[1].where == f"{tmp_path / 'a.parquet'}, record 2"


@pytest.mark.parametrize(
    "files, path, message",
    [
        ([], "missing.jsonl", "does not exist"),
        ([], "no such/thing/here", "does not exist"),
        ([], "*.txt", "holds no files"),
        (["a.jsonl", "b.csv"], ".", "b.csv is none of"),
        (["a.jsonl", "README.md"], ".", "several kinds"),
    ],
)
def test_places_that_cannot_be_read(tmp_path: Path, files: list[str], path: str, message: str):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        TextSource(str(tmp_path / path)).files()


def test_options_of_the_hub_are_refused_for_files(tmp_path: Path):
    with pytest.raises(UserError, match="is local"):
        TextSource(str(write(tmp_path, "jsonl")), split="test").files()


@pytest.mark.parametrize("options", [dict(weight=-1.0), dict(weight=float("inf")), dict(sample_by="word")])
def test_values_out_of_range(options):
    with pytest.raises(UserError):
        TextSource("a.txt", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, streaming: bool):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(path: str, **options):
        asked.update(options, path=path)
        rows = datasets.Dataset.from_dict({"id": [0, 1, 2], "body": TEXTS})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(sources, "import_datasets", lambda: types.SimpleNamespace(load_dataset=load_dataset))
    source = TextSource("owner/set", "en", "test", "body", streaming=streaming, revision="abc")
    for start in range(4):
        assert texts(source, start) == TEXTS[start:]
    assert asked == dict(path="owner/set", name="en", split="test", streaming=streaming, revision="abc")
    assert next(record.where for record in source.read(1)) == "owner/set (test), record 2"


def test_a_data_set_that_is_not_there():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="owner/set cannot be read"):
        list(TextSource("owner/set").read())


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"modeling_t5gemma\[train\]"):
        list(TextSource("owner/set").read())
