"""Stand-ins: documents whose tokens tell where they are from, and an objective that uses its generator."""

from __future__ import annotations

import itertools

import numpy as np

from modeling_t5gemma.objectives import Example, Tokens
from modeling_t5gemma.training.documents import MemoryDocuments, Pieces
from modeling_t5gemma.training.mixture import Sample, Samples, Source


class RandomCut:
    name = "random cut"
    teachable = True

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        cut = int(rng.integers(1, len(window)))
        return Example(window[:cut], window[cut:], True)

    def shortest(self) -> int:
        return 2

    def lengths(self, window: int) -> tuple[int, int]:
        return window - 1, window - 1

    def sentinels_needed(self, window: int) -> int:
        return 0


class Whole(RandomCut):
    """Everything is the target."""

    name = "whole"

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        return Example(window[:0], window, False)


class Stages:
    """A schedule: random cuts, then from half the run on whole windows."""

    def at(self, fraction: float) -> RandomCut:
        return RandomCut() if fraction < 0.5 else Whole()


def documents(name: str, count: int, first: int = 0) -> MemoryDocuments:
    lengths = np.random.default_rng(count).integers(2, 90, count)
    starts = first + np.cumsum([0, *lengths])
    return MemoryDocuments(name, [np.arange(a, b) for a, b in itertools.pairwise(starts)])


def source(name: str, count: int, weight: float, first: int = 0) -> Source:
    return Source(name, Pieces(documents(name, count, first), window=32, shortest=2), weight)


def mixture(seed: int = 0, block: int = 64, total: int | None = None) -> Samples:
    sources = [source("books", 40, 3.0), source("web", 100, 1.0, first=1_000_000)]
    return Samples(sources, Stages(), seed, block, total)


def window(sample: Sample) -> list[int]:
    return [*sample.source.tolist(), *sample.target.tolist()]


def same(first: Sample, second: Sample) -> bool:
    return (
        np.array_equal(first.source, second.source)
        and np.array_equal(first.target, second.target)
        and (first.continues, first.where) == (second.continues, second.where)
    )
