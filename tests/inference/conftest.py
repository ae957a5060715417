"""Checkpoints to talk to: both kinds of cross-attention and a decoder-only model, with a tokenizer of Gemma's kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import GemmaTokenizer
from typer.testing import CliRunner

from tests import tiny
from tests.conversion.tiny import VOCABULARY

SENTINELS = [f"<unused{number}>" for number in range(4)]
WORDS = [*VOCABULARY, *SENTINELS]
SIZE = 320
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
BALANCED = {**tiny.BALANCED, "vocab_size": SIZE, **LAYERS}


def decoder_only(**changes: Any):
    return tiny.gemma3(**{"vocab_size": SIZE, **LAYERS, **changes})


MAKE = {
    "separate": lambda **kw: tiny.t5gemma({**BALANCED, **kw}, {**BALANCED, **kw}),
    "layerwise": lambda **kw: tiny.layerwise(decoder_only(**kw), bidirectional_layers="all"),
    "decoder_only": decoder_only,
}
# Turns as Gemma 2 has them: roles alternate, there is no system message.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TURN_END = WORDS.index("<end_of_turn>")


def make_tokenizer(template: str | None = TEMPLATE, special: bool = True) -> GemmaTokenizer:
    tokenizer = GemmaTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)}, merges=[("▁", "a"), ("t", "h"), ("th", "e")]
    )
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=special)
    tokenizer.add_bos_token = True
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoints(kind, **config)``: a folder with model and tokenizer, made once and not to be changed."""
    made: dict[str, Path] = {}

    def checkpoint(kind: str, **config: Any) -> Path:
        key = f"{kind} {sorted(config.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)  # whichever test comes first
            MAKE[kind](**config).save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return checkpoint


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """``invoke(command, *arguments, input="")``: the result of a command; a user's error is its ``exception``."""

    def run(command: Callable[..., None], *arguments: object, input: str | bytes = "") -> Any:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(command)
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return run
