"""Log-likelihoods against those of plain forwards, one pair at a time: in float64, but for stock decoder-only models,
whose softmax is in float32 and has no room for float64's masks."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.evaluation import batches
from modeling_t5gemma.evaluation.batches import BatchSize, Shape, in_batches
from modeling_t5gemma.evaluation.scoring import Pair, log_likelihoods
from tests import tiny
from tests.inference.conftest import MAKE

SIZE = 97


@torch.no_grad()
def logits_of(model, pair: Pair) -> torch.Tensor:
    """(target, V): all logits of one row without padding."""
    source = torch.tensor([pair.source])
    if model.config.is_encoder_decoder:
        begin = torch.tensor([[model.decoder_start_token_id(), *pair.target[:-1]]])
        return model(input_ids=source, decoder_input_ids=begin).logits[0]
    whole = torch.tensor([pair.source + pair.target])
    return model(whole).logits[0, len(pair.source) - 1 : -1]


def plainly(model, pair: Pair) -> tuple[float, bool]:
    scores, target = logits_of(model, pair).log_softmax(dim=-1), torch.tensor(pair.target)
    return float(scores[torch.arange(len(target)), target].sum()), bool((scores.argmax(dim=-1) == target).all())


def greedy(model, source: tuple[int, ...], length: int) -> tuple[int, ...]:
    target: tuple[int, ...] = ()
    for _ in range(length):
        target += (int(logits_of(model, Pair(source, (*target, 0)))[-1].argmax()),)
    return target


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    makes = {"separate": tiny.t5gemma, "layerwise": lambda: tiny.layerwise(tiny.gemma3()), "decoder_only": tiny.gemma3}
    return {kind: make() if kind == "decoder_only" else make().double() for kind, make in makes.items()}


def close(model) -> float:
    return 1e-9 if model.dtype == torch.float64 else 1e-3


def pairs_of(model) -> list[Pair]:
    """Sources beyond the window and of one token; shared sources with one to five targets, which share beginnings."""
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, SIZE) for _ in range(length))

    pairs = []
    for length, targets in ((1, 3), (5, 1), (40, 5), (23, 2), (40, 1), (7, 3)):
        source = ids(length)
        pairs += [Pair(source, ids(draw.randrange(1, 7))) for _ in range(targets)]
    letters = ids(12)
    pairs += [Pair(letters, (letter,)) for letter in (10, 11, 12, 13)]
    pairs += [Pair(letters, (20, 21, last)) for last in (10, 11)]
    pairs.append(Pair(letters, greedy(model, letters, 3)))
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_scores_are_those_of_plain_forwards_whatever_the_batches(models, kind, rows):
    model = models[kind]
    pairs = pairs_of(model)
    scores = log_likelihoods(model, pairs, 0, BatchSize.of(model.device, SIZE, rows))
    expected = [plainly(model, pair) for pair in pairs]
    assert [score.log_likelihood for score in scores] == pytest.approx(
        [value for value, _ in expected], abs=close(model)
    )
    assert [score.greedy for score in scores] == [likeliest for _, likeliest in expected]
    assert any(score.greedy for score in scores) and not all(score.greedy for score in scores)


def test_an_empty_target_is_certain(models, kind):
    model = models[kind]
    pairs = [Pair((5, 6), ()), Pair((5, 6), (7,))]
    scores = log_likelihoods(model, pairs, 0, BatchSize.of(model.device, SIZE))
    assert scores[0] == (0.0, True)
    assert scores[1].log_likelihood == pytest.approx(plainly(model, pairs[1])[0], abs=close(model))


def test_a_source_is_encoded_once_and_letters_are_one_row(models, monkeypatch):
    model = models["separate"]
    seen = {"encoder": 0, "decoder": 0}
    for name, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):

        def forward(*args, name=name, plain=stack.forward, **kwargs):
            seen[name] += len(kwargs["input_ids"])
            return plain(*args, **kwargs)

        monkeypatch.setattr(stack, "forward", forward)
    pairs = [Pair((5, 6, source), (7, 8, letter)) for source in (10, 11, 12) for letter in (20, 21, 22, 23)]
    pairs += [Pair((5, 6, 10), (7, 9))]
    log_likelihoods(model, pairs, 0, BatchSize.of(model.device, SIZE))
    assert seen == {"encoder": 3, "decoder": 4}


def test_bfloat16_is_normalised_in_float32(models, kind):
    model = MAKE[kind]().to(torch.bfloat16)
    pair = Pair((2, 5, 6, 7), (8,))
    all_targets = [Pair(pair.source, (token,)) for token in range(model.get_output_embeddings().weight.shape[0])]
    scores = log_likelihoods(model, all_targets, 0, BatchSize.of(model.device, SIZE))
    total = torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64).exp().sum()
    assert total == pytest.approx(1, abs=1e-5)


# Batches


@dataclasses.dataclass(frozen=True)
class Thing:
    names: tuple[int, ...]
    length: int

    @property
    def shape(self) -> Shape:
        return Shape(len(self.names), self.length, 1, 1)

    def halves(self) -> list[Thing]:
        half = len(self.names) // 2
        return [Thing(names, self.length) for names in (self.names[:half], self.names[half:])] if half else []


def out_of_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), max_size=12), st.integers(1, 9), st.integers(31, 200)
)
def test_everything_is_done_once_however_little_fits(sizes, rows, memory):
    things, number = [], 0
    for count, length in sorted(sizes, reverse=True):
        things.append(Thing(tuple(range(number, number + count)), length))
        number += count
    done, refused = [], []

    def work(batch: list[Thing]) -> None:
        cost = sum(len(thing.names) for thing in batch) * (max(thing.length for thing in batch) + 1)
        assert sum(len(thing.names) for thing in batch) <= rows
        if cost > memory:
            refused.append(cost)
            raise out_of_memory()
        done.extend(name for thing in batch for name in thing.names)

    with mock.patch.object(batches, "clear_device_cache"):  # which takes a while
        in_batches(things, BatchSize(rows, None, 1 << 30, 1), work)
    assert sorted(done) == list(range(number))
    assert len(refused) <= 8, "each time half as much"


def test_a_row_that_does_not_fit_is_told():
    def work(batch: list[Thing]) -> None:
        raise out_of_memory()

    with pytest.raises(UserError, match=r"single row of 30 \+ 1 tokens.*bfloat16"):
        in_batches([Thing((0, 1, 2), 30)], BatchSize(64, None, 1 << 30, 1), work)


def test_other_errors_are_not_for_want_of_memory():
    def work(batch: list[Thing]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([Thing((0,), 3), Thing((1,), 3)], BatchSize(64, None, 1 << 30, 1), work)


def test_a_cpu_has_limits_of_its_own():
    found, given_ = (BatchSize.of(torch.device("cpu"), 262144, rows) for rows in (None, 100))
    assert not found.holds([Shape(1, 4000, 100, 10)] * 2) and found.holds([Shape(1, 1000, 100, 10)] * 7)
    assert given_.holds([Shape(1, 4000, 100, 1)] * 100), "what the user asks for is tried"
    assert not given_.holds([Shape(1, 4000, 100, 100)] * 100), "but for gigabytes of logits"
    assert BatchSize.of(torch.device("cuda"), 262144).tokens is None
