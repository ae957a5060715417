"""Encoder-decoders of three layer splits beside a decoder-only model of equal parameters, with caches on both sides.

    python benchmarks/splits.py
    python benchmarks/splits.py --layers 30 --width 1024 --input 512 2048 4096    nearer to the paper's 330M

"Return of the Encoder" (arXiv 2501.16273) found 2/3 of the layers in the encoder best and claims, on an NPU and
against decoder-only, 47% less time to the first token and 4.7 times the throughput. Its decoder-only model may have
had no cache. Here all models have random weights, one embedding for everything, no window and the cross-attention of
T5Gemma (separate). Cross-attention is weights too: the MLPs of the encoder-decoders are narrower, so that all have the
same number of parameters. The decoder-only model is transformers' own Gemma 3, so a part of any difference in time is
that of two implementations; FLOPs and cache are not. The models take turns, so that a disturbance hits all; medians
and quartiles over repeats.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# See benchmarks/attention.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma import AdaptedSeq2SeqConfig, AdaptedSeq2SeqForConditionalGeneration
from modeling_t5gemma.efficiency.accounting import cache_bytes, flops, parameters
from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes
from modeling_t5gemma.efficiency.timing import Measured, Request, Spread, generate_once

VOCABULARY, HEAD_DIM = 32768, 64
DECODER_ONLY = "decoder-only"


def shared(width: int, ffn: int) -> dict[str, Any]:
    """What the stacks of all models have in common."""
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=ffn,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=max(1, width // HEAD_DIM // 4),
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=32768,
    )


def decoder_only(layers: int, width: int) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **shared(width, 4 * width), num_hidden_layers=layers, layer_types=["full_attention"] * layers
    )


def pair(encoder: int, decoder: int, width: int, ffn: int) -> AdaptedSeq2SeqConfig:
    stacks = [{**shared(width, ffn), "num_hidden_layers": layers} for layers in (encoder, decoder)]
    return AdaptedSeq2SeqConfig(encoder=stacks[0], decoder=stacks[1], share_embeddings=True)


def configs(layers: int, width: int) -> dict[str, Any]:
    """The models by name, their parameters equal to within one column of the MLPs.

    Raises:
        ValueError: the layers cannot be cut in three.
    """
    if layers % 6:
        raise ValueError(f"--layers {layers} has to be a multiple of 6, for thirds and halves.")
    whole = decoder_only(layers, width)
    found: dict[str, Any] = {DECODER_ONLY: whole}
    wanted = parameters(whole).total
    for encoder in (layers // 3, layers // 2, 2 * layers // 3):
        decoder = layers - encoder
        without_mlp = parameters(pair(encoder, decoder, width, 1)).total - layers * 3 * width
        found[f"{encoder}:{decoder}"] = pair(encoder, decoder, width, (wanted - without_mlp) // (layers * 3 * width))
    return found


def build(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    cls = AdaptedSeq2SeqForConditionalGeneration if config.is_encoder_decoder else Gemma3ForCausalLM
    return cls(config).to(dtype).eval()


def peak(layers: int, width: int, name: str, dtype: torch.dtype, request: Request, threads: int) -> int:
    """Working memory in bytes above the model."""
    torch.set_num_threads(threads)
    model = build(configs(layers, width)[name], dtype)
    generate_once(model, Request(1, 1, 2))
    return peak_bytes(lambda: generate_once(model, request))


def measured(models: dict[str, Any], requests: Sequence[Request], repeats: int) -> dict[tuple[str, Request], Measured]:
    """The times of every model and request."""
    for model in models.values():
        generate_once(model, Request(1, requests[0].input_tokens, 2))
    runs: dict[tuple[str, Request], list[Any]] = {(n, r): [] for n in models for r in requests}
    for seed in range(repeats):
        for request in requests:
            for name, model in models.items():
                runs[name, request].append(generate_once(model, request, seed))
    return {(name, request): Measured.of(request, each) for (name, request), each in runs.items()}


def row(name: str, each: Measured, base: Measured, config: Any, working: int) -> str:
    request = each.request
    counted = flops(config, request.input_tokens, request.output_tokens)
    cells = [
        str(request.batch),
        str(request.input_tokens),
        name,
        _told(each.first_token, 1000, "ms"),
        f"{each.first_token.median / base.first_token.median - 1:+.0%}",
        _told(each.tokens_per_second, 1, ""),
        f"{each.tokens_per_second.median / base.tokens_per_second.median:.2f}",
        _told(each.end_to_end, 1, "s"),
        f"{each.end_to_end.median / base.end_to_end.median - 1:+.0%}",
        f"{request.batch * counted.total / 1e9:,.0f}",
        f"{request.batch * cache_bytes(config, request.input_tokens, request.output_tokens, 4) / 1e6:,.1f}",
        f"{working / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _told(spread: Spread, factor: float, unit: str) -> str:
    figures = [factor * value for value in asdict(spread).values()]
    median, low, high = (f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}" for figure in figures)
    return f"{median} {unit}".strip() + f" ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--input", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = configs(options.layers, options.width)
    models = {name: build(config, torch.float32) for name, config in chosen.items()}
    requests = [Request(rows, length, options.output) for rows in options.batch for length in options.input]
    for name, config in chosen.items():
        count = parameters(config)
        print(f"{name}: {count.total:,} parameters, {count.without_embeddings:,} without embeddings")
    print(f"\nfloat32, {options.threads} threads, {options.output} new tokens, {options.repeats} repeats\n")
    print(
        "| batch | input | encoder:decoder | first token | to decoder-only | tokens/s | times | end to end |", end=""
    )
    print(" to decoder-only | GFLOPs | cache MB | working MB |")
    print("|---:|---:|---" + "|---:" * 9 + "|", flush=True)
    found = measured(models, requests, options.repeats)
    for request in requests:
        for name, config in chosen.items():
            working = in_own_process(
                peak, options.layers, options.width, name, torch.float32, request, options.threads, for_memory=True
            )
            print(row(name, found[name, request], found[DECODER_ONLY, request], config, working), flush=True)
    print("\narXiv 2501.16273 claims for 2/3 of the layers in the encoder: first token -47%, throughput 4.7 times.")


if __name__ == "__main__":
    main()
