"""Tokens on disk: memory-mapped shards with an index.

A folder with, for every shard, ``tokens-00000.bin`` (uint32, little-endian, documents end to end) and
``lengths-00000.npy`` (uint32, tokens of each document). ``index.json`` is written last, so a folder that has one is
whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..objectives import Tokens

FORMAT, DTYPE, INDEX = 1, "uint32", "index.json"
PARTIAL = ".partial"
# A document is found from the start of its group, so that starts take an eighth of a byte a document.
_GROUP = 64


@dataclass(frozen=True)
class Shard:
    """A shard's line in the index."""

    file: str
    lengths: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Vocabulary:
    """Which tokenizer made the tokens: where it came from, and the ``fingerprint`` of what its ids mean."""

    name: str
    fingerprint: str


class ShardWriter:
    """Collects documents and writes them as one shard after another.

    Args:
        folder: exists.
        shard_tokens: a shard is closed by the document that brings it to so many.
        shards: those that are written already.
        on_shard: called with all shards so far when one has just been completed.
    """

    def __init__(
        self,
        folder: Path,
        shard_tokens: int,
        shards: Sequence[Shard] = (),
        on_shard: Callable[[list[Shard]], None] = lambda shards: None,
    ) -> None:
        self.folder, self.shard_tokens, self.shards, self.on_shard = folder, shard_tokens, list(shards), on_shard
        self._documents: list[npt.NDArray[np.uint32]] = []
        self._tokens = 0

    def add(self, document: npt.NDArray[np.integer]) -> None:
        """One document's tokens, (length,).

        Raises:
            UserError: the disk is full.
        """
        self._documents.append(document.astype("<u4"))
        self._tokens += len(document)
        if self._tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as a shard, if anything was.

        Raises:
            UserError: the disk is full.
        """
        if not self._documents:
            return
        number = len(self.shards)
        shard = Shard(f"tokens-{number:05}.bin", f"lengths-{number:05}.npy", self._tokens, len(self._documents))
        write_atomically(self.folder / shard.file, (document.data for document in self._documents))
        lengths = io.BytesIO()
        np.save(lengths, np.array([len(document) for document in self._documents], "<u4"))
        write_atomically(self.folder / shard.lengths, [lengths.getvalue()])
        self._documents, self._tokens = [], 0
        self.shards.append(shard)
        self.on_shard(self.shards)

    def close(self, vocabulary: Vocabulary, made_from: Mapping[str, Any] | None = None) -> None:
        """Write the last shard, then the index.

        Args:
            made_from: what else the index should tell.

        Raises:
            UserError: the disk is full.
        """
        self.flush()
        index = {
            "format": FORMAT,
            "dtype": DTYPE,
            "tokenizer": asdict(vocabulary),
            "shards": [asdict(shard) for shard in self.shards],
            "made_from": dict(made_from or {}),
        }
        write_json(self.folder / INDEX, index)


class TokenShards:
    """The documents of a folder of shards, memory-mapped. Sent to another process, it opens the files there.

    Args:
        vocabulary: the tokenizer that the model uses; None takes any.

    Attributes:
        vocabulary: the tokenizer that made them.
        tokens: of all documents.

    Raises:
        UserError: the folder has no index (it is not complete), a file is missing or its size is not what the index
            says, or the tokens are another tokenizer's.
    """

    def __init__(self, folder: Path | str, vocabulary: Vocabulary | None = None) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        index = read_index(self.folder)
        self.vocabulary = Vocabulary(**index["tokenizer"])
        if vocabulary is not None and vocabulary.fingerprint != self.vocabulary.fingerprint:
            raise UserError(
                f"{self.folder} holds tokens of {self.vocabulary.name} (vocabulary "
                f"{self.vocabulary.fingerprint[:12]}), and the model uses {vocabulary.name} "
                f"({vocabulary.fingerprint[:12]}): the ids mean other words. Run `t5gemma tokenize` with the model's "
                "tokenizer."
            )
        shards = [Shard(**shard) for shard in index["shards"]]
        self.tokens = sum(shard.tokens for shard in shards)
        self._shards = [_Mapped(self.folder, shard) for shard in shards]
        self._ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Path]]:
        return TokenShards, (self.folder,)

    @property
    def lengths(self) -> npt.NDArray[np.uint32]:
        """Tokens of each document, uint32 (len,), read afresh from the disk."""
        return np.concatenate([np.zeros(0, np.uint32), *(shard.lengths for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, document: int) -> Tokens:
        """A document's tokens, int32, read-only, in the mapped file.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"{self.folder} has {len(self)} documents, so there is no document {document}.")
        shard = int(np.searchsorted(self._ends, document, side="right"))
        return self._shards[shard].document(document - (int(self._ends[shard - 1]) if shard else 0))


class _Mapped:
    """One shard's files."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        path, lengths_path = folder / shard.file, folder / shard.lengths
        for file in (path, lengths_path):
            if file.parent != folder:
                raise UserError(f"{folder / INDEX} names {file}, outside its folder. Tokenize again.")
            if not file.is_file():
                raise UserError(f"{file} is missing. Copy it again, or remove the folder and tokenize again.")
        if (size := path.stat().st_size) != 4 * shard.tokens:
            raise UserError(
                f"{path} has {size:,} bytes and by the index should have {4 * shard.tokens:,}. Copy it again, or "
                "remove the folder and tokenize again."
            )
        try:
            self.lengths: npt.NDArray[np.uint32] = np.load(lengths_path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UserError(f"{lengths_path} is damaged ({error}). Copy it again, or tokenize again.") from error
        groups = np.add.reduceat(self.lengths, np.arange(0, len(self.lengths), _GROUP), dtype=np.int64)
        self._starts = np.cumsum(groups) - groups
        if self.lengths.shape != (shard.documents,) or int(groups.sum()) != shard.tokens:
            raise UserError(
                f"{lengths_path} has {len(self.lengths):,} documents of {int(groups.sum()):,} tokens and by the index "
                f"should have {shard.documents:,} of {shard.tokens:,}. Copy it again, or tokenize again."
            )
        self._tokens: Tokens = np.memmap(path, "<u4", mode="r").view(np.ndarray).view("<i4")

    def document(self, number: int) -> Tokens:
        group = number // _GROUP
        start = int(self._starts[group]) + int(self.lengths[group * _GROUP : number].sum(dtype=np.int64))
        return self._tokens[start : start + int(self.lengths[number])]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards.

    Raises:
        UserError: there is none, or it is not one that this version reads.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: {folder} holds no finished shards. `t5gemma tokenize` makes them, and goes on "
            "where it was stopped."
        )
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        found = (index["format"], index["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged. Copy it again, or remove the folder and tokenize again.") from error
    if found != (FORMAT, DTYPE):
        raise UserError(
            f"{path} is of format {found[0]} with {found[1]} tokens; this version reads {FORMAT} with {DTYPE}."
        )
    return index


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``write_atomically`` for JSON."""
    write_atomically(path, [json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"])


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under a partial name, have it on the disk, and give it its name in one rename.

    Raises:
        UserError: the disk is full; the partial file is removed and what had the name before is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            with partial.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"No room left to write {path}. What was complete before is kept: free space and run it again."
            ) from error
        raise
