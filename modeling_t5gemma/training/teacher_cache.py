"""A teacher's distributions on disk, as samples of them.

At each place of every window some words are drawn from the teacher's distribution. The cross-entropy against them is
an unbiased estimate of the one against the distribution itself, whatever their number; that against the k likeliest
words is not, as it knows nothing of the rest ("Sparse Logit Sampling", arXiv 2503.16870). Being for every place, the
samples serve PrefixLM with any cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..collators import collate_for_teacher
from ..errors import UserError
from .documents import Pieces
from .evaluation import HeldOutPair
from .shards import PARTIAL, Vocabulary, write_atomically, write_json
from .teacher import Teacher

INDEX = "teacher.json"
FORMAT = 1
# Windows of a file: a stopped run loses at most so many.
PART = 4096
_NOTHING = np.empty(0, dtype=np.int32)


def write_cache(
    folder: Path,
    pieces: Pieces,
    teacher: Teacher,
    vocabulary: Vocabulary,
    *,
    samples: int,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda windows: None,
) -> None:
    """Draw ``samples`` words in every place of every window; 4 bytes each. Goes on where an earlier run was stopped.

    Args:
        pieces: the windows, which training then has to cut the same way.
        progress: called with the number of windows that came since.

    Raises:
        UserError: the folder holds a cache of other settings, or the disk is full.
    """
    settings = _settings(pieces, vocabulary) | {
        "teacher": str(teacher.model.config.name_or_path),
        "samples": samples,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*{PARTIAL}"):  # by a run that was killed: a cache has one writer
        left.unlink()
    if (folder / INDEX).exists():
        _check(folder, _read(folder), settings)
    else:
        write_json(folder / INDEX, settings)
    for part in range(-(-len(pieces) // PART)):
        numbers = range(part * PART, min((part + 1) * PART, len(pieces)))
        if not _starts(folder, part).exists():
            drawn = list(_drawn(pieces, teacher, numbers, samples, seed, batch_size, progress))
            write_atomically(_words(folder, part), [np.concatenate(drawn).astype("<u4").data.cast("B")])
            ends = np.cumsum([0, *(len(each) for each in drawn)]).astype("<i8")
            write_atomically(_starts(folder, part), [ends.data.cast("B")])
        else:
            progress(len(numbers))


class Taught:
    """Windows with what a teacher says to them, from a cache.

    Raises:
        UserError: the cache is not complete, or was made for other windows or another tokenizer.
    """

    def __init__(self, folder: Path, pieces: Pieces, vocabulary: Vocabulary) -> None:
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {INDEX}: make the cache with t5gemma teacher-cache.")
        index = _read(folder)
        _check(folder, index, _settings(pieces, vocabulary))
        self.folder, self.pieces, self.samples = folder, pieces, int(index["samples"])
        self.mean_tokens = pieces.mean_tokens
        missing = [part for part in range(-(-len(pieces) // PART)) if not _starts(folder, part).exists()]
        if missing:
            raise UserError(f"{folder} is not finished: run t5gemma teacher-cache again, it goes on where it stopped.")

    def __len__(self) -> int:
        return len(self.pieces)

    def piece(self, index: int) -> npt.NDArray[np.int32]:
        return self.pieces.piece(index)

    def locate(self, index: int) -> tuple[int, int]:
        return self.pieces.locate(index)

    def taught(self, index: int) -> npt.NDArray[np.uint32]:
        """The words drawn in the place of each token, uint32 (tokens, samples)."""
        part, place = divmod(index, PART)
        start, stop = np.fromfile(_starts(self.folder, part), "<i8", count=2, offset=8 * place).tolist()
        count, offset = (stop - start) * self.samples, 4 * start * self.samples
        words = np.fromfile(_words(self.folder, part), "<u4", count=count, offset=offset)
        return words.reshape(-1, self.samples)


def draw_words(
    hidden: torch.Tensor, head: torch.Tensor, softcap: float | None, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Words from the distribution that hidden states (N, E) give, with replacement: int64 (N, count)."""
    logits = (hidden.to(head.dtype) @ head.T).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return torch.multinomial(logits.softmax(dim=-1), count, replacement=True, generator=generator)


def _drawn(
    pieces: Pieces,
    teacher: Teacher,
    numbers: range,
    samples: int,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> Iterator[npt.NDArray[np.int64]]:
    for begin in range(numbers.start, numbers.stop, batch_size):
        some = range(begin, min(begin + batch_size, numbers.stop))
        windows = [pieces.piece(number) for number in some]
        # A window with nothing before it: every one of its places is a target.
        pairs = [[HeldOutPair(_NOTHING, window)] for window in windows]
        hidden = teacher.hidden(collate_for_teacher(pairs, teacher.layout, packed=False))
        states = hidden.split([len(window) for window in windows])
        for number, own in zip(some, states, strict=True):
            generator = torch.Generator(own.device).manual_seed(_seed(seed, number))
            rows = [draw_words(h, teacher.head, teacher.softcap, samples, generator) for h in own.split(64)]
            yield torch.cat(rows).cpu().numpy()
        progress(len(some))


def _seed(seed: int, number: int) -> int:
    """A window's own, so that where a run was stopped changes nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big") >> 1


def _settings(pieces: Pieces, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "text": pieces.documents.name,
        "windows": len(pieces),
        "window": pieces.window,
        "shortest": pieces.shortest,
        "tokenizer": vocabulary.fingerprint,
    }


def _read(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index


def _check(folder: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [f"{key} {held.get(key)!r}, not {value!r}" for key, value in wanted.items() if held.get(key) != value]
    if changed:
        raise UserError(
            f"{folder} is a teacher's cache of {'; '.join(changed)}. Give the text, window and tokenizer it was made "
            "with, or another folder."
        )


def _words(folder: Path, part: int) -> Path:
    return folder / f"words-{part:05}.bin"


def _starts(folder: Path, part: int) -> Path:
    """Written after the words, so that it stands for both."""
    return folder / f"starts-{part:05}.bin"
