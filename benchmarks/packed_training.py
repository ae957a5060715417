"""Real tokens a second in training: packed rows beside padded batches of the same examples.

    python benchmarks/packed_training.py --repeats 3

Forward and backward pass of an s-s T5Gemma (softcap, alternating window) with a small vocabulary on windows of 16 to
512 tokens, uniform, cut in half: in batches of 16, padded to the longest of each, and packed into rows of 512 + 512.
Both have the same examples and, checked first, the same loss. Medians of interleaved passes over all examples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCABULARY, BATCH, CAPACITY = 4096, 16, (512, 512)
TARGET = 1.6


def batches(examples: int, packed: bool) -> list[dict[str, Any]]:
    from modeling_t5gemma.collators import Layout, collate
    from modeling_t5gemma.training.evaluation import HeldOutPair
    from modeling_t5gemma.training.packing import pack

    rng = np.random.default_rng(0)
    windows = [rng.integers(3, VOCABULARY, length) for length in rng.integers(16, 513, examples)]
    pairs = [HeldOutPair(window[: len(window) // 2], window[len(window) // 2 :]) for window in windows]
    layout = Layout(pad=0, start=2)
    if not packed:
        groups = [pairs[begin : begin + BATCH] for begin in range(0, examples, BATCH)]
        return [collate([[pair] for pair in group], layout, None) for group in groups]
    rows = pack(np.array([(len(pair.source), len(pair.target)) for pair in pairs]), CAPACITY)
    filled = [[pairs[number] for number in row] for row in rows]
    rows_per_batch = BATCH // 2  # about as many tokens as a padded batch has slots
    return [
        collate(filled[begin : begin + rows_per_batch], layout, CAPACITY)
        for begin in range(0, len(filled), rows_per_batch)
    ]


def passes(model: torch.nn.Module, made: list[dict[str, Any]], labels: int) -> float:
    """Forward and backward over all batches; the mean loss."""
    model.zero_grad()
    total = 0.0
    for batch in made:
        loss = model(**batch, use_cache=False, num_items_in_batch=labels).loss
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import modeling_t5gemma as m

    torch.manual_seed(0)
    config = m.T5GemmaConfig.from_preset("s-s", vocab_size=VOCABULARY)
    model = m.T5GemmaForConditionalGeneration(config).train()
    made = {name: batches(given.examples, name == "packed") for name in ("padded", "packed")}
    labels = {name: sum(int((batch["labels"] != -100).sum()) for batch in each) for name, each in made.items()}
    losses = {name: passes(model, each, labels[name]) for name, each in made.items()}
    assert labels["padded"] == labels["packed"] and abs(losses["padded"] - losses["packed"]) < 1e-4, (labels, losses)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(given.repeats):
        for name, each in made.items():
            begin = time.perf_counter()
            passes(model, each, labels[name])
            seconds[name].append(time.perf_counter() - begin)
    tokens = 2 * labels["packed"]
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    for name, each in made.items():
        slots = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in each)
        print(f"{name}: {rates[name]:7.0f} real tokens a second, {1 - tokens / slots:.1%} padding")
    ratio = rates["packed"] / rates["padded"]
    print(f"packed / padded {ratio:.2f} (at least {TARGET}: {'met' if ratio >= TARGET else 'MISSED'})")


if __name__ == "__main__":
    main()
