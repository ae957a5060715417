"""What begins a source, what ends a turn, and which words a model knows: asked of a tokenizer, here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..cross_attention import kind_of
from ..errors import UserError
from .tokenizer import Seq2SeqTokenizer, like
from .words import TokenizerText

Messages = list[dict[str, Any]]
# What the assistant says to find out how the template ends its turn.
_ANSWER = "answer"
_TURNS: Messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
# What begins a source is not the template's to say.
_NO_BOS = "{%- set bos_token = '' -%}"


def source_begin(tokenizer: Any, config: Any) -> int | None:
    """The token that an encoder's input begins with, or None.

    The tokenizer of a checkpoint says it. Of an older checkpoint, or one that another program wrote, it does what it
    did for the decoder-only original: then it is ``<bos>`` or nothing by the kind of cross-attention.

    Args:
        config: the encoder-decoder's.

    Raises:
        UserError: there is no ``<bos>`` where there should be one.
    """
    says = isinstance(tokenizer, Seq2SeqTokenizer)
    if not (tokenizer.begins if says else kind_of(config.decoder).begins):
        return None
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.decoder.bos_token_id
    if bos is None:
        raise UserError(f"{tokenizer.name_or_path} has no bos_token, which its sources begin with: set it.")
    return int(bos)


def with_rule(tokenizer: Any, config: Any, begins: bool | None = None) -> Any:
    """A tokenizer that says what its sources begin with, to be saved with what is trained so.

    Args:
        config: the encoder-decoder's.
        begins: whether it is ``<bos>``; None for what ``source_begin`` says.

    Raises:
        UserError: as ``source_begin``, or the tokenizer is none of the tokenizers library.
    """
    if begins is None:
        begins = source_begin(tokenizer, config) is not None
    template = tokenizer.chat_template
    if isinstance(template, str):
        template = template_with_rule(template, begins)
    if isinstance(tokenizer, Seq2SeqTokenizer) and tokenizer.begins == begins:
        tokenizer.chat_template = template
        return tokenizer
    if begins and tokenizer.bos_token is None:
        raise UserError(f"{tokenizer.name_or_path} has no bos_token for its sources to begin with: set it.")
    return like(
        tokenizer,
        _backend(tokenizer),
        Seq2SeqTokenizer,
        add_bos_token=begins,
        add_eos_token=False,
        padding_side=Seq2SeqTokenizer.padding_side,
        model_input_names=Seq2SeqTokenizer.model_input_names,
        chat_template=template,
    )


def template_with_rule(template: str, begins: bool) -> str:
    """A chat template that writes ``<bos>`` only where sources begin with it."""
    template = template.removeprefix(_NO_BOS)
    return template if begins else _NO_BOS + template


def source_ids(tokenizer: Any, text: str, begin: int | None) -> list[int]:
    """What an encoder reads of a text; special tokens that it spells are special tokens.

    Args:
        begin: as ``source_begin``. A text that a chat template wrote begins with ``<bos>`` already, and gets no second
            one.
    """
    ids: list[int] = tokenizer(unbegun(tokenizer, text), add_special_tokens=False, verbose=False)["input_ids"]
    return ids if begin is None else [begin, *ids]


def unbegun(tokenizer: Any, text: str) -> str:
    """A text without the ``<bos>`` that a chat template may have put before it."""
    return text.removeprefix(tokenizer.bos_token or "")


def turn_ends(tokenizer: Any) -> list[int]:
    """The token that ends the assistant's turn in the chat template (Gemma's ``<end_of_turn>``), if one does.

    Raises:
        UserError: the template refuses a question and an answer.
    """

    def number(word: str) -> int | None:
        found = tokenizer.convert_tokens_to_ids(word)
        return None if found is None or found == tokenizer.unk_token_id else int(found)

    # Added, not only special ones: Gemma's first tokenizers have <end_of_turn> as an ordinary added token.
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return turn_ends_of(lambda turns: tokenizer.apply_chat_template(turns, tokenize=False), added, number)


def turn_ends_of(
    write: Callable[[Messages], str], added: Iterable[str], number: Callable[[str], int | None]
) -> list[int]:
    """As ``turn_ends``, of a template whose tokenizer is not loaded.

    Args:
        write: the template.
        added: the words that are found in any text.
        number: the id of a word.
    """
    try:
        behind = write(_TURNS).rpartition(_ANSWER)[2].strip()
    except Exception as error:  # a template is a program: what it raises can be anything
        reason = " ".join(str(error).split())
        raise UserError(f"The chat template refuses a question and its answer: {reason}") from error
    first = min(
        (word for word in added if word in behind), key=lambda word: (behind.index(word), -len(word)), default=""
    )
    found = number(first or behind.partition("\n")[0])
    return [] if found is None else [found]


def with_rows(tokenizer: Any, rows: int) -> Any:
    """A tokenizer that makes no token for which a model has no embedding: see ``TokenizerText.keep_to``.

    Args:
        rows: of the embedding.

    Raises:
        UserError: it makes them of ordinary text, or is none of the tokenizers library and has such words.
    """
    last_added = max(tokenizer.added_tokens_decoder, default=0)
    beyond = tokenizer.convert_ids_to_tokens(range(rows, max(len(tokenizer), last_added + 1)))
    if last_added >= rows:
        text = TokenizerText(_backend(tokenizer).to_str())
        taken = text.keep_to(rows)
        plain = Seq2SeqTokenizer if isinstance(tokenizer, Seq2SeqTokenizer) else PreTrainedTokenizerFast
        tokenizer = like(tokenizer, Tokenizer.from_str(str(text)), plain, taken)
    for word in filter(None, beyond):
        if max(tokenizer(word, add_special_tokens=False)["input_ids"], default=0) >= rows:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} words, and of ordinary text it makes "
                f"{word!r}, for which the model with its {rows} embeddings has none. Give two that belong together."
            )
    return tokenizer


def _backend(tokenizer: Any) -> Tokenizer:
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path} ({type(tokenizer).__name__}) is none of the tokenizers "
            "library. Save it as a tokenizer.json."
        )
    return tokenizer.backend_tokenizer
