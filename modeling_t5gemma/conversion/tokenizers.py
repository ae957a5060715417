"""The tokenizer of a converted checkpoint: the source's files as they are, or rebuilt from a GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from modeling_t5gemma.conversion.source import Source, resolve_source
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import load_tokenizer, told
from modeling_t5gemma.io.text_files import read_json, read_text

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# transformers takes 340 MB to rebuild a vocabulary of 262,144 from a GGUF file, so a process of its own does it. The
# tokenizer's class is named because AutoTokenizer would read the whole header by way of objects, 740 MB. Every Gemma
# begins its input with <bos>, which transformers before 5.22 forgets here.
_REBUILD = (
    "import sys, transformers\n"
    "_, cls, folder, file, into = sys.argv\n"
    "tokenizer = getattr(transformers, cls).from_pretrained(folder, gguf_file=file)\n"
    "tokenizer.add_bos_token = True\n"
    "tokenizer.save_pretrained(into)\n"
)


def check_same_vocabulary(enc: Source, dec: Source) -> None:
    """Make sure that one tokenizer serves both stacks.

    Raises:
        UserError: the sources' tokenizers differ, or cannot be compared.
    """
    if enc.path == dec.path or not (_has_tokenizer(enc) and _has_tokenizer(dec)):
        return
    for name in _VOCABULARY_FILES:
        files = enc.folder / name, dec.folder / name
        if all(file.exists() for file in files) and _digest_of_file(files[0]) == _digest_of_file(files[1]):
            return
    if _vocabulary_digest(enc) != _vocabulary_digest(dec):
        raise UserError(
            f"The tokenizers of {enc.name} and {dec.name} differ, so an id would mean two words. Give two checkpoints "
            "with one tokenizer."
        )


def write_tokenizer(enc: Source, dec: Source, folder: Path) -> bool:
    """Put the decoder source's tokenizer into ``folder``, or the encoder source's if that has none.

    ``tokenizer_config.json`` names the class, without which transformers goes by the model type: "t5gemma" means
    Gemma's class there, and "adapted_seq2seq" none.

    Returns:
        Whether there was one.

    Raises:
        UserError: the one in a GGUF file cannot be rebuilt.
    """
    source = dec if _has_tokenizer(dec) else enc
    if not _has_tokenizer(source):
        return False
    if _vocabulary_file(source) is None:
        _rebuild(source, folder)
    else:
        for name in _FILES:
            if (source.folder / name).exists():
                shutil.copyfile(source.folder / name, folder / name)
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    if not config.get("tokenizer_class"):
        config["tokenizer_class"] = source.family.tokenizer_class
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer beside a GGUF file, or the one in it.

    Raises:
        UserError: it cannot be loaded.
    """
    source = resolve_source(str(path))
    if _vocabulary_file(source) is not None:
        return load_tokenizer(source.folder)
    with told(f"The tokenizer in {path} cannot be loaded", "Put the model's tokenizer.json beside it"):
        cls = getattr(transformers, source.family.tokenizer_class)
        tokenizer = cls.from_pretrained(source.folder, gguf_file=path.name)
        tokenizer.add_bos_token = True
    return tokenizer


def chat_template(folder: Path) -> str:
    """The chat template among a checkpoint's files, "" without one."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists() and (template := read_json(folder / name).get("chat_template")):
            return str(template)
    return ""


def _vocabulary_file(source: Source) -> Path | None:
    for name in _VOCABULARY_FILES:
        if (source.folder / name).exists():
            return source.folder / name
    return None


def _has_tokenizer(source: Source) -> bool:
    return source.is_gguf or _vocabulary_file(source) is not None


def _rebuild(source: Source, folder: Path) -> None:
    arguments = [source.family.tokenizer_class, str(source.folder), source.path.name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _REBUILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"The tokenizer in {source.path} cannot be rebuilt ({reason}). Put the model's tokenizer.json beside it."
        )


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _vocabulary_digest(source: Source) -> str:
    """A digest of the words in the order of their ids, whichever file they come from."""
    file = _vocabulary_file(source)
    if file is None:
        from modeling_t5gemma.conversion.gguf_file import read_gguf_tokens

        return _digest_of_words(read_gguf_tokens(source.path))
    if file.name == "tokenizer.json":
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        return _digest_of_words(sorted(vocabulary, key=lambda word: vocabulary[word]))
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{file} can only be compared with the sentencepiece package. Install it.") from error
    processor = SentencePieceProcessor(model_file=str(file))
    return _digest_of_words(processor.id_to_piece(i) for i in range(processor.get_piece_size()))


def _digest_of_words(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        # GGUF files write a token of spaces with spaces, tokenizer.json with SentencePiece's mark.
        digest.update(word.replace("\u2581", " ").encode() + b"\0")
    return digest.hexdigest()
