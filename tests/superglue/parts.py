"""Tiny checkpoints that know the fixtures' words, and a task that can be learnt from a handful of examples."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments

from tests import tiny

FIXTURES = Path(__file__).parent / "fixtures"


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of the fixtures and of ``learnable``; like Gemma's it puts <bos> first by default."""
    text = " ".join(path.read_text() for path in sorted(FIXTURES.glob("*/*.jsonl"))).lower()
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]", text)))]
    words += [w for w in ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc", "#", "*") if w not in words]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save_checkpoints(folder: Path) -> dict[str, Path]:
    """An encoder-decoder with separate, one with layerwise cross-attention, and a decoder-only model."""
    torch.manual_seed(0)
    words = tokenizer()
    size = {"vocab_size": len(words)}
    source = tiny.gemma3(**size)
    made = {
        "separate": tiny.t5gemma({**tiny.BALANCED, **size}, {**tiny.NARROW, **size}),
        "layerwise": tiny.layerwise(source, bidirectional_layers="all"),
        "decoder": source,
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def learnable(folder: Path) -> Path:
    """BoolQ whose answer is whether the passage speaks of a frog, CB whose label is the premise's last word."""
    draw = random.Random(0)
    words = ["mill", "ice", "soup", "map", "moss", "roof", "oak", "sea"]
    for name in ("train", "val", "test"):
        rows, pairs = [], []
        for idx in range(64 if name == "train" else 24):
            passage, label = draw.choices(words, k=5), idx % 2 == 0
            passage[draw.randrange(5)] = "frog" if label else "hen"
            rows.append({"question": "is it", "passage": " ".join(passage), "idx": idx, "label": label})
            kind = ("entailment", "contradiction", "neutral")[idx % 3]
            last = {"entailment": "frog", "contradiction": "hen", "neutral": "goats"}[kind]
            premise = " ".join([*draw.choices(words, k=3), last])
            pairs.append({"premise": premise, "hypothesis": "is it", "idx": idx, "label": kind})
        for task, records in (("BoolQ", rows), ("CB", pairs)):
            (folder / task).mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / task / f"{name}.jsonl").write_text(lines)
    return folder


def arguments(output: Path, **kwargs) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=str(output),
        **{
            "max_steps": 6,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
            **kwargs,
        },
    )
