"""How much of everything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A run's sizes.

    Attributes:
        seeds: each is a pretrained model of its own, and an order of the windows.
        packages: to read at most; None for all.
        words: of the BPE, special tokens included.
        window: tokens; the first half is the prefix, the second the target.
        batch: windows of a step.
        pretrain_steps, adapt_steps, tune_steps: of one run each; a step of tuning has ``batch`` examples.
        pretraining_rate, adapting_rate, tuning_rate: the highest learning rates; a pair from scratch has that of
            pretraining.
        measures: how often a run is measured, its end included.
        held_out: windows to measure on.
        sections: of the classification, the commonest.
        tune_examples, test_examples: of the classification.
        tune_length: tokens of one of them, at most.
        widths, ffns, layers: of the large and of the small decoder-only model.
    """

    seeds: int = 3
    packages: int | None = None
    words: int = 2048
    window: int = 128
    batch: int = 8
    pretrain_steps: int = 1200
    adapt_steps: int = 100
    tune_steps: int = 160
    pretraining_rate: float = 1e-2
    adapting_rate: float = 1e-3
    tuning_rate: float = 5e-3
    measures: int = 4
    held_out: int = 128
    sections: int = 10
    tune_examples: int = 960
    test_examples: int = 500
    tune_length: int = 48
    widths: tuple[int, int] = (128, 64)
    ffns: tuple[int, int] = (384, 192)
    layers: tuple[int, int] = (4, 4)


FULL = Sizes()
SMOKE = Sizes(
    seeds=2,
    packages=4000,
    words=512,
    window=32,
    batch=4,
    pretrain_steps=4,
    adapt_steps=4,
    tune_steps=2,
    measures=2,
    held_out=8,
    sections=4,
    tune_examples=16,
    test_examples=16,
    tune_length=16,
    widths=(32, 16),
    ffns=(48, 24),
    layers=(2, 2),
)
