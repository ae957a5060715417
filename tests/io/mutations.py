"""Damage to a checkpoint's JSON files, drawn at random."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "conversion.json",
)  # fmt: skip
_VALUES = (
    "x", "", -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, True, False, None, [], [3], ["x"], {}, {"x": 3},
    "\ud800", "NaN", float("nan"), float("inf"), [[[[]]]],
)  # fmt: skip


def deep(levels: int = 400) -> Any:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def damage(file: Path, rng: random.Random) -> str:
    """Change one value of a JSON file, or take it out; what was done."""
    content = json.loads(file.read_text())
    places = list(_places(content))
    *way, key = rng.choice(places)
    inner = content
    for step in way:
        inner = inner[step]
    value = rng.choice([*_VALUES, deep()])
    gone = rng.random() < 0.15
    if gone:
        del inner[key]
    elif rng.random() < 0.1:  # a new key
        inner = inner if isinstance(inner, dict) else content
        key = rng.choice(_KEYS)
        inner[key] = copy.deepcopy(value)
    else:
        inner[key] = copy.deepcopy(value)
    file.write_text(json.dumps(content))
    return f"{file.name}: {'.'.join(map(str, (*way, key)))} {'gone' if gone else f'= {value!r:.60}'}"


_KEYS = (
    "rope_scaling", "partial_rotary_factor", "quantization_config", "dtype", "torch_dtype", "layer_types", "id2label",
    "num_labels", "architectures", "model_type", "tokenizer_class", "chat_template", "rope_parameters", "use_cache",
    "pruned_heads", "tie_word_embeddings", "problem_type", "is_encoder_decoder", "cache_implementation",
    "eos_token_id",
    "stop_strings", "num_beams", "sliding_window", "head_dim", "extra_special_tokens", "added_tokens_decoder",
    "bad_words_ids", "suppress_tokens", "watermarking_config", "compile_config", "return_dict", "output_attentions",
    "output_hidden_states", "max_length", "min_length", "early_stopping", "sequence_bias", "forced_bos_token_id",
)  # fmt: skip


def _places(value: Any, way: tuple[Any, ...] = ()) -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, each in list(inner)[:40]:
        yield (*way, key)
        yield from _places(each, (*way, key))
