"""A checkpoint's tokenizer files, made to say what begins, pads and ends its texts."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..io.text_files import read_json, read_text
from .rules import template_with_rule, turn_ends_of
from .tokenizer import Seq2SeqTokenizer
from .words import TokenizerText

_TEMPLATE = "chat_template.jinja"
_ROLES = ("bos", "eos", "pad", "unk", "mask")


def write_rule(folder: Path, *, begins: bool, rows: int, ids: Mapping[str, Any]) -> list[int]:
    """Write what begins, pads and ends texts into a folder's tokenizer.json, tokenizer_config.json and template.

    Args:
        begins: whether sources begin with ``<bos>``.
        rows: of the model's embedding; no text becomes a token that has none.
        ids: of special tokens, by role ("bos"), where the files do not name them.

    Returns:
        The tokens that end a turn in the chat template.

    Raises:
        UserError: a file is damaged, or there is no ``<bos>`` to begin with.
    """
    config_file = folder / "tokenizer_config.json"
    config, old_map = _read(config_file), _read(folder / "special_tokens_map.json")
    text = _text_of(folder / "tokenizer.json")
    names = {
        f"{role}_token": named
        for role in _ROLES
        if (named := _named({**old_map, **config}.get(f"{role}_token")) or _default(role, ids.get(role), text))
    }
    if begins and text.number(names.get("bos_token", "")) is None:
        raise UserError(f"{folder / 'tokenizer.json'} has no <bos>, which the sources begin with. Set bos_token.")
    text.begin_with(names["bos_token"] if begins else None)
    taken = text.keep_to(rows)
    (folder / "tokenizer.json").write_text(str(text), encoding="utf-8")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if taken and (folder / name).exists():
            _write(folder / name, _without(_read(folder / name), taken))
    template = chat_template(folder)
    if template:
        (folder / _TEMPLATE).write_text(template_with_rule(template, begins), encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)
        config.pop("chat_template", None)
    rule = {
        "tokenizer_class": Seq2SeqTokenizer.__name__,
        "add_bos_token": begins,
        "add_eos_token": False,
        "padding_side": Seq2SeqTokenizer.padding_side,
        "model_input_names": Seq2SeqTokenizer.model_input_names,
    }
    _write(config_file, {**_without(config, taken), **names, **rule})
    return _turn_ends(template, names, text) if template else []


def chat_template(folder: Path) -> str:
    """The chat template among a checkpoint's files, "" without one, or with several."""
    if (folder / _TEMPLATE).exists():
        return read_text(folder / _TEMPLATE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if isinstance(template := _read(folder / name).get("chat_template"), str):
            return template
    return ""


def _turn_ends(template: str, names: Mapping[str, str], text: TokenizerText) -> list[int]:
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **names, chat_template=template)
    with suppress(UserError):  # a template that takes no such turns; whoever chats is told
        return turn_ends_of(lambda turns: renderer.apply_chat_template(turns, tokenize=False), text.added, text.number)
    return []


def _default(role: str, number: int | None, text: TokenizerText) -> str | None:
    """What Gemma's class calls the token, or else the word of an id."""
    if text.number(f"<{role}>") is not None:
        return f"<{role}>"
    return next((word for word, i in text.added.items() if i == number), None)


def _named(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _without(value: Any, words: Container[str]) -> Any:
    """A JSON value without these words, as text or as tokens."""

    def kept(item: Any) -> bool:
        name = _named(item)
        return not (isinstance(name, str) and name in words)

    if isinstance(value, dict):
        return {k: _without(v, words) for k, v in value.items() if kept(k) and kept(v)}
    return [_without(v, words) for v in value if kept(v)] if isinstance(value, list) else value


def _text_of(path: Path) -> TokenizerText:
    try:
        return TokenizerText(read_text(path))
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no tokenizer that can be read ({error!r}). Download it again.") from error


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
