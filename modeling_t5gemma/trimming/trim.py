"""A checkpoint with fewer tokens: rows of its embedding and head, its tokenizer, and every id that its files name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..conversion.convert import hub_code_files
from ..errors import UserError
from ..io.safetensors_files import TensorToWrite, copy_rest, write_divided_as
from ..io.staging import check_apart, check_output, staged
from ..io.tensors import StoredTensor, nbytes, row_ranges
from ..io.text_files import read_json
from ..objectives import load_sentinels, save_sentinels
from ..training.papers import papers_of_run
from ..training.sources import TextSource
from ..training.tokenizing import load_tokenizer
from .checks import check_logits, check_tokens
from .choosing import choose, kept_like
from .papers import write_papers
from .source import BY_TOKEN, WITH_IDS, Source
from .texts import Change, compare
from .token_ids import renumber, without

# Written anew into tokenizer.json, which transformers prefers; what they hold is of the whole vocabulary.
_OLD_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
                     "tekken.json")  # fmt: skip
_SAMPLE = 64  # texts that are proved with


@dataclass(frozen=True)
class TrimOptions:
    """What to trim, and to what.

    Attributes:
        checkpoint: the folder of an encoder-decoder of this package, an encoder of one, or a decoder-only model; or a
            decoder-only model on the Hub.
        output: the folder to make.
        texts: what the vocabulary is for.
        size: how many tokens stay; None for as many as the texts need.
        sentinels: how many ``<unusedN>`` (or ``<extra_id_N>``) stay at least of those that no file of the checkpoint
            names; None for all.
        like: a trimmed checkpoint whose tokens are kept, in place of choosing some.
        held_out: texts to tell of what becomes of them.
        max_bad: records of the texts that may be unusable.
        overwrite: replace a checkpoint at ``output``.
        verify: load both models and compare their logits, too.
    """

    checkpoint: str
    output: Path
    texts: tuple[TextSource, ...] = ()
    size: int | None = None
    sentinels: int | None = None
    like: Path | None = None
    held_out: tuple[TextSource, ...] = ()
    max_bad: int = 100
    overwrite: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Trimmed:
    """What was done.

    Attributes:
        rows: tokens before, of which the embedding has a row.
        kept: tokens now.
        needed: of those, how many had to stay or the texts need; the others come first in the old vocabulary.
        dropped: tokens without a row, which no model could read.
        nbytes: of the weights, before and now.
        of_texts, held_out: what became of a sample of the texts, and of held-out ones; None without any.
        difference: between the logits of both models, relative to the largest; None if they were not compared.
    """

    rows: int
    kept: int
    needed: int
    dropped: tuple[str, ...]
    nbytes: tuple[int, int]
    of_texts: Change | None
    held_out: Change | None
    difference: float | None


def trim(options: TrimOptions, on_bytes: Callable[[int], None] = lambda count: None) -> Trimmed:
    """Write a checkpoint with the tokens that texts need, whole or not at all.

    Memory is the tokenizer's and a few megabytes; with ``verify`` one model's, and then the other's.

    Args:
        on_bytes: called with the number of bytes of each piece written.

    Raises:
        UserError: the checkpoint, its tokenizer or the texts cannot be used, an id has no row, the size is too small
            for what has to stay, what was written is not what it should be, or ``output`` is in the way.
    """
    check_output(options.output, overwrite=options.overwrite)
    check_apart(options.output, [Path(options.checkpoint), *([options.like] if options.like else [])])
    if not options.texts and options.like is None:
        raise UserError("Give --text, or --like and a checkpoint that was trimmed, to say which tokens are needed.")
    source = Source.open(options.checkpoint)
    sample: list[str] = []
    texts = _sampled(source.read(options.texts, options.max_bad), sample)
    if options.like is not None:
        kept = kept_like(options.like, source)
        needed = len(kept)
        for _ in texts:  # for the sample alone
            pass
    else:
        kept, needed = choose(source, texts, options.size, options.sentinels)
    writes = {name: _to_write(name, tensor, kept) for name, tensor in source.tensors.items()}
    before, after = (
        sum(nbytes(tensor.shape, tensor.dtype) for tensor in each)
        for each in (source.tensors.values(), writes.values())
    )
    with staged(options.output, overwrite=options.overwrite, needed=after) as folder:
        copy_rest(source.folder, folder)
        code = hub_code_files() if "auto_map" in source.config else []
        for path in (*papers_of_run(source.folder), *code):
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
        _write_tokenizer(folder, source, kept)
        _write_ids(folder, source, kept)
        write_divided_as(source.folder, folder, writes, on_bytes)
        tokenizer = load_tokenizer(str(folder))
        rows = check_tokens(source.tokenizer, tokenizer, sample, kept)
        difference = check_logits(source.folder, folder, rows, kept) if options.verify else None
        of_texts = compare(source.tokenizer, tokenizer, sample) if options.texts else None
        held_out = source.read(options.held_out, options.max_bad) if options.held_out else None
        of_held_out = None if held_out is None else compare(source.tokenizer, tokenizer, held_out)
        write_papers(
            folder,
            source,
            kept,
            name=options.output.name,
            texts=[Path(text.path).name for text in options.texts],
            of_texts=of_texts,
            held_out=of_held_out,
        )
    dropped = tuple(word for word, index in sorted(source.pairs.ids.items()) if index >= source.rows)
    return Trimmed(source.rows, len(kept), needed, dropped, (before, after), of_texts, of_held_out, difference)


def _sampled(texts: Iterable[str], sample: list[str]) -> Iterator[str]:
    """All of the texts, while some of them, drawn evenly, are put into ``sample``."""
    draw = random.Random(0)
    for number, text in enumerate(texts):
        if len(sample) < _SAMPLE:
            sample.append(text)
        elif (place := draw.randrange(number + 1)) < _SAMPLE:
            sample[place] = text
        yield text


def _to_write(name: str, tensor: StoredTensor, kept: Sequence[int]) -> TensorToWrite:
    if not BY_TOKEN.fullmatch(name):
        verbatim = tensor.verbatim()
        assert verbatim is not None, "safetensors files hold what they say"
        return TensorToWrite(name, tensor.shape, tensor.dtype, verbatim)
    ids = torch.tensor(kept)

    def chunks() -> Iterator[torch.Tensor]:
        for start, stop in row_ranges(tensor.shape):
            wanted = ids[(ids >= start) & (ids < stop)]
            if len(wanted):
                yield tensor.rows(start, stop)[wanted - start]

    return TensorToWrite(name, (len(kept), *tensor.shape[1:]), tensor.dtype, chunks)


def _write_tokenizer(folder: Path, source: Source, kept: Sequence[int]) -> None:
    for name in _OLD_VOCABULARIES:
        (folder / name).unlink(missing_ok=True)
    trimmed = json.dumps(source.pairs.trimmed(kept), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(trimmed, encoding="utf-8")


def _write_ids(folder: Path, source: Source, kept: Sequence[int]) -> None:
    """Write the checkpoint's files anew with the new ids."""
    new = {old: index for index, old in enumerate(kept)}
    gone = {word for word, index in source.pairs.ids.items() if index not in new}

    def sized(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: len(new) if key == "vocab_size" and value == source.rows else sized(value)
            for key, value in part.items()
        }

    for name in WITH_IDS:
        if (folder / name).is_file():
            document = renumber(without(read_json(folder / name), gone), lambda key, index: new[index])
            if name == "config.json":
                document = sized(document)
            told = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(told, encoding="utf-8")
    if (sentinels := load_sentinels(folder)) is not None:
        save_sentinels(folder, [new[index] for index in sentinels])
