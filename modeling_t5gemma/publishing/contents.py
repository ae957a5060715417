"""Which files of a checkpoint's folder go out, and what each of them has to be.

Everything else stays: optimizer states, settings with local paths, pickles, and code, of which only the installed
package's own goes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UserError
from ..io.text_files import check_own, read_json, read_text

# Of SentencePiece's messages: the fields at the top, and how protobuf writes such a field and the end of a number.
_FIELDS, _LENGTHS, _LAST = range(1, 6), 2, 0x7F
# Tokens and keys by the forms that their makers gave them, and what JSON calls by such a name.
_SECRET = re.compile(
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|\bsk-[\w-]{20,}|\bgh[opsur]_\w{30,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r'|"(?:(?:hub|hf|auth|use_auth|access)_token|api_?key|passw(?:or)?d|secret(?:_key)?|private_key)"\s*:\s*"[^"]+"',
)


def carried(folder: Path) -> list[Path]:
    """The files that go out with the weights as they are.

    Raises:
        UserError: one of them is a link or no regular file, or does not hold what its name says.
    """
    paths = [folder / name for name in _CARRIED]
    found = [path for path in paths if path.is_symlink() or path.exists()]
    for path in found:
        check_own(path)
        _CARRIED[path.name](path)
    return found


def check_secrets(paths: Iterable[Path]) -> None:
    """Refuse to send a text that holds a password, a key or a token.

    Raises:
        UserError: one does; the message does not say which.
    """
    for path in paths:
        if _SECRET.search(read_text(path)):
            raise UserError(
                f"{path.name} holds what looks like a password, key or access token. Take it out of the file, or of "
                "the records that it was written from."
            )


def _added_tokens(path: Path) -> None:
    if not all(isinstance(value, int) for value in read_json(path).values()):
        raise UserError(f"{path} holds something else than tokens and their ids. Save the tokenizer again.")


def _tokenizer(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library's own kind, which is no more than that
        raise UserError(f"{path} holds no tokenizer ({error}). Save the tokenizer again.") from error


def _sentencepiece(path: Path) -> None:
    """A message of protobuf whose fields are SentencePiece's: pieces, then what trained them. A pickle is none."""
    content = path.read_bytes()
    place, pieces = 0, 0
    while place < len(content):
        tag, place = _varint(content, place)
        length, place = _varint(content, place)
        if tag & 7 != _LENGTHS or tag >> 3 not in _FIELDS:
            break
        pieces, place = pieces + (tag >> 3 == 1), place + length
    if place != len(content) or not pieces:
        raise UserError(f"{path} holds no SentencePiece model. Save the tokenizer again.")


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(content[place : place + 10]):
        value |= (byte & _LAST) << 7 * shift
        if byte <= _LAST:
            return value, place + shift + 1
    return 0, len(content) + 1  # no number


# Beside the weights and what is written anew.
_CARRIED: dict[str, Callable[[Path], Any]] = {
    "model.safetensors.index.json": read_json,
    "generation_config.json": read_json,
    "tokenizer.json": _tokenizer,
    "tokenizer.model": _sentencepiece,
    "tokenizer_config.json": read_json,
    "special_tokens_map.json": read_json,
    "added_tokens.json": _added_tokens,
    "chat_template.jinja": read_text,
    "chat_template.json": read_json,
}
