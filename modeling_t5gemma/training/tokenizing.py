"""Text to tokens: on the fly, or once by many processes into shards.

One process reads the source and writes the shards, the others tokenize what it hands out, and the results are taken in
the order of the records: so the shards don't depend on how many processes there are. A shard that is complete is kept
when a run is stopped, and the next run goes on behind its last record.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..conversion.tokenizers import load_gguf_tokenizer
from ..errors import UserError
from ..io import checkpoints
from ..io.checkpoints import is_gguf, locate
from ..io.fields import vocabulary_size
from ..io.text_files import read_json
from ..objectives import Tokens
from ..text.rules import with_rows
from .shards import INDEX, PARTIAL, Shard, ShardWriter, Vocabulary, read_index, write_json
from .sources import BadRecord, BadRecords, Record, TextSource

PROGRESS = "progress.json"
_NO_TOKENS = "no tokens"
# What goes to a process at once: enough that sending it costs little, and little enough to be held for each process.
_BATCH_CHARACTERS, _BATCH_RECORDS = 1 << 20, 1024
_BATCHES_A_PROCESS = 3
# Characters that are tokenised at once, and how far before their end a place to cut is looked for.
_PIECE, _NEAR = 1 << 20, 1 << 12
_SPACE = re.compile(r"(?<=\S) (?=\S)")

Batch: TypeAlias = list[Record | BadRecord]


@dataclass(frozen=True)
class Tokenized:
    """What a folder of shards holds.

    Attributes:
        records: of the source, read.
        skipped: how many of them for each reason.
        first_skipped: the first few, named.
        kept: documents that an earlier run had written.
    """

    documents: int
    tokens: int
    records: int
    skipped: dict[str, int]
    first_skipped: list[str]
    kept: int


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder, of a GGUF file (one beside it comes first) or of a Hub repository. No text becomes a
    token for which the model beside it has no embedding.

    Raises:
        UserError: there is none, or it belongs to another model.
    """
    place = locate(path, weights=False)
    tokenizer = load_gguf_tokenizer(place) if is_gguf(place) else checkpoints.load_tokenizer(place)
    tokenizer.model_max_length = 1 << 62  # a document may be longer than the model's input: it is cut later
    if not (place / checkpoints.CONFIG).is_file():
        return tokenizer
    config = read_json(place / checkpoints.CONFIG)
    rows = [vocabulary_size(config), (config.get("encoder") or {}).get("vocab_size")]
    return with_rows(tokenizer, min(filter(None, rows))) if any(rows) else tokenizer


def vocabulary_of(tokenizer: Any, name: str) -> Vocabulary:
    """What tells tokenizers apart: SHA-256 of the vocabulary sorted by token, and of the special tokens' ids."""
    special = {role: tokenizer.convert_tokens_to_ids(token) for role, token in tokenizer.special_tokens_map.items()}
    content = [sorted(tokenizer.get_vocab().items()), sorted(special.items())]
    return Vocabulary(name, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each text, int32, without special tokens: a text that spells one ("<pad>") gets ordinary tokens.

    Left to itself a tokenizer would turn the spelling into padding, an end of sequence or a sentinel. A long text is
    tokenised in pieces, which are cut before a single space, where words begin: a tokenizer takes 200 bytes for each
    character.
    """
    if not texts:
        return []
    pieces = [_pieces(text) for text in texts]
    encoded = tokenizer(
        [first for first, *_ in pieces],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    made = [np.array(ids, np.int32) for ids in encoded["input_ids"]]
    return [
        np.concatenate([ids, *(encode(tokenizer, [piece])[0] for piece in more)])
        for ids, (_, *more) in zip(made, pieces)
    ]


def _pieces(text: str) -> list[str]:
    pieces = []
    begin = 0
    while len(text) - begin > _PIECE:
        end = begin + _PIECE
        spaces = [match.start() for match in _SPACE.finditer(text, end - _NEAR, end)]
        pieces.append(text[begin : (end := spaces[-1] if spaces else end)])
        begin = end
    return [*pieces, text[begin:]]


class TokenStream:
    """A source's records from any number on, tokenized as they are read.

    Args:
        max_bad: bad records that one pass lets through.
    """

    def __init__(self, source: TextSource, tokenizer_path: str, max_bad: int = 100) -> None:
        self.source, self.tokenizer_path, self.max_bad = source, tokenizer_path, max_bad
        self.name = Path(source.path).name

    def __call__(self, start: int) -> Iterator[Tokens]:
        """The tokens of record ``start`` and of each that follows; of a bad record none, so that the count goes on.

        Raises:
            UserError: as ``TextSource.read``, or too many bad records.
        """
        bad = BadRecords(self.max_bad)
        encoder = _Encoder(self.tokenizer_path)
        for batch in _batches(self.source.read(start)):
            documents = iter(encoder(_texts(batch)))
            for record in batch:
                if isinstance(record, BadRecord):
                    bad.add(record)
                    yield np.zeros(0, np.int32)
                else:
                    yield next(documents)


def tokenize_source(
    source: TextSource,
    tokenizer_path: str,
    output: Path,
    *,
    processes: int,
    shard_tokens: int,
    max_bad: int = 100,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Tokenized:
    """Write a source's tokens as shards, or go on with a run that was stopped. The result depends on the source, the
    tokenizer and ``shard_tokens`` alone.

    Args:
        output: a folder, made if it does not exist.
        processes: that tokenize; 1 does it in this one.
        shard_tokens: a shard is closed by the document that brings it to so many. They are held in memory, and a run
            that is stopped loses at most as many.
        max_bad: records that may be bad.
        progress: called with the number of documents and tokens that came since; at first with what was kept.

    Raises:
        UserError: the source, the tokenizer or the folder cannot be used, the folder holds shards of other settings,
            there are too many bad records, the disk is full, or a process was killed.
    """
    if processes < 1 or shard_tokens < 1:
        raise UserError(f"processes ({processes}) and shard_tokens ({shard_tokens}) begin at 1.")
    vocabulary = vocabulary_of(load_tokenizer(tokenizer_path), tokenizer_path)
    settings = _settings(source, vocabulary, shard_tokens)
    output = output.expanduser()
    with _locked(output):
        if (output / INDEX).exists():
            index = read_index(output)
            _check_settings(output, index["made_from"]["settings"], settings)
            done = Tokenized(**index["made_from"]["result"])
            progress(done.documents, done.tokens)
            return Tokenized(**{**asdict(done), "kept": done.documents})
        run = _Run(output, settings, shard_tokens, max_bad)
        kept = run.documents
        progress(kept, run.tokens)
        for batch, documents in _tokenized(_batches(source.read(run.records)), tokenizer_path, processes):
            before = run.documents, run.tokens
            run.take(batch, documents)
            progress(run.documents - before[0], run.tokens - before[1])
        return run.finish(vocabulary, kept)


class _Run:
    """The state of a run: what the shards hold, and what has been read beyond them."""

    def __init__(self, output: Path, settings: dict[str, Any], shard_tokens: int, max_bad: int) -> None:
        self.output, self.settings = output, settings
        saved = self._load()
        self.records = saved["records"]
        self.bad = BadRecords(max_bad, Counter(saved["skipped"]), saved["first_skipped"])
        shards = [Shard(**shard) for shard in saved["shards"]]
        self.documents = sum(shard.documents for shard in shards)
        self.tokens = sum(shard.tokens for shard in shards)
        self.writer = ShardWriter(output, shard_tokens, shards, on_shard=self._save)

    def take(self, batch: Batch, documents: Iterable[Tokens]) -> None:
        """Add a batch of records, whose good ones have these tokens."""
        tokens = iter(documents)
        for record in batch:
            # Counted first: a shard that this record completes is saved with it.
            self.records += 1
            if isinstance(record, BadRecord):
                self.bad.add(record)
            elif len(document := next(tokens)):
                self.documents += 1
                self.tokens += len(document)
                self.writer.add(document)
            else:
                self.bad.add(BadRecord(_NO_TOKENS, record.where))

    def finish(self, vocabulary: Vocabulary, kept: int) -> Tokenized:
        skipped = dict(sorted(self.bad.reasons.items()))
        result = Tokenized(self.documents, self.tokens, self.records, skipped, self.bad.first, kept=0)
        self.writer.close(vocabulary, {"settings": self.settings, "result": asdict(result)})
        (self.output / PROGRESS).unlink()
        return Tokenized(**{**asdict(result), "kept": kept})

    def _load(self) -> dict[str, Any]:
        path = self.output / PROGRESS
        if path.exists():
            saved: dict[str, Any] = json.loads(path.read_bytes())
            _check_settings(self.output, saved["settings"], self.settings)
        else:
            if strangers := [file.name for file in self.output.iterdir() if not file.name.endswith(PARTIAL)]:
                raise UserError(f"{self.output} holds other files ({strangers[0]}). Choose another --output.")
            saved = {"settings": self.settings, "records": 0, "skipped": {}, "first_skipped": [], "shards": []}
            write_json(path, saved)
        for leftover in self.output.glob(f".*{PARTIAL}"):
            leftover.unlink(missing_ok=True)
        return saved

    def _save(self, shards: list[Shard]) -> None:
        state = {
            "settings": self.settings,
            "records": self.records,
            "skipped": dict(self.bad.reasons),
            "first_skipped": self.bad.first,
            "shards": [asdict(shard) for shard in shards],
        }
        write_json(self.output / PROGRESS, state)


class _Encoder:
    """A tokenizer that is loaded where it is used."""

    def __init__(self, path: str) -> None:
        self.tokenizer = load_tokenizer(path)

    def __call__(self, texts: list[str]) -> list[Tokens]:
        return encode(self.tokenizer, texts)


def _tokenized(batches: Iterator[Batch], path: str, processes: int) -> Iterator[tuple[Batch, list[Tokens]]]:
    """Each batch with its tokens, in order."""
    if processes == 1:
        encoder = _Encoder(path)
        yield from ((batch, encoder(_texts(batch))) for batch in batches)
        return
    # Fresh processes, as with "spawn", but what they all import is imported once, by the server that they fork from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, context, _begin_process, (path,))
    pending: deque[tuple[Batch, Future[list[Tokens]]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_process, _texts(batch))))
            if len(pending) == _BATCHES_A_PROCESS * processes:
                batch, future = pending.popleft()
                yield batch, future.result()
        while pending:
            batch, future = pending.popleft()
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A tokenizing process was killed, as happens when the memory is full. Complete shards are kept: run it "
            "again, with fewer --processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder_of_process: _Encoder | None = None


def _begin_process(path: str) -> None:
    global _encoder_of_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it too, and ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder_of_process = _Encoder(path)


def _end_with_parent() -> None:
    """A pool's processes would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a pool"
    parent.join()
    os._exit(1)


def _encode_in_process(texts: list[str]) -> list[Tokens]:
    assert _encoder_of_process is not None, "the pool begins each process"
    return _encoder_of_process(texts)


def _batches(records: Iterator[Record | BadRecord]) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Record) else 0
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(batch: Batch) -> list[str]:
    return [record.text for record in batch if isinstance(record, Record)]


def _settings(source: TextSource, vocabulary: Vocabulary, shard_tokens: int) -> dict[str, Any]:
    """What the shards depend on. Of local files names and sizes: a file that was edited without changing its size is
    not noticed."""
    place = asdict(source)
    del place["weight"], place["streaming"]
    files = _sizes(source)
    return {"source": place, "files": files, "tokenizer": vocabulary.fingerprint, "shard_tokens": shard_tokens}


def _sizes(source: TextSource) -> list[dict[str, Any]]:
    return [{"file": str(file), "bytes": file.stat().st_size} for file in source.files()]


def check_unchanged(folder: Path, source: TextSource) -> None:
    """Refuse finished shards of local files that are others now, by names and sizes. Files that are all gone are not
    missed.

    Raises:
        UserError: names the first difference.
    """
    held = read_index(folder)["made_from"]["settings"]["files"]
    try:
        there = _sizes(source)
    except UserError:
        return
    for before, now in itertools.zip_longest(held, there):
        if before != now:
            raise UserError(
                f"{source.path} has changed since it was tokenised ({before} then, {now} now). Remove {folder} to "
                "tokenise it again, or put the text back: a run that has begun needs it as it was."
            )


def _check_settings(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix two runs.

    Raises:
        UserError: the settings differ.
    """
    for name in found.keys() | wanted.keys():
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{output} was begun with {_difference(name, found.get(name), wanted.get(name))}. Give the same "
                "settings to go on, or choose another --output."
            )


def _difference(name: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        name, found, wanted = next((k, found.get(k), wanted[k]) for k in wanted if found.get(k) != wanted[k])
    elif isinstance(found, list) and isinstance(wanted, list):
        pairs = itertools.zip_longest(found, wanted)
        found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
    return f"another {name}: {found} then, {wanted} now"


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be.

    Raises:
        UserError: another run holds it, or it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another run is writing to {output}. Wait for it, or choose another --output.") from error
        yield
    finally:
        os.close(descriptor)
