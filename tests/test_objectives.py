"""Objectives: every example gives its window back, and what is drawn has the stated distribution."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import timeit
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t5gemma import objectives as o
from modeling_t5gemma.errors import UserError

EOS, MASK = 1, 5
MODES = {"R": 4000, "S": 4001, "X": 4002}
SENTINELS = tuple(range(3999, 6, -1))  # downwards, like T5's, so that an id by arithmetic shows
FIRST_WORD = 10_000

SPECS = {
    "half": "prefix_lm",
    "half, 3 or more": {"name": "prefix_lm", "min_source": 3},
    "random": {"name": "prefix_lm", "cut": "random"},
    "random, 3 or more": {"name": "prefix_lm", "cut": "random", "min_source": 3},
    "ul2": "ul2",
    "ul2, sentinel at the end": {"name": "ul2", "sentinel_at_end": True},
    "t5gemma2": "t5gemma2",
    "t5": "t5",
    "dense": {"denoisers": [{"mean_span": 1, "rate": 0.5}]},
    "nearly all": {"denoisers": [{"mean_span": 2.5, "rate": 0.9}]},
    "end": {"denoisers": [{"placement": "end", "rate": 0.25}]},
    "end, sentinel": {"denoisers": [{"placement": "end", "rate": 0.25}], "sentinel_at_end": True},
    "bart": "bart",
    "bart, short spans": {"name": "bart", "poisson": 1, "rate": 0.6},
    "mixture": {"mixture": [{"objective": "ul2", "weight": 0.5}, {"objective": "prefix_lm", "weight": 0.5}]},
}


def build(spec, modes=None, eos=EOS) -> o.Objective:
    return o.objective_from(spec, SENTINELS, eos=eos, mode_tokens=modes, mask=MASK)


def variants() -> dict[str, o.Objective]:
    """Every spec, plain, with mode tokens and without an end of sequence, where that makes a difference."""
    found: dict[str, o.Objective] = {}
    for name, spec in SPECS.items():
        for suffix, modes, eos in (("", None, EOS), (", modes", MODES, EOS), (", no eos", None, None)):
            objective = build(spec, modes, eos)
            if objective not in found.values():
                found[name + suffix] = objective
    return found


OBJECTIVES = variants()
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def eos_of(name: str) -> int | None:
    return None if name.endswith("no eos") else EOS


def words(length: int) -> o.Tokens:
    """A window whose tokens all differ, so that a token that moved or doubled shows."""
    return np.arange(FIRST_WORD, FIRST_WORD + length, dtype=np.int32)


def restored(example: o.Example, eos: int | None) -> list[int]:
    """The window that source and target stand for, told from the two alone; asserts their form."""
    assert example.source.dtype == example.target.dtype == np.int32
    source, target = example.source.tolist(), example.target.tolist()
    if example.continues:
        return source + target
    if MASK in source:
        return restored_from_infilling(source, target, eos)
    if source[0] in MODES.values():
        source = source[1:]
    if not set(source) & set(SENTINELS):  # the continuation behind a mode token
        return source + target
    if eos is not None:
        assert target.pop() == eos
    spans: dict[int, list[int]] = {}
    for token in target:
        if token < FIRST_WORD:
            assert token == SENTINELS[len(spans)]
            span = spans[token] = []
        else:
            span.append(token)
    assert all(spans.values()), "an empty span"
    assert [token for token in source if token < FIRST_WORD] == list(spans)
    return [word for token in source for word in spans.get(token, [token])]


def restored_from_infilling(source: list[int], target: list[int], eos: int | None) -> list[int]:
    """The target, once what is left of the source is found in it in order."""
    if eos is not None:
        assert target.pop() == eos
    kept = [token for token in source if token != MASK]
    rest = iter(target)
    assert all(token in rest for token in kept), "the source is not the target with words left out"
    for before, after in itertools.pairwise([FIRST_WORD - 1, *kept, FIRST_WORD + len(target)]):
        # Words are numbered: where some are missing, a mask must stand.
        gap = source[source.index(before) + 1 if before in source else 0 :]
        assert after - before == 1 or gap[0] == MASK
    return target


@every_objective
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_source_and_target_give_back_the_window(name, data):
    objective = OBJECTIVES[name]
    length = data.draw(st.integers(objective.shortest(), 3000))
    seed, epoch, index = (data.draw(st.integers(0, 2**64 - 1)) for _ in range(3))
    window = words(length)
    kept = window.copy()
    example = objective(window, o.example_rng(seed, epoch, index))
    assert restored(example, eos_of(name)) == window.tolist()
    assert (window == kept).all(), "the window itself was changed"
    assert min(len(example.source), len(example.target)) > 0
    assert all(
        side <= bound for side, bound in zip((len(example.source), len(example.target)), objective.lengths(length))
    )
    assert example.continues or not objective.teachable


@every_objective
def test_short_windows_give_back_the_window_and_attain_the_bounds(name):
    objective = OBJECTIVES[name]
    for length in (*range(objective.shortest(), objective.shortest() + 6), 40):
        longest = [0, 0]
        for index in range(300):
            example = objective(words(length), o.example_rng(0, length, index))
            assert restored(example, eos_of(name)) == words(length).tolist()
            longest = np.maximum(longest, [len(example.source), len(example.target)])
        assert (longest <= objective.lengths(length)).all()
        if length < 8 or "bart" not in name:  # that so many of its spans are short becomes rare
            assert tuple(longest) == objective.lengths(length), length


@every_objective
def test_the_bounds_never_fall_with_the_window(name):
    objective = OBJECTIVES[name]
    lengths = np.array(
        [(*objective.lengths(n), objective.sentinels_needed(n)) for n in range(objective.shortest(), 3000)]
    )
    assert (np.diff(lengths, axis=0) >= 0).all()


@every_objective
@given(source=st.integers(12, 5000), target=st.integers(12, 5000))
@settings(max_examples=25, deadline=None)
def test_the_longest_window_fits_and_one_more_does_not(name, source, target):
    objective = OBJECTIVES[name]
    window = o.longest_window(objective, source, target)
    assert all(length <= limit for length, limit in zip(objective.lengths(window), (source, target)))
    assert any(length > limit for length, limit in zip(objective.lengths(window + 1), (source, target)))


def test_the_longest_windows_of_the_papers():
    assert o.longest_window(build("prefix_lm"), 4096, 4096) == 8192
    assert o.longest_window(build({"name": "prefix_lm", "cut": "random"}), 4096, 5000) == 4097
    # X of span 3: half the window and a third of that in sentinels, and the end of sequence.
    longest = o.longest_window(build({"denoisers": [{"mean_span": 3, "rate": 0.5}]}), 4096, 4096)
    assert longest // 2 + round(longest // 2 / 3) + 1 == 4096


def test_a_budget_below_the_shortest_window_is_refused():
    with pytest.raises(UserError, match="too short for prefix_lm: its shortest window, of 2 tokens, takes 1 and 1"):
        o.longest_window(build("prefix_lm"), 0, 8)


@pytest.mark.parametrize("cut", ["half", "random"])
def test_prefix_lm_continues(cut):
    objective = o.PrefixLM(cut, min_source=2)
    cuts = {len(objective(words(9), o.example_rng(0, 0, index)).source) for index in range(300)}
    assert cuts == ({4} if cut == "half" else set(range(2, 9)))
    assert objective.teachable and objective(words(9), o.example_rng(0, 0, 0)).continues


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_a_span_at_the_end_is_the_last_tokens(rate):
    denoiser = o.Denoiser(None, rate, "end")
    cut = 200 - round(200 * rate)
    rng = o.example_rng(0, 0, 0)

    plain = o.SpanCorruption(denoiser, SENTINELS, EOS)
    example = plain(words(200), rng)
    assert plain.teachable and example.continues and plain.sentinels_needed(200) == 0
    assert example.source.tolist() == words(200)[:cut].tolist()
    assert example.target.tolist() == words(200)[cut:].tolist()

    moded = o.SpanCorruption(dataclasses.replace(denoiser, mode_token=4001), SENTINELS, EOS)
    example = moded(words(200), rng)
    assert not moded.teachable and not example.continues
    assert example.source.tolist() == [4001, *words(200)[:cut]]
    assert example.target.tolist() == words(200)[cut:].tolist()

    marked = o.SpanCorruption(denoiser, SENTINELS, EOS, sentinel_at_end=True)
    example = marked(words(200), rng)
    assert not marked.teachable and not example.continues and marked.sentinels_needed(200) == 1
    assert example.source.tolist() == [*words(200)[:cut], SENTINELS[0]]
    assert example.target.tolist() == [SENTINELS[0], *words(200)[cut:], EOS]


def test_the_form_of_a_corrupted_window():
    objective = o.SpanCorruption(o.Denoiser(1, 0.5, mode_token=4002), SENTINELS, EOS)
    example = objective(words(6), o.example_rng(0, 0, 0))  # three spans of one: there is one way
    a, b, c, d, e, f = words(6).tolist()
    assert example.source.tolist() == [4002, a, SENTINELS[0], c, SENTINELS[1], e, SENTINELS[2]]
    assert example.target.tolist() == [SENTINELS[0], b, SENTINELS[1], d, SENTINELS[2], f, EOS]
    assert not example.continues and not objective.teachable


def spans_of(example: o.Example) -> list[int]:
    """Lengths of the spans of a corrupted window."""
    marks = np.flatnonzero(np.isin(example.target, SENTINELS))
    return (np.diff([*marks, len(example.target) - 1]) - 1).tolist() if len(marks) else []


@given(
    length=st.integers(2, 3000),
    mean_span=st.floats(1, 80),
    rate=st.floats(0.01, 0.99),
    index=st.integers(0, 2**40),
)
@settings(max_examples=300, deadline=None)
def test_counts_are_the_references(length, mean_span, rate, index):
    objective = o.SpanCorruption(o.Denoiser(mean_span, rate), SENTINELS, EOS)
    example = objective(words(length), o.example_rng(0, 0, index))
    # t5.data.preprocessors.random_spans_noise_mask, and no more spans than there are tokens between them.
    noise = min(max(int(np.round(length * rate)), 1), length - 1)
    spans = min(max(int(np.round(noise / mean_span)), 1), length - noise)
    found = spans_of(example)
    assert sum(found) == noise and len(found) == spans == objective.sentinels_needed(length)
    assert (len(example.source), len(example.target)) == objective.lengths(length)
    assert example.source[0] == FIRST_WORD, "the first token is masked"
    assert example.target[-2] == FIRST_WORD + length - 1, "the last token is not"


# Bounds of distributions are those of the statistic at one chance in a million, and the seeds are fixed.

Z = 4.9  # two-sided, 1e-6


def chi_square_limit(degrees: int) -> float:
    """The 1 - 1e-6 quantile (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.76 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_distributed(counts: Counter, probabilities: dict) -> None:
    """Chi-square of counts against probabilities; neighbours share a bin until ten or more are expected in it."""
    assert not counts.keys() - probabilities.keys()
    total = sum(counts.values())
    bins = [[0.0, 0.0]]
    for outcome, probability in probabilities.items():
        if bins[-1][1] >= 10:
            bins.append([0.0, 0.0])
        bins[-1][0] += counts[outcome]
        bins[-1][1] += probability * total
    if bins[-1][1] < 10:
        last = bins.pop()
        bins[-1] = [sum(pair) for pair in zip(bins[-1], last)]
    assert len(bins) > 1
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    assert statistic <= chi_square_limit(len(bins) - 1), (statistic, bins)


def test_every_way_to_cut_is_equally_likely():
    """Of 9 tokens 4 masked in 2 spans: 3 ways to cut these, 4 ways to cut the others, all 12 together."""
    objective = o.SpanCorruption(o.Denoiser(2, 0.45), SENTINELS, EOS)
    masks = Counter(tuple(objective(words(9), o.example_rng(0, 0, index)).source.tolist()) for index in range(12_000))
    assert len(masks) == 12
    assert_distributed(masks, {mask: 1 / 12 for mask in masks})


@pytest.mark.parametrize(
    "mean_span, rate", [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5), (12, 0.5)]
)
def test_span_lengths_over_a_million_tokens(mean_span, rate):
    length, windows = 2048, 500
    objective = o.SpanCorruption(o.Denoiser(mean_span, rate), SENTINELS, EOS)
    found = [spans_of(objective(words(length), o.example_rng(3, 0, index))) for index in range(windows)]
    noise, spans = round(length * rate), round(round(length * rate) / mean_span)
    masked = sum(map(sum, found))
    assert masked == windows * noise and abs(masked - rate * length * windows) <= 0.5 * windows
    assert sum(map(len, found)) == windows * spans
    # A composition's parts all have one distribution; parts of one window hang together, windows don't.
    ways = math.comb(noise - 1, spans - 1)
    shares = {size: math.comb(noise - size - 1, spans - 2) / ways for size in range(1, noise - spans + 2)}
    for part in (0, spans // 2, spans - 1):
        assert_distributed(Counter(row[part] for row in found), shares)
    mean = noise / spans
    variance = sum(share * (size - mean) ** 2 for size, share in shares.items())
    for part in (0, spans // 2, spans - 1):
        assert abs(np.mean([row[part] for row in found]) - mean) <= Z * math.sqrt(variance / windows)


@pytest.mark.parametrize("preset", ["ul2", "t5gemma2"])
def test_a_mixture_draws_by_weight_over_a_million_tokens(preset):
    length, windows = 512, 4000
    mixture = build(preset)
    assert isinstance(mixture, o.Mixture)
    lengths = [part.lengths(length) for part in mixture.objectives]
    examples = [mixture(words(length), o.example_rng(0, 0, index)) for index in range(windows)]
    drawn = Counter(lengths.index((len(example.source), len(example.target))) for example in examples)
    weights = {"ul2": [1] * 7, "t5gemma2": [1, 1, 1, 1, 4]}[preset]
    shares = [weight / sum(weights) for weight in weights]
    assert len(set(lengths)) == len(shares)
    assert_distributed(drawn, dict(enumerate(shares)))
    # Masked tokens of all the windows together.
    rates = {"ul2": [0.15, 0.15, 0.5, 0.5, 0.15, 0.5, 0.25], "t5gemma2": [0.15, 0.5, 0.15, 0.5, 0.75]}[preset]
    counts = [round(length * rate) for rate in rates]
    mean = sum(share * count for share, count in zip(shares, counts))
    variance = sum(share * (count - mean) ** 2 for share, count in zip(shares, counts))
    masked = sum(sum(spans_of(example)) or len(example.target) for example in examples)
    assert abs(masked - windows * mean) <= Z * math.sqrt(windows * variance)


def test_a_mixture_of_unlike_objectives():
    mixture = o.Mixture((o.PrefixLM(min_source=3), build("bart"), build("t5")), (3, 1, 2), "unlike")
    assert mixture.shortest() == 6
    forms = Counter()
    for index in range(6000):
        example = mixture(words(40), o.example_rng(0, 0, index))
        forms["prefix" if example.continues else "bart" if MASK in example.source else "t5"] += 1
    assert_distributed(forms, {"prefix": 3 / 6, "bart": 1 / 6, "t5": 2 / 6})


def test_the_random_cut_is_uniform():
    objective = o.PrefixLM("random", min_source=3)
    cuts = Counter(len(objective(words(20), o.example_rng(0, 0, index)).source) for index in range(20_000))
    assert_distributed(cuts, {cut: 1 / 17 for cut in range(3, 20)})


@cache
def below(noise: int, mean: float) -> tuple[float, ...]:
    """P(the first j Poisson lengths add up to less than ``noise``), for j from 0 to ``noise``."""
    sums = np.arange(noise)
    log_factorials = np.array([math.lgamma(total + 1) for total in sums])
    return (
        1.0,
        *(float(np.exp(sums * math.log(j * mean) - j * mean - log_factorials).sum()) for j in range(1, noise)),
    )


def infilled(example: o.Example) -> tuple[int, int]:
    """Masked tokens and mask tokens."""
    masks = int((example.source == MASK).sum())
    return len(example.target) - 1 - (len(example.source) - masks), masks


def test_infilling_over_a_million_tokens():
    length, windows = 1024, 1000
    objective = o.BartInfilling(mask=MASK, eos=EOS)
    found = [infilled(objective(words(length), o.example_rng(0, 0, index))) for index in range(windows)]
    noise = round(length * 0.3)
    assert {masked for masked, _ in found} == {noise}
    # A window has more than j spans when j of them are too few (Wald): the mean and variance of their number.
    survival = np.array(below(noise, 3.0))
    mean = survival.sum()
    variance = ((2 * np.arange(noise) + 1) * survival).sum() - mean**2
    assert abs(np.mean([spans for _, spans in found]) - mean) <= Z * math.sqrt(variance / windows)
    assert abs(noise / mean - 3) < 0.03  # the mean span length, which the last span shortens a little


def test_infilling_lengths():
    """The first length is Poisson's, zero too, while there is enough left; an insertion stands anywhere."""
    objective = o.BartInfilling(mask=MASK, eos=EOS)
    found = [objective._span_lengths(60, o.example_rng(0, 0, index)) for index in range(5000)]
    assert all(spans.sum() == 60 and spans[-1] > 0 for spans in found)
    poisson = {size: math.exp(-3) * 3**size / math.factorial(size) for size in range(60)}
    assert_distributed(Counter(int(spans[0]) for spans in found), poisson)
    assert_distributed(Counter(int(spans[5]) for spans in found), poisson)
    # Spans and insertions of all windows: each of the lengths that were drawn is zero with the same probability.
    drawn = sum(map(len, found))
    zeros = sum(int((spans == 0).sum()) for spans in found)
    # Drawn and zero are both stopped sums; zeros - drawn * p is a martingale with variance E[drawn] p (1 - p).
    p = math.exp(-3)
    assert abs(zeros - drawn * p) <= Z * math.sqrt(drawn * p * (1 - p))


def test_infilling_places_are_uniform():
    """Of 4 tokens 1 is masked: one mask token at any of the places."""
    objective = o.BartInfilling(mask=MASK, eos=None, rate=0.25)
    sources = Counter(tuple(objective(words(4), o.example_rng(0, 0, index)).source.tolist()) for index in range(4000))
    expected = [tuple([*words(4)[:place], MASK, *words(4)[place + 1 :]]) for place in range(4)]
    assert_distributed(sources, {source: 1 / 4 for source in expected})


def test_infilling_spans_that_cover_too_little_are_filled_up():
    """Six spans of mean 1 cover less than 6 tokens about half of the time; all are masked nevertheless."""
    objective = o.BartInfilling(mask=MASK, eos=EOS, poisson=1, rate=0.5)
    found = Counter()
    for index in range(4000):
        spans = objective._span_lengths(3, o.example_rng(0, 0, index))
        assert spans.sum() == 3 and len(spans) <= 3
        found[tuple(spans.tolist())] += 1
    # Lengths a, b, c of Poisson(1) whose sum passes 3 are cut there; those below it are Poisson's given their sum.
    p = [math.exp(-1) / math.factorial(size) for size in range(60)]
    expected: Counter = Counter()
    for a, b, c in itertools.product(range(12), repeat=3):
        chance = p[a] * p[b] * p[c]
        if a >= 3:
            expected[(3,)] += chance
        elif a + b >= 3:
            expected[(a, 3 - a)] += chance
        elif a + b + c >= 3:
            expected[(a, b, 3 - a - b)] += chance
        else:
            missing = 3 - a - b - c
            for extra in itertools.product(range(3), repeat=missing):
                key = tuple(int(n) + extra.count(i) for i, n in enumerate((a, b, c)))
                expected[key] += chance / 3**missing
    assert_distributed(found, expected)


def outcome(objective: o.Objective, *key: int) -> tuple[bytes, bytes]:
    example = objective(words(600), o.example_rng(*key))
    return example.source.tobytes(), example.target.tobytes()


@pytest.mark.parametrize("name", ["t5", "dense", "bart"])
def test_other_seeds_epochs_and_indices_give_other_examples(name):
    objective = OBJECTIVES[name]
    keys = [*itertools.product(range(6), repeat=3), *itertools.product((2**63, 2**63 + 1, 2**64 - 1), repeat=3)]
    if name == "dense":  # spans of one token at half the rate: there is one way, whatever is drawn
        assert len({outcome(objective, *key) for key in keys}) == 1
        return
    assert len({outcome(objective, *key) for key in keys}) == len(keys)


@every_objective
def test_the_key_alone_decides(name):
    objective = OBJECTIVES[name]
    first = [outcome(objective, 1, 2, index) for index in range(20)]
    twin = dataclasses.replace(objective)
    assert [outcome(twin, 1, 2, index) for index in reversed(range(20))] == first[::-1]


@given(keys=st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), min_size=2, max_size=2, unique=True))
def test_streams_differ(keys):
    first, second = (o.example_rng(*key).integers(2**63, size=4).tolist() for key in keys)
    assert first != second


def test_the_streams_are_philoxs():
    """Pinned: a resumed run of a later version must see what the first one saw."""
    key, counter = np.array([11, 22], np.uint64), np.array([0, 0, 0, 33], np.uint64)
    plain = np.random.Generator(np.random.Philox(key=key, counter=counter))
    assert o.example_rng(11, 22, 33).integers(2**63, size=8).tolist() == plain.integers(2**63, size=8).tolist()


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (2**64, 0, 0), (0, 2**64, 0), (0, 0, 2**64)])
def test_a_number_that_does_not_fit_is_refused(key):
    with pytest.raises(OverflowError):
        o.example_rng(*key)


def test_a_generator_is_cheap():
    assert min(timeit.repeat(lambda: o.example_rng(1, 2, 3), number=200, repeat=20)) / 200 < 15e-6


def test_a_schedule_goes_by_the_share_of_the_run():
    schedule = o.schedule_from(
        [{"objective": "ul2", "share": 0.9}, {"objective": "prefix_lm", "share": 0.1}], SENTINELS, eos=EOS
    )
    names = {fraction: schedule.at(fraction).name for fraction in (0, 0.5, 0.899, 0.9, 0.95, 1, 1.5)}
    assert list(names.values()) == ["ul2"] * 3 + ["prefix_lm"] * 4
    assert [schedule.stage_index(fraction) for fraction in names] == [0, 0, 0, 1, 1, 1, 1]
    for fraction in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="at least 0"):
            schedule.at(fraction)


def test_a_schedule_of_one():
    schedule = o.schedule_from("ul2", SENTINELS, eos=EOS)
    assert schedule.at(0).name == schedule.at(1).name == "ul2" and len(schedule.stages) == 1


@pytest.mark.parametrize("shares", [(0.9, 0.2), (0.5, 0.4), (0.999998,), (-0.5, 1.5), (0.0, 1.0), ()])
def test_shares_add_up_to_one(shares):
    with pytest.raises(UserError, match="shares are"):
        o.Schedule(tuple((share, o.PrefixLM()) for share in shares))


def test_shares_may_be_rounded():
    assert len(o.Schedule(tuple((1 / 3 + 3e-7, o.PrefixLM()) for _ in range(3))).stages) == 3


def test_the_presets():
    def rows(name):
        return [
            (part.denoiser.mean_span, part.denoiser.rate, part.denoiser.placement, part.denoiser.mode_token, weight)
            for mixture in [build(name, MODES)]
            for part, weight in zip(mixture.objectives, mixture.weights)
        ]

    r, s, x = MODES["R"], MODES["S"], MODES["X"]
    assert rows("ul2") == [
        (3, 0.15, "spread", r, 1),
        (8, 0.15, "spread", r, 1),
        (3, 0.5, "spread", x, 1),
        (8, 0.5, "spread", x, 1),
        (64, 0.15, "spread", x, 1),
        (64, 0.5, "spread", x, 1),
        (None, 0.25, "end", s, 1),
    ]
    assert rows("t5gemma2") == [
        (3, 0.15, "spread", r, 1),
        (12, 0.5, "spread", x, 1),
        (32, 0.15, "spread", x, 1),
        (32, 0.5, "spread", x, 1),
        (None, 0.75, "end", s, 4),
    ]
    assert rows("t5") == [(3, 0.15, "spread", r, 1)]
    assert build("prefix_lm") == o.PrefixLM("half", 1)
    assert build("bart") == o.BartInfilling(mask=MASK, eos=EOS, rate=0.3, poisson=3.0)
    assert [build(name).name for name in o.PRESETS] == ["prefix_lm", "ul2", "t5gemma2", "t5", "bart"]
    assert [build(name).teachable for name in o.PRESETS] == [True, False, False, False, False]


def test_without_mode_tokens_presets_have_none():
    mixture = build("ul2")
    assert isinstance(mixture, o.Mixture)
    assert {part.denoiser.mode_token for part in mixture.objectives} == {None}
    assert mixture.objectives[-1].teachable and not mixture.objectives[0].teachable


def test_a_mapping_says_everything():
    spec = {
        "denoisers": [
            {"mean_span": 4, "rate": 0.2, "weight": 2, "mode": "X"},
            {"placement": "end", "rate": 0.5},
        ],
        "sentinel_at_end": True,
    }
    first = o.SpanCorruption(o.Denoiser(4, 0.2, "spread", 2, MODES["X"]), SENTINELS, EOS, True)
    second = o.SpanCorruption(o.Denoiser(None, 0.5, "end"), SENTINELS, EOS, True)
    assert build(spec, MODES) == o.Mixture((first, second), (2, 1.0), "denoisers")
    mixture = build({"mixture": [{"objective": spec, "weight": 3}, {"objective": "prefix_lm", "weight": 1}]}, MODES)
    assert mixture == o.Mixture((build(spec, MODES), o.PrefixLM()), (3, 1), "denoisers+prefix_lm")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("prefixlm", "objective is 'prefixlm'; the names are prefix_lm, ul2, t5gemma2, t5, bart"),
        (3, "objective is 3; it can be one of prefix_lm, ul2"),
        ({}, "objective has no name, denoisers or mixture"),
        ({"name": ["ul2"]}, r"objective is \['ul2'\]; the names are"),
        (
            {"name": "prefix_lm", "cutt": "half"},
            "objective has the unknown key 'cutt'; it can have name, cut, min_source",
        ),
        ({"name": "prefix_lm", "cut": "third"}, "objective: cut is 'third'; it can be half or random"),
        ({"name": "prefix_lm", "min_source": 0}, "objective: min_source is 0; it must be at least 1"),
        ({"name": "prefix_lm", "min_source": 1.5}, "objective.min_source is 1.5; it must be a whole number"),
        ({"name": "prefix_lm", "min_source": True}, "objective.min_source is True; it must be a whole number"),
        ({"name": "ul2", "rate": 0.1}, "objective has the unknown key 'rate'; it can have name, sentinel_at_end"),
        ({"name": "ul2", "sentinel_at_end": 1}, "objective.sentinel_at_end is 1; it can be true or false"),
        ({"name": "bart", "rate": 1}, "objective: rate is 1; it must be above 0 and below 1"),
        ({"name": "bart", "poisson": 0.5}, "objective: poisson is 0.5; it must be at least 1"),
        ({"name": "bart", "poisson": "3"}, "objective.poisson is '3'; it must be a number"),
        ({"name": "bart", "mean": 3}, "unknown key 'mean'; it can have name, rate, poisson"),
        ({"denoisers": []}, r"objective.denoisers is \[\]; it must be a list with at least one entry"),
        ({"denoisers": {"rate": 0.1}}, "objective.denoisers is {'rate': 0.1}; it must be a list"),
        ({"denoisers": [3]}, r"objective.denoisers\[0\] is 3; it must be a mapping with rate, mean_span"),
        ({"denoisers": [{"mean_span": 3}]}, r"objective.denoisers\[0\] lacks rate"),
        ({"denoisers": [{"rate": 0.5}]}, r"objective.denoisers\[0\]: mean_span is None; it must be at least 1"),
        ({"denoisers": [{"mean_span": 0.5, "rate": 0.5}]}, "mean_span is 0.5; it must be at least 1"),
        ({"denoisers": [{"mean_span": math.inf, "rate": 0.5}]}, "mean_span is inf; it must be at least 1"),
        ({"denoisers": [{"mean_span": math.nan, "rate": 0.5}]}, "mean_span is nan; it must be at least 1"),
        ({"denoisers": [{"mean_span": 3, "rate": 0}]}, "rate is 0; it must be above 0 and below 1"),
        ({"denoisers": [{"mean_span": 3, "rate": 1}]}, "rate is 1; it must be above 0 and below 1"),
        ({"denoisers": [{"mean_span": 3, "rate": "1e-1"}]}, r"denoisers\[0\].rate is '1e-1'; it must be a number"),
        ({"denoisers": [{"mean_span": 3, "rate": True}]}, r"denoisers\[0\].rate is True; it must be a number"),
        ({"denoisers": [{"mean_span": 3, "rate": 0.5, "weight": 0}]}, "weight is 0; it must be above 0"),
        ({"denoisers": [{"mean_span": 3, "rate": 0.5, "place": "end"}]}, "unknown key 'place'"),
        ({"denoisers": [{"rate": 0.5, "placement": "start"}]}, "placement is 'start'; it can be spread or end"),
        ({"denoisers": [{"mean_span": 3, "rate": 0.5, "placement": "end"}]}, "at the end has one span"),
        ({"denoisers": [{"mean_span": 3, "rate": 0.5, "mode": "Q"}]}, "mode is 'Q'; `mode_tokens` has R, S, X"),
        ({"denoisers": [{"mean_span": 3, "rate": 0.5}], "mixture": []}, "unknown key 'denoisers'"),
        ({"mixture": [{"objective": "ul2"}]}, r"objective.mixture\[0\] lacks weight"),
        ({"mixture": [{"objective": "ul2", "weight": -1}]}, r"objective.mixture\[0\]: weight is -1"),
        ({"mixture": [{"objective": "x", "weight": 1}]}, r"objective.mixture\[0\].objective is 'x'; the names are"),
        ({"mixture": [{"objective": "ul2", "share": 1}]}, "unknown key 'share'; it can have objective, weight"),
    ],
)
def test_what_a_spec_gets_wrong_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec, MODES)
    with pytest.raises(UserError, match=message):
        o.schedule_from(spec, SENTINELS, eos=EOS, mode_tokens=MODES, mask=MASK)


@pytest.mark.parametrize(
    "spec, message",
    [
        ([], r"objective is \[\]; it must be a list with at least one entry"),
        (
            [{"objective": "ul2", "weight": 1}],
            r"objective\[0\] has the unknown key 'weight'; it can have objective, share",
        ),
        ([{"objective": "ul2", "share": 0}], r"objective\[0\]: share is 0"),
        ([{"objective": "ul2", "share": 0.5}], "shares are 0.5; each must be above 0 and their sum 1"),
    ],
)
def test_what_a_schedule_gets_wrong_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        o.schedule_from(spec, SENTINELS, eos=EOS)


def test_what_the_tokenizer_lacks_is_named():
    with pytest.raises(UserError, match=r"bart, which needs a mask token\. Give its id as `mask`"):
        o.objective_from("bart", SENTINELS, eos=EOS)
    own = {"denoisers": [{"mean_span": 3, "rate": 0.5, "mode": "X"}]}
    with pytest.raises(UserError, match=r"mode is 'X'; `mode_tokens` has none"):
        o.objective_from(own, SENTINELS, eos=EOS)
    with pytest.raises(UserError, match="mode is 'S'; `mode_tokens` has R, X"):
        build("ul2", {"R": 4000, "X": 4002})


def test_a_mixture_has_a_weight_for_each():
    with pytest.raises(UserError, match="1 objectives and 2 weights"):
        o.Mixture((o.PrefixLM(),), (1, 2), "uneven")


def gemma_vocabulary() -> dict[str, int]:
    """Like Gemma 2's: 99 unused ids between the special tokens and the turn tokens, in no order."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<2mass>": 5, "[@BOS@]": 6}
    vocabulary |= {f"<unused{n}>": 7 + n for n in sorted(range(99), key=str)}
    vocabulary |= {"<start_of_turn>": 106, "<end_of_turn>": 107, "\n": 108, "unused5": 240_000, "<unused>": 240_001}
    vocabulary |= {"▁<unused7>": 240_002, "<unused7> ": 240_003, "<unused7>\n": 240_005, "<extra_id_0>": 240_004}
    return vocabulary


def test_gemmas_sentinels():
    assert o.sentinels_of(gemma_vocabulary()) == tuple(range(7, 106))


def test_sentinels_go_by_their_number_not_by_their_id():
    assert o.sentinels_of({f"<extra_id_{n}>": 32099 - n for n in range(100)}) == tuple(range(32099, 31999, -1))
    assert o.sentinels_of({"<unused2>": 9, "<unused10>": 8, "<unused0>": 300}) == (300, 9, 8)


def test_a_vocabulary_without_sentinels_is_refused():
    with pytest.raises(UserError, match="Give the ids to use as `sentinels`"):
        o.sentinels_of({"a": 0, "b": 1})


@pytest.mark.parametrize(
    "spec", ["ul2", {"mixture": [{"objective": "ul2", "weight": 1}, {"objective": "prefix_lm", "weight": 1}]}]
)
def test_too_few_sentinels_are_an_error_before_training(spec):
    objective = o.objective_from(spec, o.sentinels_of(gemma_vocabulary()), eos=EOS)
    assert objective.sentinels_needed(8192) == round(4096 / 3)
    with pytest.raises(UserError, match=r"1365 spans with the denoiser spans\(3, 0\.5\), and there are 99") as caught:
        o.check_window(objective, 8192)
    longest = int(str(caught.value).split("at most ")[1].split()[0])
    o.check_window(objective, longest)
    with pytest.raises(UserError):
        o.check_window(objective, longest + 1)


def test_too_few_sentinels_stop_an_example_too():
    objective = o.objective_from("t5", SENTINELS[:99], eos=EOS)
    with pytest.raises(AssertionError):
        objective(words(8192), o.example_rng(0, 0, 0))


def test_no_sentinels_at_all():
    spread, end = (
        o.objective_from({"denoisers": [row]}, (), eos=EOS)
        for row in ({"mean_span": 3, "rate": 0.15}, {"placement": "end", "rate": 0.5})
    )
    o.check_window(end, 8192)
    with pytest.raises(UserError, match=r"there are 0 sentinels\. Give more `sentinels`, or choose"):
        o.check_window(spread, 512)


@every_objective
def test_a_window_below_the_shortest_is_refused(name):
    objective = OBJECTIVES[name]
    o.check_window(objective, objective.shortest())
    with pytest.raises(UserError, match=f"which needs {objective.shortest()}"):
        o.check_window(objective, objective.shortest() - 1)
    with pytest.raises(AssertionError):
        objective(words(objective.shortest() - 1), o.example_rng(0, 0, 0))


@pytest.mark.parametrize(
    "sentinels, eos, mode, message",
    [
        ((7, 8, 7), EOS, None, "sentinels holds 7 more than once"),
        ((7, -8), EOS, None, "sentinels holds -8; it must be a list of token ids"),
        ((7, 2**31), EOS, None, "sentinels holds 2147483648"),
        ((7, True), EOS, None, "sentinels holds True"),
        ((7, 1), EOS, None, "end-of-sequence token 1 is one of the sentinels"),
        ((7, 8), EOS, 8, "mode token 8 is one of the sentinels"),
    ],
)
def test_ids_that_cannot_be_sentinels(sentinels, eos, mode, message):
    with pytest.raises(UserError, match=message):
        o.SpanCorruption(o.Denoiser(3, 0.15, mode_token=mode), sentinels, eos)


def test_sentinels_stay_with_the_checkpoint(tmp_path):
    assert o.load_sentinels(tmp_path) is None
    o.save_sentinels(tmp_path, range(9, 3, -1))
    o.save_sentinels(tmp_path, [*np.array([300, 9, 8], np.int32)])
    assert o.load_sentinels(tmp_path) == (300, 9, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["sentinels.json"]


def test_a_failed_write_leaves_the_old_sentinels(tmp_path, monkeypatch):
    o.save_sentinels(tmp_path, (7, 8))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        o.save_sentinels(tmp_path, (9, 10))
    assert o.load_sentinels(tmp_path) == (7, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["sentinels.json"]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1, 1]", '["<unused0>"]', "[1.5]", "[-1]", "3"])
def test_sentinels_that_are_no_ids_are_refused(tmp_path, content):
    (tmp_path / "sentinels.json").write_text(content)
    with pytest.raises(UserError, match=r"sentinels\.json"):
        o.load_sentinels(tmp_path)


def test_the_file_is_plain_json(tmp_path):
    o.save_sentinels(tmp_path, (7, 8))
    assert json.loads((tmp_path / "sentinels.json").read_text()) == [7, 8]
