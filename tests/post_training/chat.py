"""A tokenizer with Gemma's turns, and records of a task that is quickly learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path

from transformers import GemmaTokenizer

from tests.conversion.tiny import VOCABULARY

# What Gemma 2's and 3's templates do, in few words: <bos>, the assistant is called "model", a system message goes
# before the first question, roles have to alternate.
TEMPLATE = """
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if (message['role'] == 'user') != loop.index0 is even -%}{{- raise_exception('no alternation') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}
{{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
SIZE = len(VOCABULARY)


def chat_tokenizer(template: str | None = TEMPLATE) -> GemmaTokenizer:
    tokenizer = GemmaTokenizer(
        vocab={word: i for i, word in enumerate(VOCABULARY)}, merges=[("▁", "a"), ("t", "h"), ("th", "e")]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def words(count: int, seed: int = 0) -> list[dict]:
    """Questions of some letters, whose answer is their first one twice."""
    draw = random.Random(seed)
    letters = ["".join(draw.choice("bcdfgh") for _ in range(draw.randrange(2, 8))) for _ in range(count)]
    return [{"prompt": [user(text)], "completion": [assistant(text[0] * 2)]} for text in letters]


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
