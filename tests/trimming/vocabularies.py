"""Small byte-pair tokenizers of the kinds that models have, learnt from a page of English."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from tests.docs.pages import ROOT
from tests.post_training.chat import TEMPLATE

DATA = [
    "The cat sat on the mat, and the dog watched the cat.",
    "A printing press prints pages; pages are printed by a press.",
    "naïve café — 12 cats\n\nand   a tab\tbetween",
]
OTHER = [
    "Converting checkpoints, quickly!",
    "Ünïcödé 漢字 🙂 and \x00 bytes",
    "<pad> spelled, <end_of_turn> too",
    "▁ <0x41>",
]
SENTINELS = [f"<unused{number}>" for number in range(12)]
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *SENTINELS[:6], "<start_of_turn>", "<end_of_turn>"]


def _text() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8") + " ".join(DATA)


@cache
def _learnt(levels: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges, of bytes as levels or of characters with the mark of a space."""
    tokenizer = Tokenizer(models.BPE())
    if levels:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if levels else []
    tokenizer.train_from_iterator(
        [_text()], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gemma() -> Any:
    """Characters, spaces as a mark, bytes for what there is no character of; control tokens first and last."""
    pieces, merges = _learnt(levels=False)
    words = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*sorted(pieces, key=pieces.__getitem__), *SENTINELS[6:]]
    tokenizer = GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in (*SENTINELS, *_SPECIAL[-2:])])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama() -> Any:
    """Bytes as levels, whole words looked up before anything is joined, special tokens behind all others."""
    pieces, merges = _learnt(levels=True)
    words = {**pieces, "Ġwatched": len(pieces), "Zyxt": len(pieces) + 1}  # words that no merges lead to
    backend = Tokenizer(models.BPE(vocab=words, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|eot_id|>", *SENTINELS],
    )
    return tokenizer


def qwen() -> Any:
    pieces, merges = _learnt(levels=True)
    tokenizer = Qwen2Tokenizer(vocab=dict(pieces), merges=merges, bos_token="<|im_start|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


KINDS = {"gemma": gemma, "llama": llama, "qwen": qwen}
