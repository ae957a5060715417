"""Tokens a second of UL2 preprocessing, beside a span corruption that walks each row in a Python loop.

    python benchmarks/objectives.py

Both make examples of the same form from the same windows on one core, generators included, and take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from modeling_t5gemma.objectives import Denoiser, Example, Mixture, SpanCorruption, Tokens, example_rng, objective_from

VOCABULARY = 256_000
EOS = 1
SENTINELS = range(7, 6007)
TARGET = 10e6  # tokens a second


def plain_corruption(window: Tokens, denoiser: Denoiser, rng: np.random.Generator) -> Example:
    """The same span corruption, token by token."""
    tokens = window.tolist()
    length = len(tokens)
    noise = min(max(1, round(length * denoiser.rate)), length - 1)
    if denoiser.mean_span is None:
        return Example(window[:-noise], window[-noise:], continues=True)
    spans = min(max(1, round(noise / denoiser.mean_span)), length - noise)
    pieces = zip(plain_cut(length - noise, spans, rng), plain_cut(noise, spans, rng))
    source, target = [], []
    position = 0
    for sentinel, (kept, masked) in zip(SENTINELS, pieces):
        for token in tokens[position : position + kept]:
            source.append(token)
        position += kept
        source.append(sentinel)
        target.append(sentinel)
        for token in tokens[position : position + masked]:
            target.append(token)
        position += masked
    target.append(EOS)
    return Example(np.array(source, np.int32), np.array(target, np.int32), continues=False)


def plain_cut(total: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """Lengths of ``pieces`` pieces: a random one of the places between two tokens begins each piece but the first."""
    begins = np.arange(total - 1) < pieces - 1
    rng.shuffle(begins)
    lengths = [1]
    for begin in begins.tolist():
        if begin:
            lengths.append(1)
        else:
            lengths[-1] += 1
    return lengths


def ours(windows: Tokens, mixture: Mixture, epoch: int) -> int:
    tokens = 0
    for index, window in enumerate(windows):
        example = mixture(window, example_rng(0, epoch, index))
        tokens += len(example.source) + len(example.target)
    return tokens


def plain(windows: Tokens, mixture: Mixture, epoch: int) -> int:
    tokens = 0
    denoisers = [part.denoiser for part in mixture.objectives if isinstance(part, SpanCorruption)]
    for index, window in enumerate(windows):
        rng = example_rng(0, epoch, index)
        example = plain_corruption(window, denoisers[int(rng.integers(len(denoisers)))], rng)
        tokens += len(example.source) + len(example.target)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=1024, help="windows in a repeat")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    shape = (arguments.windows, arguments.window)
    windows = np.random.default_rng(0).integers(10_000, VOCABULARY, shape, np.int32)
    mixture = objective_from("ul2", SENTINELS, eos=EOS)
    assert isinstance(mixture, Mixture)
    rates: dict[str, list[float]] = {"ours": [], "plain loop": []}
    for epoch in range(arguments.repeats + 1):  # the first round warms the caches
        for name, make in (("ours", ours), ("plain loop", plain)):
            start = time.perf_counter()
            make(windows, mixture, epoch)
            rates[name].append(windows.size / (time.perf_counter() - start))
    medians = {name: statistics.median(measured[1:]) for name, measured in rates.items()}
    print(f"ul2, {shape[0]} windows of {shape[1]} tokens, median of {arguments.repeats} (slowest to fastest)")
    for name, measured in rates.items():
        slowest, fastest = min(measured[1:]) / 1e6, max(measured[1:]) / 1e6
        print(f"{name:<11} {medians[name] / 1e6:7.2f} million tokens/s  ({slowest:.2f} to {fastest:.2f})")
    print(f"{'ratio':<11} {medians['ours'] / medians['plain loop']:7.2f}")
    print(f"target      {TARGET / 1e6:7.2f} million tokens/s: {'met' if medians['ours'] >= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
