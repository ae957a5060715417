"""What an encoder-decoder learns to do with a window of text: PrefixLM, span corruption (T5, UL2), infilling (BART).

An objective turns a window of tokens into a source and a target. What it draws comes from a generator that is a
function of (seed, epoch, index) alone, so any worker on any rank makes the same example, in any order.

Shapes: L tokens of a window. Token arrays are int32 and one-dimensional.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from .errors import UserError

Tokens = npt.NDArray[np.int32]

SENTINELS_FILE = "sentinels.json"

# Denoisers as a training configuration would write them, by the name of their mixture.
DENOISERS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        # UL2 (arXiv 2205.05131, table 1). Its S is drawn around a quarter of the sequence; here it is a quarter.
        "ul2": (
            {"mean_span": 3, "rate": 0.15, "mode": "R"},
            {"mean_span": 8, "rate": 0.15, "mode": "R"},
            {"mean_span": 3, "rate": 0.5, "mode": "X"},
            {"mean_span": 8, "rate": 0.5, "mode": "X"},
            {"mean_span": 64, "rate": 0.15, "mode": "X"},
            {"mean_span": 64, "rate": 0.5, "mode": "X"},
            {"placement": "end", "rate": 0.25, "mode": "S"},
        ),
        # T5Gemma 2 (arXiv 2512.14856). It states no mode tokens; these follow UL2's rule: X has long spans or a high
        # rate.
        "t5gemma2": (
            {"mean_span": 3, "rate": 0.15, "mode": "R"},
            {"mean_span": 12, "rate": 0.5, "mode": "X"},
            {"mean_span": 32, "rate": 0.15, "mode": "X"},
            {"mean_span": 32, "rate": 0.5, "mode": "X"},
            {"placement": "end", "rate": 0.75, "weight": 4, "mode": "S"},
        ),
        # T5 (arXiv 1910.10683, section 3.3.4), which is UL2's first R.
        "t5": ({"mean_span": 3, "rate": 0.15, "mode": "R"},),
    }
)
PRESETS = ("prefix_lm", *DENOISERS, "bart")


@dataclass(frozen=True, eq=False)
class Example:
    """One example; its arrays may share memory with the window.

    Attributes:
        source: what the encoder reads, without ``<bos>``.
        target: what the decoder has to produce; its input is its start token and ``target[:-1]``.
        continues: the target goes on where the source ends, word for word: source + target is the window, so that a
            decoder-only teacher can teach it.
    """

    source: Tokens
    target: Tokens
    continues: bool


class _Key(ISeedSequence):
    """A generator's key as it is. Philox would hash a seed, and given a key it still asks the system for entropy."""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        assert n_words == len(self._words) and dtype == np.uint64
        return self._words


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example: Philox with key (seed, epoch) and ``index`` as the highest word of its counter.

    No two triples share a stream, and none reaches another's before 2**192 blocks.

    Raises:
        OverflowError: a number is negative or has more than 64 bits.
    """
    key: Any = _Key(seed, epoch)  # numpy's annotations know SeedSequence alone
    return np.random.Generator(np.random.Philox(key, counter=np.array([0, 0, 0, index], np.uint64)))


class Objective(Protocol):
    """How a window becomes an example."""

    @property
    def name(self) -> str:
        """For logs and messages."""

    @property
    def teachable(self) -> bool:
        """Whether every example ``continues``."""

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        """Make an example of a window, int32 (L,), of at least ``shortest()`` tokens."""

    def lengths(self, window: int) -> tuple[int, int]:
        """The longest source and the longest target that a window of so many tokens can give; never less for a longer
        window."""

    def shortest(self) -> int:
        """The fewest tokens that a window can have."""

    def sentinels_needed(self, window: int) -> int:
        """The most sentinels that a window of so many tokens can take; never less for a longer window."""


@dataclass(frozen=True)
class PrefixLM:
    """The first part is the source, the rest the target.

    Attributes:
        cut: "half" is the paper's ("Encoder-Decoder Gemma", arXiv 2504.06225, section 3): the source has L // 2
            tokens. "random": every cut that leaves both sides tokens is as likely as any other.
        min_source: the fewest tokens of a source, at least 1.
    """

    cut: Literal["half", "random"] = "half"
    min_source: int = 1

    name = "prefix_lm"
    teachable = True

    def __post_init__(self) -> None:
        if self.cut not in ("half", "random"):
            raise UserError(f"cut is {self.cut!r}; it can be half or random.")
        if self.min_source < 1:
            raise UserError(f"min_source is {self.min_source}; it must be at least 1.")

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        assert len(window) >= self.shortest(), (self, len(window))
        cut = len(window) // 2 if self.cut == "half" else int(rng.integers(self.min_source, len(window)))
        return Example(window[:cut], window[cut:], continues=True)

    def lengths(self, window: int) -> tuple[int, int]:
        if self.cut == "half":
            return window // 2, window - window // 2
        return window - 1, window - self.min_source

    def shortest(self) -> int:
        return 2 * self.min_source if self.cut == "half" else self.min_source + 1

    def sentinels_needed(self, window: int) -> int:
        return 0


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
        _check_rate(self.rate)
        _check_weight(self.weight)


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
        _check_ids(self.sentinels, "sentinels")
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
        noise = _noise(window, self.denoiser.rate)
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
        _check_rate(self.rate)
        if not 1 <= self.poisson < math.inf:
            raise UserError(f"poisson is {self.poisson}; it must be at least 1.")

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        assert len(window) >= self.shortest(), (self.name, len(window))
        noise = _noise(len(window), self.rate)
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


@dataclass(frozen=True)
class Mixture:
    """One of several objectives, drawn anew for each example.

    Attributes:
        weights: how often each, in proportion; above 0.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"{self.name} has {len(self.objectives)} objectives and {len(self.weights)} weights; a mixture takes "
                "at least one, and a weight for each."
            )
        for weight in self.weights:
            _check_weight(weight)

    @property
    def teachable(self) -> bool:
        return all(objective.teachable for objective in self.objectives)

    def __call__(self, window: Tokens, rng: np.random.Generator) -> Example:
        return self.objectives[bisect_right(self._bounds, rng.random())](window, rng)

    def lengths(self, window: int) -> tuple[int, int]:
        sources, targets = zip(*(objective.lengths(window) for objective in self.objectives))
        return max(sources), max(targets)

    def shortest(self) -> int:
        return max(objective.shortest() for objective in self.objectives)

    def sentinels_needed(self, window: int) -> int:
        return max(objective.sentinels_needed(window) for objective in self.objectives)

    @cached_property
    def _bounds(self) -> list[float]:
        """Where each share of [0, 1) but the last ends."""
        total = sum(self.weights)
        return [bound / total for bound in accumulate(self.weights[:-1])]


@dataclass(frozen=True)
class Schedule:
    """Objectives one after the other.

    Attributes:
        stages: each one's share of the run's tokens, which add up to 1, and its objective.
    """

    stages: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.stages]
        if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
            listed = ", ".join(f"{share:g}" for share in shares)
            raise UserError(f"The stages' shares are {listed or 'none'}; each must be above 0 and their sum 1.")

    def at(self, fraction: float) -> Objective:
        """The objective when ``fraction`` of the run is done; 1 and beyond is the last stage."""
        return self.stages[self.stage_index(fraction)][1]

    def stage_index(self, fraction: float) -> int:
        """The number of the stage, from 0 on. A stage begins at its bound."""
        if not fraction >= 0:
            raise ValueError(f"The fraction of a run that is done is at least 0, not {fraction}.")
        return bisect_right(self._bounds, fraction)

    @cached_property
    def _bounds(self) -> list[float]:
        """Where each stage but the last ends."""
        return list(accumulate(share for share, _ in self.stages[:-1]))


def longest_window(objective: Objective, source_length: int, target_length: int) -> int:
    """The most tokens of a window whose longest source and target fit.

    Raises:
        UserError: not even the shortest window fits.
    """

    def fits(window: int) -> bool:
        source, target = objective.lengths(window)
        return source <= source_length and target <= target_length

    shortest = objective.shortest()
    if not fits(shortest):
        source, target = objective.lengths(shortest)
        raise UserError(
            f"A source of {source_length} tokens and a target of {target_length} are too short for {objective.name}: "
            f"its shortest window, of {shortest} tokens, takes {source} and {target}. Allow longer ones."
        )
    # No objective drops a token, so a window is no longer than its source and target together.
    return _last(fits, shortest, source_length + target_length)


def check_window(objective: Objective, window: int) -> None:
    """Refuse a window that an objective cannot take.

    Raises:
        UserError: the window is too short, or needs more spans than there are sentinels.
    """
    if window < objective.shortest():
        raise UserError(
            f"A window of {window} tokens is too short for {objective.name}, which needs {objective.shortest()}. "
            "Take longer windows."
        )
    corruptions = [part for part in _parts(objective) if isinstance(part, SpanCorruption)]

    def fits(length: int) -> bool:
        return all(part.sentinels_needed(length) <= len(part.sentinels) for part in corruptions)

    if fits(window):
        return
    worst = max(corruptions, key=lambda part: part.sentinels_needed(window) - len(part.sentinels))
    shortest = objective.shortest()
    shorter = f"take windows of at most {_last(fits, shortest, window)} tokens, " if fits(shortest) else ""
    raise UserError(
        f"{objective.name}: a window of {window} tokens has {worst.sentinels_needed(window)} spans with the denoiser "
        f"{worst.name}, and there are {len(worst.sentinels)} sentinels. Give more `sentinels`, {shorter}or choose "
        "denoisers with longer spans or a lower rate."
    )


def objective_from(
    spec: object,
    sentinels: Sequence[int],
    *,
    eos: int | None,
    mode_tokens: Mapping[str, int] | None = None,
    mask: int | None = None,
) -> Objective:
    """Build an objective from what a training configuration says.

    Args:
        spec: a preset's name; ``{name: prefix_lm, cut: random, min_source: 1}``; ``{name: ul2, sentinel_at_end:
            true}``; ``{name: bart, rate: 0.3, poisson: 3}``; ``{denoisers: [{mean_span: 3, rate: 0.15, placement:
            spread, weight: 2, mode: R}, ...], sentinel_at_end: false}``; or ``{mixture: [{objective: ul2, weight:
            0.5}, ...]}``. All keys but ``name``, ``denoisers``, ``mixture``, ``objective``, ``rate`` and a spread
            denoiser's ``mean_span`` may be left out.
        sentinels: ids in the order of their use.
        eos: ends targets that do not plainly continue the source; None for none.
        mode_tokens: ids by mode. With them a preset's denoisers put theirs first in the source, without them they do
            not; a denoiser of the configuration's own does as its ``mode`` says.
        mask: BART's mask token.

    Raises:
        UserError: a name or key is unknown, or a value is not allowed.
    """
    return _Parser(tuple(sentinels), eos, mode_tokens, mask).objective(spec, "objective")


def schedule_from(
    spec: object,
    sentinels: Sequence[int],
    *,
    eos: int | None,
    mode_tokens: Mapping[str, int] | None = None,
    mask: int | None = None,
) -> Schedule:
    """Build a schedule: like :func:`objective_from`, or from a list ``[{objective: ul2, share: 0.9}, ...]``.

    Raises:
        UserError: a name or key is unknown, or a value is not allowed.
    """
    parser = _Parser(tuple(sentinels), eos, mode_tokens, mask)
    if not isinstance(spec, list | tuple):
        return Schedule(((1.0, parser.objective(spec, "objective")),))
    return Schedule(tuple((share, objective) for objective, share in parser.weighted(spec, "objective", "share")))


def sentinels_of(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of ``<unusedN>`` (Gemma), or else of ``<extra_id_N>`` (T5), in the order of N.

    Raises:
        UserError: the vocabulary has neither.
    """
    for pattern in (re.compile(r"<unused(\d+)>"), re.compile(r"<extra_id_(\d+)>")):
        matches = ((pattern.fullmatch(text), token) for text, token in vocabulary.items())
        if found := sorted((int(match[1]), token) for match, token in matches if match):
            return tuple(token for _, token in found)
    raise UserError(
        "The vocabulary has neither <unusedN> nor <extra_id_N> tokens to mark spans with. Give the ids to use as "
        "`sentinels`, a list; add tokens to the tokenizer if none are free."
    )


def save_sentinels(folder: Path, ids: Sequence[int]) -> None:
    """Write ``sentinels.json`` beside a checkpoint: whole or not at all.

    Raises:
        UserError: an id is given twice or is none.
    """
    ids = tuple(ids)
    _check_ids(ids, "sentinels")
    partial = folder / f".{SENTINELS_FILE}.{secrets.token_hex(4)}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps([int(token) for token in ids]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / SENTINELS_FILE)
    finally:
        partial.unlink(missing_ok=True)


def load_sentinels(folder: Path) -> tuple[int, ...] | None:
    """The sentinels that a checkpoint was trained with; None if it does not say.

    Raises:
        UserError: the file is not a list of ids.
    """
    path = folder / SENTINELS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write a list of token ids, or remove it.") from error
    if not isinstance(ids, list):
        raise UserError(f"{path} holds {_shown(ids)}. Write a list of token ids, or remove it.")
    _check_ids(ids, str(path))
    return tuple(ids)


@dataclass(frozen=True)
class _Parser:
    """What specs need to know of the tokenizer. ``where`` is the place of a spec in the configuration."""

    sentinels: tuple[int, ...]
    eos: int | None
    mode_tokens: Mapping[str, int] | None
    mask: int | None

    def objective(self, spec: object, where: str) -> Objective:
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise UserError(
                f"{where} is {_shown(spec)}; it can be one of {', '.join(PRESETS)}, or a mapping with name, denoisers "
                "or mixture."
            )
        if "mixture" in spec:
            _check_keys(spec, where, required=("mixture",))
            weighted = self.weighted(spec["mixture"], f"{where}.mixture", "weight")
            objectives, weights = zip(*weighted)
            return Mixture(objectives, weights, "+".join(objective.name for objective in objectives))
        if "denoisers" in spec:
            _check_keys(spec, where, required=("denoisers",), optional=("sentinel_at_end",))
            denoisers = [
                self.denoiser(denoiser, f"{where}.denoisers[{number}]")
                for number, denoiser in enumerate(_nonempty_list(spec["denoisers"], f"{where}.denoisers"))
            ]
            return self.corruption("denoisers", denoisers, _boolean(spec, "sentinel_at_end", where))
        return self.preset(spec, where)

    def preset(self, spec: Mapping[Any, Any], where: str) -> Objective:
        name = spec.get("name")
        if not isinstance(name, str) or name not in PRESETS:
            found = f"has no name, denoisers or mixture: {_shown(spec)}" if name is None else f"is {_shown(name)}"
            raise UserError(f"{where} {found}; the names are {', '.join(PRESETS)}.")
        if name == "prefix_lm":
            _check_keys(spec, where, required=("name",), optional=("cut", "min_source"))
            with _at(where):
                return PrefixLM(spec.get("cut", "half"), _integer(spec.get("min_source", 1), f"{where}.min_source"))
        if name == "bart":
            _check_keys(spec, where, required=("name",), optional=("rate", "poisson"))
            if self.mask is None:
                raise UserError(f"{where} is bart, which needs a mask token. Give its id as `mask`.")
            numbers = {key: _number(spec[key], f"{where}.{key}") for key in ("rate", "poisson") if key in spec}
            with _at(where):
                return BartInfilling(mask=self.mask, eos=self.eos, **numbers)
        _check_keys(spec, where, required=("name",), optional=("sentinel_at_end",))
        drop = {"mode"} if self.mode_tokens is None else set()
        denoisers = [
            self.denoiser({key: row[key] for key in row if key not in drop}, where) for row in DENOISERS[name]
        ]
        return self.corruption(name, denoisers, _boolean(spec, "sentinel_at_end", where))

    def weighted(self, spec: object, where: str, key: str) -> list[tuple[Objective, float]]:
        """The rows of a mixture or a schedule, each an objective and a number."""
        rows = []
        for number, row in enumerate(_nonempty_list(spec, where)):
            place = f"{where}[{number}]"
            entry = _check_keys(row, place, required=("objective", key))
            value = _number(entry[key], f"{place}.{key}")
            with _at(place):
                _check_weight(value, key)
            rows.append((self.objective(entry["objective"], f"{place}.objective"), value))
        return rows

    def denoiser(self, spec: object, where: str) -> Denoiser:
        row = _check_keys(spec, where, required=("rate",), optional=("mean_span", "placement", "weight", "mode"))
        numbers = {key: _number(row[key], f"{where}.{key}") for key in ("rate", "weight") if key in row}
        mean_span = _number(row["mean_span"], f"{where}.mean_span") if "mean_span" in row else None
        mode_token = None
        if "mode" in row:
            known = self.mode_tokens or {}
            if row["mode"] not in known:
                listed = ", ".join(map(str, known)) or "none"
                raise UserError(
                    f"{where}.mode is {_shown(row['mode'])}; `mode_tokens` has {listed}. Add its id there."
                )
            mode_token = known[row["mode"]]
        with _at(where):
            return Denoiser(mean_span, placement=row.get("placement", "spread"), mode_token=mode_token, **numbers)

    def corruption(self, name: str, denoisers: Sequence[Denoiser], sentinel_at_end: bool) -> Mixture:
        parts = tuple(SpanCorruption(denoiser, self.sentinels, self.eos, sentinel_at_end) for denoiser in denoisers)
        return Mixture(parts, tuple(denoiser.weight for denoiser in denoisers), name)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in the configuration before the message of a user's error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _parts(objective: Objective) -> Iterator[Objective]:
    """The objectives that are no mixtures."""
    if isinstance(objective, Mixture):
        for part in objective.objectives:
            yield from _parts(part)
    else:
        yield objective


def _cut(rng: np.random.Generator, total: int, pieces: int) -> npt.NDArray[np.int64]:
    """Where each of ``pieces`` pieces of ``total`` things ends, int64; none is empty, every cut is equally likely."""
    ends = np.empty(pieces, np.int64)
    ends[:-1] = rng.choice(total - 1, pieces - 1, replace=False, shuffle=False)
    ends[:-1] += 1
    ends[-1] = total
    ends.sort()
    return ends


def _noise(window: int, rate: float) -> int:
    return min(max(1, round(window * rate)), window - 1)


def _last(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from ``low`` (which fits) to ``high`` that fits, where all that fit come before the others."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise UserError(f"rate is {rate}; it must be above 0 and below 1.")


def _check_weight(weight: float, key: str = "weight") -> None:
    if not 0 < weight < math.inf:
        raise UserError(f"{key} is {weight}; it must be above 0 and finite.")


def _check_ids(ids: Sequence[Any], what: str) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < 2**31:
            raise UserError(f"{what} holds {_shown(token)}; it must be a list of token ids.")
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise UserError(f"{what} holds {twice} more than once. Each id marks one span: remove the repetition.")


def _check_keys(
    spec: object, where: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[Any, Any]:
    allowed = ", ".join(required + optional)
    if not isinstance(spec, Mapping):
        raise UserError(f"{where} is {_shown(spec)}; it must be a mapping with {allowed}.")
    if unknown := [key for key in spec if key not in required + optional]:
        raise UserError(f"{where} has the unknown key {_shown(unknown[0])}; it can have {allowed}.")
    if missing := [key for key in required if key not in spec]:
        raise UserError(f"{where} lacks {missing[0]}; it can have {allowed}.")
    return spec


def _nonempty_list(spec: object, where: str) -> Sequence[object]:
    if not isinstance(spec, list | tuple) or not spec:
        raise UserError(f"{where} is {_shown(spec)}; it must be a list with at least one entry.")
    return spec


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} is {_shown(value)}; it must be a number.")
    return value


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} is {_shown(value)}; it must be a whole number.")
    return value


def _boolean(spec: Mapping[Any, Any], key: str, where: str) -> bool:
    value = spec.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}.{key} is {_shown(value)}; it can be true or false.")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
