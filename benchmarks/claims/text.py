"""The text: what Debian's packages say of themselves, in windows of tokens, and their sections as labels.

Each description is in the control file of its package and under that package's terms; all are of Debian's main
section, whose packages are free software (https://www.debian.org/social_contract#guidelines).
``examples/package_descriptions.py`` fetches them and keeps the packages of one source on one side of the split.

Shapes: W windows, L tokens of a window, E labelled examples.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.package_descriptions import Limits, Package, fetch_lists, read_packages, split, stanzas_of
from modeling_t5gemma.errors import UserError

from .sizes import Sizes

Ids = npt.NDArray[np.int32]
PAD, EOS, BOS = 0, 1, 2
SENTINELS = 48
_OF_THE_TEXT = (
    "packages", "words", "window", "held_out", "sections", "tune_examples", "test_examples", "tune_length",
)  # fmt: skip
# All descriptions long enough to say something, however many a source has.
_LIMITS = Limits(description=(200, 10**9), title=(1, 10**9), words=1, per_source=10**9)


@dataclass(frozen=True)
class Labelled:
    """Beginnings of descriptions, padded, int32 (E, at most L), and the number of each one's section, int64 (E,)."""

    ids: Ids
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """What the runs read.

    Attributes:
        train: windows to learn from, int32 (W, L), each from one description.
        held_out: windows of other sources' packages.
        bytes: of the second half of each held-out window, int64.
        to_tune, to_test: the classification.
        sections: the labels' names.
        about: what was read and counted.
    """

    train: Ids
    held_out: Ids
    bytes: npt.NDArray[np.int64]
    to_tune: Labelled
    to_test: Labelled
    sections: list[str]
    about: dict[str, int | str]

    @property
    def sentinels(self) -> tuple[int, ...]:
        return tuple(range(BOS + 1, BOS + 1 + SENTINELS))


def prepare(folder: Path, sizes: Sizes, lists: Path | None) -> None:
    """Make the text in ``folder``, where it is not there yet.

    Args:
        lists: a folder with Packages and Translation-en files, instead of fetching them.

    Raises:
        UserError: the folder holds a text of other sizes, or there is no text to be had.
    """
    path = folder / "about.json"
    wanted = {name: getattr(sizes, name) for name in _OF_THE_TEXT}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        told = _make(folder, sizes, lists)
        # Last: where it is, the rest is.
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps({**told, "sizes": wanted}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    elif json.loads(path.read_text(encoding="utf-8"))["sizes"] != wanted:
        raise UserError(f"{folder} holds a text of other sizes. Give another --output, or remove it to begin anew.")


def load(folder: Path) -> Text:
    """The text that ``prepare`` made."""
    arrays = np.load(folder / "windows.npz")
    told = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    tune, test = (Labelled(arrays[f"{name}_ids"], arrays[f"{name}_labels"]) for name in ("tune", "test"))
    return Text(arrays["train"], arrays["held_out"], arrays["bytes"], tune, test, told["sections"], told["counts"])


def _make(folder: Path, sizes: Sizes, lists: Path | None) -> dict[str, Any]:
    """Write the windows and the tokenizer; what was read and counted."""
    with tempfile.TemporaryDirectory() as scratch:
        lists = lists or fetch_lists(Path(scratch))
        packages = read_packages(lists)[: sizes.packages]
        section_of = {fields["Package"]: fields["Section"] for fields in stanzas_of(lists, "Packages")}
    splits, _ = split(packages, _LIMITS)
    # Its order is by a hash of the name, which also decides the side of a package that is named as its source.
    shuffled = random.Random(0)
    train_on, held_out = splits["train"], splits["test"] + splits["validation"]
    shuffled.shuffle(train_on)
    shuffled.shuffle(held_out)
    tokenizer = _tokenizer(train_on, sizes.words)
    train, test = (_windows(tokenizer, some, sizes.window) for some in (train_on, held_out))
    test = test[: sizes.held_out]
    sections = [name for name, _ in Counter(section_of[p.name] for p in train_on).most_common(sizes.sections)]
    tune_on, test_on = (
        [package for package in some if section_of[package.name] in sections][:count]
        for some, count in ((train_on, sizes.tune_examples), (held_out, sizes.test_examples))
    )
    arrays = {"train": train, "held_out": test, "bytes": _bytes(tokenizer, test)}
    for name, some in (("tune", tune_on), ("test", test_on)):
        arrays[f"{name}_ids"] = _beginnings(tokenizer, some, sizes.tune_length)
        arrays[f"{name}_labels"] = np.array([sections.index(section_of[p.name]) for p in some], np.int64)
    np.savez(folder / "windows.npz", **arrays)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder / "tokenizer")
    return {
        "counts": {
            "packages to learn from": len(train_on),
            "packages held out": len(held_out),
            "characters to learn from": sum(len(_text(package)) for package in train_on),
            "windows to learn from": len(train),
            "windows held out": len(test),
            "bytes a held-out token": f"{arrays['bytes'].sum() / (len(test) * (sizes.window // 2)):.2f}",
            "commonest label of the test": f"{np.bincount(arrays['test_labels']).max() / len(test_on):.3f}",
        },
        "sections": sections,
    }


def _text(package: Package) -> str:
    return f"{package.title}\n{package.description}"


def _tokenizer(packages: Sequence[Package], words: int) -> Tokenizer:
    """A byte-level BPE of the text's own, with the special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", *(f"<unused{number}>" for number in range(SENTINELS))]
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_text(package) for package in packages), trainer)
    return tokenizer


def _windows(tokenizer: Tokenizer, packages: Sequence[Package], length: int) -> Ids:
    """As many whole windows of each description as it has, int32 (W, L)."""
    encoded = [np.array(each.ids, np.int32) for each in tokenizer.encode_batch(list(map(_text, packages)))]
    return np.concatenate([ids[: len(ids) // length * length].reshape(-1, length) for ids in encoded])


def _bytes(tokenizer: Tokenizer, windows: Ids) -> npt.NDArray[np.int64]:
    """Of the second half of each window. A token of a byte-level BPE has one character a byte."""
    lengths = np.array([len(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size())])
    total: npt.NDArray[np.int64] = lengths[windows[:, windows.shape[1] // 2 :]].sum(axis=1)
    return total


def _beginnings(tokenizer: Tokenizer, packages: Sequence[Package], length: int) -> Ids:
    ids = np.full((len(packages), length), PAD, np.int32)
    for row, each in enumerate(tokenizer.encode_batch(list(map(_text, packages)))):
        kept = each.ids[:length]
        ids[row, : len(kept)] = kept
    return ids
