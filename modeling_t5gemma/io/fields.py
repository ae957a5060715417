"""What the fields of a checkpoint's JSON files may say, whoever wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..configuration_t5gemma import AdaptedSeq2SeqConfig
from ..errors import UserError

# Whole numbers from 1 up to what no model comes near, so that a config cannot ask for lists that fill the memory.
_SIZES = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 28,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
    "num_labels": 1 << 24,
}
# Finite numbers, from 0 or from above 0.
_AMOUNTS = ("dropout_rate", "attention_dropout", "classifier_dropout_rate", "initializer_range", "rms_norm_eps")
_POSITIVE = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta", "factor")
_IDS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
# Of generation_config.json: finite numbers from 0, and what would have generate fetch its code from the Hub.
_GENERATION = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "max_time",
    "guidance_scale",
)  # fmt: skip
# Of generation_config.json, too: on or off, and what no text is made with here.
_GENERATION_SWITCHES = ("do_sample", "use_cache", "output_scores", "output_attentions", "output_hidden_states")
_GENERATION_LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
_GENERATION_CODE = ("constraints", "custom_generate", "dola_layers", "force_words_ids", "penalty_alpha")
# Where a file names a class or function of its own, or a repository of kernels.
_CODE = ("auto_map", "custom_pipelines")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config(raw: Mapping[str, Any], file: Path) -> None:
    """Check the contents of a ``config.json`` before anything is made of them.

    Raises:
        UserError: they ask for code of their own, or a field has a value that no model has.
    """
    refuse_code(raw, file, own=AdaptedSeq2SeqConfig._AUTO_MAP if _is_adapted(raw) else {})
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise _wrong(file, "architectures", named, "a list of names")
    if "transformers_weights" in raw:
        raise UserError(f"{file} names other files of weights (transformers_weights). Save it with the usual ones.")
    for part, fields in _parts(raw):
        for name, most in _SIZES.items():
            value = fields.get(name)
            if value is not None and not (_is_int(value) and 1 <= value <= most):
                raise _wrong(file, part + name, value, f"a whole number from 1 to {most}")
        for name in (*_AMOUNTS, *_POSITIVE):
            value = fields.get(name)
            if value is not None and not (_is_finite(value) and (value > 0 if name in _POSITIVE else value >= 0)):
                raise _wrong(file, part + name, value, "a number above 0" if name in _POSITIVE else "a number from 0")
        _check_ids(fields, file, part, fields.get("vocab_size"))


def check_generation(raw: Mapping[str, Any], file: Path, vocabulary: int | None = None) -> None:
    """Check the contents of a ``generation_config.json``.

    Args:
        vocabulary: how many tokens the model has.

    Raises:
        UserError: as ``check_config``.
    """
    refuse_code(raw, file)
    for name in _GENERATION_CODE:
        if raw.get(name):
            raise UserError(f"{file} asks for code of its own ({name}), which is never run. Take {name} out.")
    for name in _GENERATION:
        value = raw.get(name)
        if value is not None and not (_is_finite(value) and value >= 0):
            raise _wrong(file, name, value, "a number from 0")
    for name in _GENERATION_SWITCHES:
        if not isinstance(raw.get(name), bool | None):
            raise _wrong(file, name, raw[name], "true or false")
    for name in _GENERATION_LISTS:
        value = raw.get(name)
        if value is not None and not (isinstance(value, list) and value and all(map(_is_token, _flat(value)))):
            raise _wrong(file, name, value, "a list of tokens")
    bias = raw.get("sequence_bias")
    if bias is not None and not (isinstance(bias, list | dict) and bias):
        raise _wrong(file, "sequence_bias", bias, "a list of tokens and their biases")
    if raw.get("num_return_sequences") not in (None, 1):
        raise _wrong(file, "num_return_sequences", raw["num_return_sequences"], "1")
    _check_ids(raw, file, "", vocabulary)


def refuse_code(raw: Mapping[str, Any], file: Path, own: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse what transformers would import from the checkpoint's folder or from the Hub.

    Args:
        own: the classes of this package that may be named: the installed ones are taken.

    Raises:
        UserError: there is any.
    """
    for part, fields in _parts(raw):
        for key in _CODE:
            named = fields.get(key)
            ours = isinstance(named, dict) and all(
                isinstance(cls, str) and own.get(auto) == cls.rpartition("--")[2] for auto, cls in named.items()
            )
            if named is not None and not (own and ours):
                raise UserError(
                    f"{file} asks for code of its own ({part}{key}: {_short(named)}), which is never run. Give a "
                    "checkpoint that transformers or this package reads without."
                )
        for key in _KERNELS:
            if "/" in str(fields.get(key)):
                raise UserError(
                    f"{file} asks for kernels from the Hub ({part}{key}: {_short(fields[key])}), which are code and "
                    f"never run. Take {key} out."
                )


def vocabulary_size(raw: Mapping[str, Any]) -> int | None:
    """How many tokens a ``config.json`` that was checked says that a decoder has."""
    sizes = [fields["vocab_size"] for part, fields in _parts(raw) if fields.get("vocab_size") and part != "encoder."]
    return min(sizes, default=None)


def _parts(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The object and those inside of it, each with what stands before its fields' names."""
    yield prefix, raw
    for name, value in raw.items():
        if isinstance(value, dict) and name not in _CODE:
            yield from _parts(value, f"{prefix}{name}.")


def _check_ids(fields: Mapping[str, Any], file: Path, part: str, vocabulary: Any) -> None:
    for name in _IDS:
        value = fields.get(name)
        most = vocabulary if vocabulary is not None else math.inf
        if value is not None and not (_is_int(value) and 0 <= value < most):
            raise _wrong(file, part + name, value, f"a token from 0 to {most - 1}")
    ends = fields.get("eos_token_id")
    for value in ends if isinstance(ends, list) else [ends]:
        # One past the last row ends nothing: of an image, say.
        if value is not None and not _is_token(value):
            raise _wrong(file, part + "eos_token_id", ends, "a token or a list of tokens")


def _is_adapted(raw: Mapping[str, Any]) -> bool:
    return raw.get("model_type") == AdaptedSeq2SeqConfig.model_type


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_token(value: Any) -> bool:
    return _is_int(value) and 0 <= value < 1 << 31


def _flat(values: list[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def _wrong(file: Path, name: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{file} says {name} is {_short(value)}; it is {allowed}. Repair or download it.")


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."
