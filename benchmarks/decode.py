"""Tokens a second of greedy decoding on a CPU: ours, stock transformers, CTranslate2, and what reading allows.

    python benchmarks/decode.py
    python benchmarks/decode.py --checkpoint FOLDER --text FILE    a real model, and its quality in 8 bits on real text

All variants have the same weights: random ones of a preset, or a checkpoint's. They take turns, so that a disturbance
hits all; medians over repeats. A rate counts the tokens of all rows after the first token, so that encoding is no part
of it. Nothing ends a text early. "Ours" is ``generate`` of a model whose weights were packed (``pack_weights``), "not
packed" of one as it is loaded. The limit is memory: the bytes that a step has to read (the decoder's matrices but the
keys and values of cross-attention, the head, the caches) over the rate at which summing a large array reads.

Quality in 8 bits is that of the same model in float32: the largest difference of a logit, how often both find the same
token likeliest, and what a target token's loss becomes, on a text cut into sources and targets. Of random weights, the
text is random too, and the loss says nothing.

Without VNNI instructions, states have 7 bits instead of 8; without those for bfloat16, "ours bfloat16" takes no part.
CTranslate2 takes part where it is installed and the model is a ``t5gemma``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# See benchmarks/attention.py; without it, waiting threads take the cores from each other in all of torch's variants.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import T5GemmaConfig as StockConfig
from transformers import T5GemmaForConditionalGeneration as Stock
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_t5gemma as m
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.packing import pack_weights

ROOT = Path(__file__).resolve().parents[1]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
FLOAT32, BFLOAT16, INT8 = BYTES


@dataclass(frozen=True)
class Variant:
    """One contestant.

    Attributes:
        weights: a key of ``BYTES``.
        against: the variant whose rate this one's is divided by.
        target: what the quotient has to reach, where that was set.
    """

    name: str
    weights: str
    against: str
    target: float | None = None


VARIANTS = (
    Variant("stock float32", FLOAT32, "stock float32"),
    Variant("stock bfloat16", BFLOAT16, "stock bfloat16"),
    Variant("not packed float32", FLOAT32, "stock float32"),
    Variant("not packed bfloat16", BFLOAT16, "stock bfloat16"),
    Variant("ours float32", FLOAT32, "stock float32", 1.6),
    Variant("ours bfloat16", BFLOAT16, "stock bfloat16", 1.3),
    Variant("ours int8", INT8, "stock bfloat16", 2.0),
    Variant("CTranslate2 float32", FLOAT32, "stock float32"),
    Variant("CTranslate2 int8", INT8, "stock bfloat16"),
)
Generate = Callable[[torch.Tensor, int], list[float]]


class Stopwatch(BaseStreamer):
    """When each token came, the first of them after the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.pop(0)


def with_torch(model: nn.Module) -> Generate:
    @torch.no_grad()
    def generate(ids: torch.Tensor, tokens: int) -> list[float]:
        watch = Stopwatch()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            eos_token_id=None,
            streamer=watch,
        )
        return watch.times

    return generate


def with_ctranslate2(model: Stock, compute_type: str) -> Generate:
    """CTranslate2 brings threads of its own, so it runs in a process of its own."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder:
        write_for_ctranslate2(model, folder)
        pool.submit(load_in_ctranslate2, folder, compute_type, torch.get_num_threads()).result()
    return lambda ids, tokens: pool.submit(generate_in_ctranslate2, ids.tolist(), tokens).result()


def write_for_ctranslate2(model: Stock, folder: str) -> None:
    """The converter of CTranslate2, which takes the model apart. Words are numbers, and the cap on logits, which it
    forgets, is added."""
    import numpy as np
    from ctranslate2.converters.transformers import T5GemmaLoader

    class Loader(T5GemmaLoader):
        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            return [str(token) for token in range(model.config.decoder.vocab_size)]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            config.bos_token = config.decoder_start_token = str(model.config.decoder.bos_token_id)
            config.eos_token = config.unk_token = str(model.config.decoder.eos_token_id)
            config.layer_norm_epsilon = model.config.decoder.rms_norm_eps

    with torch.no_grad():
        spec = Loader()(model, None)
    if model.config.decoder.final_logit_softcapping is not None:
        spec.decoder.final_logit_softcapping = np.float32(model.config.decoder.final_logit_softcapping)
    spec.validate()
    spec.optimize()
    spec.save(folder)


_translators: list[Any] = []


def load_in_ctranslate2(folder: str, compute_type: str, threads: int) -> None:
    import ctranslate2

    _translators.append(ctranslate2.Translator(folder, device="cpu", compute_type=compute_type, intra_threads=threads))


def generate_in_ctranslate2(rows: list[list[int]], tokens: int) -> list[float]:
    times: dict[int, float] = {}  # of each step's last row
    _translators[0].translate_batch(
        [[str(token) for token in row] for row in rows],
        beam_size=1,
        min_decoding_length=tokens,
        max_decoding_length=tokens,
        max_input_length=0,
        callback=lambda result: times.update({result.step: time.perf_counter()}),
    )
    return list(times.values())


class Models:
    """Makes the contestants. All have the same weights, and those that are not packed share them.

    Args:
        checkpoint: a folder, or None for random weights.
        preset, words: of the random ones.
    """

    def __init__(self, checkpoint: str | None, preset: str, words: int) -> None:
        if checkpoint is None:
            torch.manual_seed(0)
            config = m.T5GemmaConfig.from_preset(preset, vocab_size=words)
            model = m.T5GemmaForConditionalGeneration(config)
        else:
            model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.config = model.config
        self.has_stock = isinstance(model.config, m.T5GemmaConfig)
        self._cls = type(model)
        self._weights = {torch.float32: model.state_dict()}
        self._weights[torch.bfloat16] = {name: x.bfloat16() for name, x in model.state_dict().items()}

    def ours(self, dtype: torch.dtype) -> Any:
        weights = self._weights[dtype]
        return self._cls.from_pretrained(None, config=self.config, state_dict=weights, dtype=dtype).eval()

    def stock(self, dtype: torch.dtype) -> Stock:
        config, weights = StockConfig(**self.config.to_dict()), self._weights[dtype]
        kwargs = {"dtype": dtype, "attn_implementation": "eager"}
        return Stock.from_pretrained(None, config=config, state_dict=weights, **kwargs).eval()

    def make(self, variant: Variant) -> Generate:
        dtype = torch.bfloat16 if variant.weights == BFLOAT16 else torch.float32
        maker, _ = variant.name.rsplit(" ", 1)
        if maker == "CTranslate2":
            return with_ctranslate2(self.stock(dtype), {FLOAT32: "float32", INT8: "int8_float32"}[variant.weights])
        if maker == "stock":
            return with_torch(self.stock(dtype))
        model = self.ours(dtype)
        return with_torch(pack_weights(model, int8=variant.weights == INT8) if maker == "ours" else model)


def random_ids(config: Any, rows: int, length: int) -> torch.Tensor:
    """Ids of ordinary tokens, int64 (rows, length)."""
    return torch.randint(10, config.encoder.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def read_bytes(config: Any, rows: int, source: int, tokens: int) -> dict[str, int]:
    """What a step reads at least, in bytes by kind of weights: matrices in theirs, caches in float32 for int8."""
    decoder = config.decoder
    width, q = decoder.hidden_size, decoder.num_attention_heads * decoder.head_dim
    kv = decoder.num_key_value_heads * decoder.head_dim
    attention = width * (2 * q + 2 * kv) + (2 * width * q if decoder.cross_attention_type == "separate" else 0)
    matrices = decoder.num_hidden_layers * (attention + 3 * width * decoder.intermediate_size)
    matrices += width * decoder.vocab_size
    cached = rows * decoder.num_hidden_layers * 2 * kv * (source + tokens // 2)
    return {kind: size * matrices + max(size, 4 if kind == INT8 else 0) * cached for kind, size in BYTES.items()}


def bandwidth(array: torch.Tensor) -> float:
    """Bytes a second at which an array is read."""
    begin = time.perf_counter()
    array.sum()
    return array.nbytes / (time.perf_counter() - begin)


def rates(contestants: dict[str, Generate], ids: torch.Tensor, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second after the first, of all rows together; under "reading", bytes a second."""
    array = torch.ones(2**27)
    measured: dict[str, list[float]] = {name: [] for name in (*contestants, "reading")}
    for repeat in range(repeats + 1):
        measured["reading"].append(bandwidth(array))
        for name, generate in contestants.items():
            times = generate(ids, tokens if repeat else 2)  # the first is there to warm up
            assert len(times) == (tokens if repeat else 2), f"{name}: {len(times)} tokens"
            if repeat:
                measured[name].append(len(ids) * (tokens - 1) / (times[-1] - times[0]))
    return {name: statistics.median(values) for name, values in measured.items()}


def table(options: argparse.Namespace, models: Models, contestants: dict[str, Generate]) -> Iterator[str]:
    yield "| batch | | tokens/s | of the limit | of stock | target |"
    yield "|---|---|---|---|---|---|"
    for rows in options.batches:
        ids = random_ids(models.config, rows, options.source)
        found = rates(contestants, ids, options.tokens, options.repeats)
        needed = read_bytes(models.config, rows, options.source, options.tokens)
        for variant in (each for each in VARIANTS if each.name in contestants):
            rate = found[variant.name]
            limit = rows * found["reading"] / needed[variant.weights]
            stock = found.get(variant.against)
            quotient = "" if stock is None else f"{rate / stock:.2f} of {variant.against}"
            verdict = ""
            if variant.target is not None and stock is not None and rows <= 8:
                verdict = f"{variant.target}: {'met' if rate / stock >= variant.target else 'MISSED'}"
            yield f"| {rows} | {variant.name} | {rate:.1f} | {rate / limit:.2f} | {quotient} | {verdict} |"
        for kind, size in needed.items():
            limit = rows * found["reading"] / size
            yield f"| {rows} | limit {kind} | {limit:.1f} | 1.00 | {size / 1e6:.0f} MB a step | |"
        yield f"| {rows} | reading | {found['reading'] / 1e9:.1f} GB/s | | | |"


@torch.no_grad()
def quality(options: argparse.Namespace, models: Models) -> str:
    """What 8 bits change, on sources and targets cut from a text, one after the other."""
    if options.checkpoint is None:
        stream = random_ids(models.config, 1, 256 * options.pairs)[0]
    else:
        text = Path(options.text).read_text(encoding="utf-8")
        stream = AutoTokenizer.from_pretrained(options.checkpoint)(text, return_tensors="pt").input_ids[0]
    pairs = stream[: len(stream) // 256 * 256].view(-1, 2, 128)[: options.pairs]
    plain = models.ours(torch.float32)
    rounded = pack_weights(models.ours(torch.float32), int8=True)
    losses, agreed, largest = [], [], 0.0
    for source, target in pairs:
        shifted = plain.prepare_decoder_input_ids_from_labels(target[None])
        logits = [model(input_ids=source[None], decoder_input_ids=shifted).logits[0] for model in (plain, rounded)]
        losses.append([float(nn.functional.cross_entropy(each, target)) for each in logits])
        agreed.append(float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()))
        largest = max(largest, float((logits[0] - logits[1]).abs().max()))
    before, after = (statistics.mean(each) for each in zip(*losses))
    return (
        f"8 bits on {len(pairs)} targets of 128 tokens: logits differ by {largest:.3f} at most, the likeliest token "
        f"is the same for {statistics.mean(agreed):.1%}, a token's loss is {after:.4f} nats and was {before:.4f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--checkpoint", help="a folder; its own weights and text instead of random ones")
    parser.add_argument("--text", default=str(ROOT / "docs" / "architecture.md"))
    parser.add_argument("--preset", default="s-s")
    parser.add_argument("--words", type=int, default=262_144)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--variants", nargs="+", default=names, choices=names)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8, help="of source and target for the quality, or 0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    models = Models(options.checkpoint, options.preset, options.words)
    contestants = {}
    for variant in VARIANTS:
        foreign = variant.name.startswith(("stock", "CTranslate2"))
        missing = variant.name.startswith("CTranslate2") and find_spec("ctranslate2") is None
        if variant.name in options.variants and not missing and (models.has_stock or not foreign):
            try:
                contestants[variant.name] = models.make(variant)
            except UserError as error:
                print(f"{variant.name}: {error}")
    print(
        f"{options.checkpoint or options.preset}, {models.config.decoder.vocab_size} words, source {options.source}, "
        f"{options.tokens} new tokens, {options.threads} threads, {options.repeats} repeats\n"
    )
    for line in table(options, models, contestants):
        print(line, flush=True)
    if options.pairs:
        print(f"\n{quality(options, models)}")


if __name__ == "__main__":
    main()
