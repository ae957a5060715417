"""Shards give back what was written, and a folder that is not whole is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.shards import ShardWriter, TokenShards, Vocabulary, write_atomically

WORDS = Vocabulary("words", "a" * 64)


def write(folder: Path, lengths: list[int], shard_tokens: int = 1000) -> list[np.ndarray]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256_000, length) for length in lengths]
    writer = ShardWriter(folder, shard_tokens)
    for document in documents:
        writer.add(document)
    writer.close(WORDS)
    return documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "shards", [10, 20, 30] * 10, shard_tokens=200)
    return tmp_path / "shards"


@pytest.mark.parametrize("shard_tokens", [1000, 5000, 10**9])
def test_documents_come_back(tmp_path: Path, shard_tokens: int):
    lengths = np.random.default_rng(1).integers(0, 200, 300).tolist()
    documents = write(tmp_path / "shards", lengths, shard_tokens)
    shards = TokenShards(tmp_path / "shards", WORDS)
    assert len(shards) == 300 and shards.tokens == sum(lengths) and shards.lengths.tolist() == lengths
    for number in (*range(300), 0, 299):
        assert shards[number].dtype == np.int32 and np.array_equal(shards[number], documents[number])
    assert not list((tmp_path / "shards").glob(".*"))


def test_shards_close_at_their_size(folder: Path):
    shards = json.loads((folder / "index.json").read_text())["shards"]
    # Of 10, 20, 30, 10, ... the 10th is the first to reach 200, the 20th brings 210 more, and 10 are left.
    assert [(shard["documents"], shard["tokens"]) for shard in shards] == [(11, 210), (10, 210), (9, 180)]
    for shard in shards:
        assert (folder / shard["file"]).stat().st_size == 4 * shard["tokens"]


def test_no_documents(tmp_path: Path):
    write(tmp_path / "shards", [])
    assert len(TokenShards(tmp_path / "shards")) == 0


def test_another_process_maps_the_files_itself(folder: Path):
    shards = TokenShards(folder)
    sent = pickle.dumps(shards)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent)[29], shards[29])


def test_documents_cannot_be_changed(folder: Path):
    with pytest.raises(ValueError, match="read-only"):
        TokenShards(folder)[0][0] = 1


@pytest.mark.parametrize("number", [-1, 30])
def test_no_such_document(folder: Path, number: int):
    with pytest.raises(IndexError, match="30 documents"):
        TokenShards(folder)[number]


def test_another_tokenizer(folder: Path):
    with pytest.raises(UserError, match=r"words .*the model uses other"):
        TokenShards(folder, Vocabulary("other", "b" * 64))
    TokenShards(folder, Vocabulary("elsewhere", WORDS.fingerprint))


def test_without_index(folder: Path):
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="no finished shards"):
        TokenShards(folder)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "lengths-00001.npy"])
def test_damaged_files_are_named(folder: Path, name: str):
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[:-4], content[:-4] + b"\x01\0\0\0" if name.startswith("lengths") else content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            TokenShards(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenShards(folder)


@pytest.mark.parametrize(
    "change", [lambda text: text[:40], lambda text: "[]", lambda text: text.replace('"uint32"', '"uint16"')]
)
def test_damaged_index(folder: Path, change):
    path = folder / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=r"index\.json"):
        TokenShards(folder)


def test_index_names_only_its_own_folder(folder: Path):
    path = folder / "index.json"
    path.write_text(path.read_text().replace("tokens-00000.bin", "../tokens-00000.bin"))
    with pytest.raises(UserError, match="outside"):
        TokenShards(folder)


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "file", [b"old"])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No room left"):
        write_atomically(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
