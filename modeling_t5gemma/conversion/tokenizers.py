"""The tokenizer of a converted checkpoint: its source's words, under its own rule for what begins a text."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from modeling_t5gemma.conversion.source import Source, resolve_source
from modeling_t5gemma.cross_attention import kind_of
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import load_tokenizer, told
from modeling_t5gemma.io.text_files import check_own
from modeling_t5gemma.text.files import write_rule

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# transformers takes 340 MB to rebuild a vocabulary of 262,144, so a process of its own does it. The tokenizer's class
# is named because AutoTokenizer would read the whole header of a GGUF file by way of objects, 740 MB.
_REBUILD = (
    "import sys, transformers\n"
    "_, cls, folder, into, *gguf = sys.argv\n"
    "options = {'gguf_file': gguf[0]} if gguf else {}\n"
    "getattr(transformers, cls).from_pretrained(folder, **options).save_pretrained(into)\n"
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


def write_tokenizer(enc: Source, dec: Source, folder: Path, config: Any) -> list[int]:
    """Put the decoder source's tokenizer into ``folder``, or the encoder source's if that has none: the same words
    under the rule of the checkpoint, by which ``tokenizer(text)`` makes what its encoder reads.

    Args:
        config: the checkpoint's.

    Returns:
        The tokens that end a turn in its chat template.

    Raises:
        UserError: the tokenizer cannot be rebuilt, or is damaged.
    """
    source = dec if _has_tokenizer(dec) else enc
    if not _has_tokenizer(source):
        return []
    if _vocabulary_file(source) is not None:
        for name in _FILES:
            if (source.folder / name).exists():
                check_own(source.folder / name)
                shutil.copyfile(source.folder / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        _rebuild(source, folder)
    return write_rule(
        folder,
        begins=kind_of(config.decoder).begins,
        rows=min(config.encoder.vocab_size, config.decoder.vocab_size),
        ids={role: getattr(source.config, f"{role}_token_id") for role in ("bos", "eos", "pad")},
    )


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


def _vocabulary_file(source: Source) -> Path | None:
    for name in _VOCABULARY_FILES:
        if (source.folder / name).exists():
            return source.folder / name
    return None


def _has_tokenizer(source: Source) -> bool:
    return source.is_gguf or _vocabulary_file(source) is not None


def _rebuild(source: Source, folder: Path) -> None:
    """From a GGUF file, or a tokenizer.model."""
    gguf = [source.path.name] if source.is_gguf else []
    arguments = [source.family.tokenizer_class, str(source.folder), str(folder), *gguf]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _REBUILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"The tokenizer in {source.path} cannot be rebuilt ({reason}). Put the model's tokenizer.json there."
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
