"""Span corruption (T5, UL2) and infilling (BART): what is masked has to be said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .checks import check_ids, check_rate, check_weight
from .example import Example, Tokens


@dataclass(frozen=True)
class Denoiser:
    """What is masked.

    Attributes:
        mean_span: tokens in a span, at least 1; None at the end, where the span is all that is masked.
        rate: the share of the tokens that is masked, above 0 and below 1.
        placement: "spread": spans all over the window. "end": one span, the window's last tokens (UL2's S).
        weight: how often, in a mixture.
        mode_token: goes first in the source (UL2's [R], [S], [X]); None for none.
    """

    mean_span: float | None
    rate: float
    placement: Literal["spread", "end"] = "spread"
    weight: float = 1.0
    mode_token: int | None = None

    def __post_init__(self) -> None:
        if self.placement not in ("spread", "end"):
            raise UserError(f"placement is {self.placement!r}; it can be spread or end.")
        if self.placement == "end" and self.mean_span is not None:
            raise UserError(f"mean_span is {self.mean_span}; a denoiser at the end has one span and takes none.")
        if self.placement == "spread" and not (self.mean_span and 1 <= self.mean_span < math.inf):
            raise UserError(f"mean_span is {self.mean_span}; it must be at least 1.")
        check_rate(self.rate)
        check_weight(self.weight)


@dataclass(frozen=True)
class SpanCorruption:
    """Spans are cut out, and the target says what was there.

    Spread spans are the reference's (T5, arXiv 1910.10683; its code, ``random_spans_noise_mask``): round(L * rate)
    tokens in round(masked / mean_span) spans; masked and other tokens are each cut at random into that many pieces,
    none empty, and take turns, the others first. So the first token is never masked and the last always is. One
    sentinel stands for each span in the source and goes before it in the target.

    A span at the end is plain continuation, which is what the model is used for: no sentinel, no end-of-sequence token
    (a window's end is seldom a text's), and without a mode token a decoder-only teacher can teach it. Neither UL2
    (arXiv 2205.05131) nor the T5Gemma papers (arXiv 2504.06225, 2512.14856) state it.

    Attributes:
        sentinels: ids in the order of their use.
        eos: ends the target; None for none.
        sentinel_at_end: treat a span at the end like any other: a sentinel on both sides, then ``eos``.
    """

    denoiser: Denoiser
    sentinels: tuple[int, ...]
    eos: int | None
    sentinel_at_end: bool = False

    def __post_init__(self) -> None:
        check_ids(self.sentinels, "sentinels")
        for role, token in (("end-of-sequence token", self.eos), ("mode token", self.denoiser.mode_token)):
            if token in self.sentinels:
                raise UserError(f"The {role} {token} is one of the sentinels too. Take it out of them.")

    @property
    def name(self) -> str:
        span, rate = self.denoiser.mean_span, self.denoiser.rate
        return f"end({rate:g})" if span is None else f"spans({span:g}, {rate:g})"

    @property
    def teachable(self) -> bool:
        return self._is_continuation and self.denoiser.mode_token is None

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        assert len(window) >= self.shortest(), (self.name, len(window))
        noise, spans = self._counts(len(window))
        assert spans <= len(self.sentinels), (self.name, len(window), spans, len(self.sentinels))
        if self._is_continuation:
            source, target = window[:-noise], window[-noise:]
        elif self.denoiser.placement == "end":
            source, target = self._corrupt(window, np.array([len(window) - noise]), np.array([len(window)]))
        else:
            others_end = _cut(rng, len(window) - noise, spans)
            noise_end = _cut(rng, noise, spans)
            starts = others_end.copy()
            starts[1:] += noise_end[:-1]
            source, target = self._corrupt(window, starts, others_end + noise_end)
        if self.denoiser.mode_token is not None:
            source = np.concatenate((self._mode, source))
        return Example(source, target, continues=self.teachable)

    def lengths(self, window: int) -> tuple[int, int]:
        noise, spans = self._counts(window)
        has_mode, has_eos = self.denoiser.mode_token is not None, self.eos is not None and not self._is_continuation
        return window - noise + spans + has_mode, noise + spans + has_eos

    def shortest(self) -> int:
        return 2

    def sentinels_needed(self, window: int) -> int:
        return self._counts(window)[1]

    def _corrupt(
        self, window: Tokens, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> tuple[Tokens, Tokens]:
        """Source and target with spans ``[starts, ends)``; a token that is not masked goes before each."""
        # In the source a sentinel takes the place of a span's first token, in the target that of the token before it.
        # The place after the window is the end-of-sequence token's, which the target keeps.
        length = len(window)
        sentinels = self._sentinel_ids[: len(starts)]
        steps = np.zeros(length + 1, np.int8)
        steps[starts] = 1
        steps[ends] = -1
        masked = steps.cumsum(dtype=np.int8).view(np.bool_)
        kept = ~masked[:length]
        kept[starts] = True
        source = window.copy()
        source[starts] = sentinels
        masked[starts - 1] = True
        masked[length] = self.eos is not None
        target = np.empty(length + 1, np.int32)
        target[:length] = window
        target[starts - 1] = sentinels
        target[length] = self.eos or 0
        return source.compress(kept), target.compress(masked)

    def _counts(self, window: int) -> tuple[int, int]:
        """Masked tokens, and spans that take a sentinel."""
        noise = masked_tokens(window, self.denoiser.rate)
        if self.denoiser.mean_span is None:
            return noise, int(self.sentinel_at_end)
        return noise, min(max(1, round(noise / self.denoiser.mean_span)), window - noise)

    @property
    def _is_continuation(self) -> bool:
        return self.denoiser.placement == "end" and not self.sentinel_at_end

    @cached_property
    def _sentinel_ids(self) -> Tokens:
        return np.array(self.sentinels, np.int32)

    @cached_property
    def _mode(self) -> Tokens:
        return np.array([self.denoiser.mode_token], np.int32)


@dataclass(frozen=True, kw_only=True)
class BartInfilling:
    """Spans become one mask token each, and the target is the whole window (BART, arXiv 1910.13461, section 2.2).

    Lengths are drawn until they add up to round(L * rate) tokens; the last is cut to fit. A span of length 0 inserts
    a mask token. Spans and other tokens stand in any order, each as likely. There are never more spans than masked
    tokens, so that the source is no longer than the window: where so many spans cover too little (of few tokens, or
    with a mean near 1), the rest is spread over them, which is the same as drawing them given their sum.

    Attributes:
        mask: the mask token.
        eos: ends the target; None for none.
        rate: the share of the tokens that is masked, above 0 and below 1.
        poisson: the mean of the lengths, at least 1.
    """

    mask: int
    eos: int | None
    rate: float = 0.3
    poisson: float = 3.0

    name = "bart"
    teachable = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if not 1 <= self.poisson < math.inf:
            raise UserError(f"poisson is {self.poisson}; it must be at least 1.")

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        assert len(window) >= self.shortest(), (self.name, len(window))
        noise = masked_tokens(len(window), self.rate)
        spans = self._span_lengths(noise, rng)
        places = rng.choice(len(window) - noise + len(spans), len(spans), replace=False, shuffle=False)
        # How many of the window's tokens each place of the source stands for, then where they begin. Only a mask token
        # can begin at L.
        widths = np.ones(len(window) - noise + len(spans), np.int64)
        widths[places] = spans
        source = window.take(widths.cumsum() - widths, mode="clip")
        source[places] = self.mask
        target = window if self.eos is None else np.append(window, np.int32(self.eos))
        return Example(source, target, continues=False)

    def lengths(self, window: int) -> tuple[int, int]:
        return window, window + (self.eos is not None)

    def shortest(self) -> int:
        return 2

    def sentinels_needed(self, window: int) -> int:
        return 0

    def _span_lengths(self, noise: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """At most ``noise`` lengths, int64, that add up to ``noise``."""
        spans = rng.poisson(self.poisson, noise)
        ends = spans.cumsum()
        if ends[-1] < noise:
            return spans + np.bincount(rng.integers(noise, size=noise - ends[-1]), minlength=noise)
        last = int(ends.searchsorted(noise))
        spans[last] -= ends[last] - noise
        return spans[: last + 1]


def _cut(rng: np.random.Generator, total: int, pieces: int) -> npt.NDArray[np.int64]:
    """Where each of ``pieces`` pieces of ``total`` things ends, int64; none is empty, every cut is equally likely."""
    ends = np.empty(pieces, np.int64)
    ends[:-1] = rng.choice(total - 1, pieces - 1, replace=False, shuffle=False)
    ends[:-1] += 1
    ends[-1] = total
    ends.sort()
    return ends


def masked_tokens(window: int, rate: float) -> int:
    return min(max(1, round(window * rate)), window - 1)
