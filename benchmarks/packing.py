"""How much of packed rows is padding, beside the least possible: blocks of 1024 samples, lengths uniform 16 to 512."""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from modeling_t5gemma.training.packing import pack

ALLOWED_PADDING, ALLOWED_SECONDS = 0.03, 0.03


def halves(rng: np.random.Generator) -> np.ndarray:
    """PrefixLM: windows cut in half."""
    windows = rng.integers(16, 513, 1024)
    return np.stack([windows // 2, windows - windows // 2], axis=1)


def independent(rng: np.random.Generator) -> np.ndarray:
    """Sources and targets that know nothing of each other."""
    return rng.integers(16, 513, (1024, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    blocks = parser.parse_args().blocks

    print(f"{'lengths':<12} {'row':>6} {'padding':>8} {'worst':>8} {'least':>8} {'one batch':>9} {'ms':>6}")
    for draw, capacity in [(halves, 1024), (halves, 2048), (independent, 2048), (independent, 4096)]:
        padding, least, padded, seconds = [], [], [], []
        for seed in range(blocks):
            lengths = draw(np.random.default_rng(seed))
            start = time.perf_counter()
            rows = pack(lengths, (capacity, capacity))
            seconds.append(time.perf_counter() - start)
            tokens = lengths.sum()
            padding.append(1 - tokens / (len(rows) * 2 * capacity))
            # No packing needs fewer rows than its fuller side.
            least.append(1 - tokens / (-(-lengths.sum(axis=0).max() // capacity) * 2 * capacity))
            padded.append(1 - tokens / (len(lengths) * lengths.max(axis=0).sum()))
        time_ms = statistics.median(seconds)
        met = statistics.mean(padding) < ALLOWED_PADDING and time_ms < ALLOWED_SECONDS
        print(
            f"{draw.__name__:<12} {capacity:>6} {statistics.mean(padding):>8.2%} {max(padding):>8.2%} "
            f"{statistics.mean(least):>8.2%} {statistics.mean(padded):>9.2%} {1000 * time_ms:>6.1f}  "
            f"{'met' if met else 'missed'} (under {ALLOWED_PADDING:.0%}, {1000 * ALLOWED_SECONDS:.0f} ms)"
        )


if __name__ == "__main__":
    main()
