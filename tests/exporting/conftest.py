"""Tiny checkpoints to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.publishing.conftest import TERMS

# One layer of each kind, windows that short inputs exceed, scores that are not capped.
STACK = {
    **tiny.BALANCED,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "attn_logit_softcapping": None,
}
FULL = ["full_attention"] * 2
TEXT = " ".join(f"w{number}" for number in (5, 9, 71, 33, 8, 60, 17, 42, 95, 4, 26, 88))


def untied(encoder: dict[str, Any], decoder: dict[str, Any]) -> torch.nn.Module:
    """With a random head of its own: texts of tiny models with a tied one are one token over and over."""
    model = tiny.t5gemma(encoder, decoder, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.out_proj.weight, std=0.05)
    return model


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """A checkpoint with a tokenizer and what its licence asks for."""
    model.save_pretrained(folder)
    (tokenizer or tiny.word_tokenizer()).save_pretrained(folder)
    (folder / "NOTICE").write_text("Gemma is provided under and subject to the Gemma Terms of Use\n")
    (folder / "GEMMA_TERMS.md").write_text(TERMS)
    (folder / "README.md").write_text(
        "---\nlicense: gemma\nbase_model: google/gemma-2-2b\n---\n\n# Trained on prose\n"
    )
    return folder


def source_and_target(source: int, target: int, seed: int = 1) -> tuple[list[int], list[int]]:
    ids = tiny.tokens(1, source + target, seed=seed)[0].clamp(min=4).tolist()
    return ids[:source], ids[source:]
