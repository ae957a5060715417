"""A checkpoint before it is trimmed: its tensors, its tokenizer, and the ids that its files name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io import checkpoints
from ..io.safetensors_files import read_headers
from ..io.tensors import StoredTensor
from ..io.text_files import read_json
from ..objectives import SENTINELS_FILE, load_sentinels
from ..training.papers import papers_of_run
from ..training.run_folder import RUN_FILE
from ..training.sources import TextSource
from ..training.tokenizing import load_tokenizer
from .byte_pairs import BytePairs
from .texts import read
from .token_ids import renumber, without

WITH_IDS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", RUN_FILE)
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
BY_TOKEN = re.compile(rf"{_EMBEDDING.pattern}|(.*\.)?lm_head\.(out_proj\.)?(weight|bias)")


@dataclass(frozen=True)
class Source:
    """A checkpoint before it is trimmed.

    Attributes:
        name: to call it.
        config: the contents of its ``config.json``.
        tensors: all, of which those of ``BY_TOKEN`` have a row for each token.
        rows: of them.
        tokenizer: as transformers loads it.
        pairs: its vocabulary.
        named: the ids that its files name.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    rows: int
    tokenizer: Any
    pairs: BytePairs
    named: set[int]

    def read(self, texts: Iterable[TextSource], max_bad: int) -> Iterator[str]:
        return read(texts, self.tokenizer, max_bad)

    @classmethod
    def open(cls, given: str) -> Source:
        """Read everything of a checkpoint but its weights.

        Args:
            given: a folder, or a decoder-only model on the Hub, which is downloaded.

        Raises:
            UserError: it cannot be trimmed, or a file of it names an id without a row.
        """
        folder = checkpoints.locate(given)
        on_hub = not Path(given).expanduser().exists()
        if checkpoints.is_gguf(folder):
            raise UserError(f"{folder} is a GGUF file. Convert it first (t5gemma convert), and trim what comes out.")
        checkpoints.load_config(folder)  # which refuses adapters and what is damaged
        config = read_json(folder / "config.json")
        if on_hub and "encoder" in config:  # more belongs to it than is fetched of a source
            raise UserError(f"{given} is an encoder-decoder. Download it (hf download), and give its folder.")
        if "quantization_config" in config:
            raise UserError(f"{folder / 'config.json'} describes quantised weights. Give those they were made from.")
        tensors = read_headers(folder)
        rows = _rows(folder, tensors)
        tokenizer = load_tokenizer(str(folder))
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(f"The tokenizer of {folder} is {type(tokenizer).__name__}, which cannot be trimmed.")
        pairs = BytePairs(json.loads(tokenizer.backend_tokenizer.to_str()), str(folder))
        name = given if on_hub else folder.resolve().name
        return cls(name, folder, config, tensors, rows, tokenizer, pairs, _named_ids(folder, rows, pairs))


def _rows(folder: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """How many tokens the embeddings and the head of a checkpoint have."""
    rows = {name: tensor.shape[0] for name, tensor in tensors.items() if BY_TOKEN.fullmatch(name)}
    if not any(map(_EMBEDDING.fullmatch, rows)):
        raise UserError(
            f"{folder} has no embed_tokens.weight. Give a T5Gemma, or a decoder-only model of the Gemma, Llama or "
            "Qwen kind."
        )
    if len(set(rows.values())) > 1:
        raise UserError(
            f"{folder} has several vocabularies ({', '.join(f'{name}: {count}' for name, count in rows.items())}), "
            "and one tokenizer. Only a checkpoint with one can be trimmed."
        )
    size = next(iter(rows.values()))
    for name, tensor in tensors.items():
        if name not in rows and "embed" in name and tensor.shape[0] == size:
            raise UserError(f"{name} of {folder} has a row for each token, too, which is not supported.")
    return size


def _named_ids(folder: Path, rows: int, pairs: BytePairs) -> set[int]:
    """The ids that a checkpoint's files name.

    Raises:
        UserError: one has no row.
    """
    found = set(load_sentinels(folder) or ())
    words = {word for word, index in pairs.ids.items() if index >= rows}
    paths = [*(folder / name for name in WITH_IDS), *papers_of_run(folder)]  # run.json may lie in a folder above
    documents = {path.name: read_json(path) for path in paths if path.name in WITH_IDS and path.is_file()}

    def note(where: str) -> Callable[[str, int], int]:
        def one(key: str, index: int) -> int:
            if not 0 <= index < rows:
                raise UserError(
                    f"{folder / where} has {key} {index}, and the embedding has rows for 0 to {rows - 1}. Correct it, "
                    "or remove it."
                )
            # All tokens that were added are listed there, wanted or not.
            if key != "added_tokens_decoder":
                found.add(index)
            return index

        return one

    for name, document in documents.items():
        renumber(without(document, words), note(name))
    if beyond := [index for index in found if not 0 <= index < rows]:
        raise UserError(f"{folder / SENTINELS_FILE} has {beyond[0]}, and the embedding {rows} rows. Correct it.")
    return found
