"""benchmarks/claims: the verdict's rule and interval, the cache of jobs, the text, the starts, and the whole, tiny."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.claims.arms import ARMS, Arm
from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.jobs import LARGE, Job, Settings, finish, result_of, run_all
from benchmarks.claims.measures import held_out_bits
from benchmarks.claims.models import decoder_only, grown, layers_of_equal_size
from benchmarks.claims.runs import run, start
from benchmarks.claims.sizes import SMOKE
from benchmarks.claims.starts import fit_keys_and_values, silence
from benchmarks.claims.text import BOS, load, prepare
from benchmarks.claims.training import Windows, fit, language_modelling
from benchmarks.claims.verdicts import NOT_SEEN, SEEN, TOO_SMALL, Effect, effect_of, verdict
from modeling_t5gemma.errors import UserError

ROOT = Path(__file__).parents[1]
SETTINGS = Settings(SMOKE, "float32")


# Verdicts


@pytest.mark.parametrize(
    ("mean", "half_width", "expected"),
    [(0.3, 0.2, SEEN), (-0.3, 0.2, NOT_SEEN), (0.3, 0.4, TOO_SMALL), (-0.3, 0.4, TOO_SMALL), (0.3, 0.3, TOO_SMALL)],
)
def test_verdict(mean, half_width, expected):
    assert verdict(Effect(mean, half_width)) == expected


def test_an_interval_is_of_seeds_and_of_windows():
    rng = np.random.default_rng(0)
    worse = rng.normal(size=(3, 50))
    of_seeds, of_windows = np.array([0.9, 1.0, 1.4]), rng.normal(size=50)
    found = effect_of(worse + of_seeds[:, None] + of_windows, worse)
    over_seeds = stats.t.interval(0.95, 2, scale=stats.sem(of_seeds))[1]
    over_windows = stats.norm.interval(0.95, scale=stats.sem(of_windows))[1]
    assert found.mean == pytest.approx(1.1 + of_windows.mean())
    assert found.half_width == pytest.approx(np.hypot(over_seeds, over_windows), rel=1e-3)
    assert effect_of(worse, worse + of_seeds[:, None]).half_width == pytest.approx(over_seeds, rel=1e-3)


def test_what_all_runs_share_cancels():
    shared = np.random.default_rng(0).normal(scale=100, size=(3, 50))
    assert effect_of(shared + 1, shared) == Effect(pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match=r"\(1, 50\).*at least 2 by 2"):
        effect_of(np.zeros((1, 50)), np.zeros((1, 50)))


def test_every_arm_of_a_claim_exists_and_every_arm_has_a_claim():
    named = {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    assert named == set(ARMS)


# Jobs


def counted(job: Job, output: Path, settings: Settings, scratch: Path) -> dict:
    """A run that leaves a mark, and fails if it is told to."""
    with (output / "ran").open("a") as file:
        file.write(f"{job.name}\n")
    if job.name == "causal" and not (output / "repaired").exists():
        raise RuntimeError("broken")
    return {"scratch_is_empty": not any(scratch.iterdir())}


def test_a_finished_job_is_not_run_again(tmp_path):
    jobs = [Job(name, 0) for name in ("copy", "causal", "mha")]
    with pytest.raises(RuntimeError, match="broken"):
        run_all(jobs, counted, tmp_path, SETTINGS, workers=1)
    assert result_of(jobs[0], tmp_path, SETTINGS)["scratch_is_empty"]
    assert result_of(jobs[1], tmp_path, SETTINGS) is None
    (tmp_path / "repaired").touch()
    run_all(jobs, counted, tmp_path, SETTINGS, workers=1)
    ran = (tmp_path / "ran").read_text().split()
    assert ran.count("copy") == 1 and ran.count("causal") == 2 and set(ran) == {"copy", "causal", "mha"}
    assert all(result_of(job, tmp_path, SETTINGS) for job in jobs)


def test_a_result_is_of_its_settings_and_its_arm(tmp_path, monkeypatch):
    job = Job("copy", 1)
    finish(job, tmp_path, SETTINGS, {"loss": 1})
    assert result_of(job, tmp_path, SETTINGS) == {"loss": 1}
    assert result_of(Job("copy", 2), tmp_path, SETTINGS) is None
    assert result_of(job, tmp_path, Settings(SMOKE, "bfloat16")) is None
    assert result_of(job, tmp_path, Settings(replace(SMOKE, batch=5), "float32")) is None
    monkeypatch.setitem(ARMS, "copy", Arm("another", cross_rate=2))
    assert result_of(job, tmp_path, SETTINGS) is None


# Text


def write_lists(folder: Path, packages: int = 400) -> Path:
    """Made-up packages of two sections that have words of their own."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = {name: ["".join(rng.choices(syllables, k=3)) for _ in range(60)] for name in ("games", "libs")}
    folder.mkdir()
    lists, translations = [], []
    for number in range(packages):
        section = rng.choice(list(words))
        title, description = (" ".join(rng.choices(words[section], k=k)) for k in (4, 60))
        lists.append(f"Package: p{number}\nSource: {''.join(rng.choices(syllables, k=5))}\nSection: {section}\n")
        translations.append(f"Package: p{number}\nDescription-en: {title}\n {description} é\n")
    (folder / "Packages").write_text("\n".join(lists), encoding="utf-8")
    (folder / "Translation-en").write_text("\n".join(translations), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """An output folder with text and the pretrained models of seed 0."""
    folder = tmp_path_factory.mktemp("claims")
    prepare(folder / "text", SMOKE, write_lists(folder / "lists"))
    run_here(folder, Job(LARGE, 0), folder / "scratch-large")
    run_here(folder, Job("small", 0), folder / "scratch-small")
    return folder


def run_here(output: Path, job: Job, scratch: Path) -> dict:
    scratch.mkdir()
    return run(job, output, SETTINGS, scratch)


def test_windows_are_whole_and_their_bytes_counted(output):
    from transformers import AutoTokenizer

    text = load(output / "text")
    tokenizer = AutoTokenizer.from_pretrained(output / "text" / "tokenizer")
    assert tokenizer.convert_tokens_to_ids("<unused0>") == text.sentinels[0] == BOS + 1
    assert text.train.shape[1] == text.held_out.shape[1] == SMOKE.window
    assert not {tuple(row) for row in text.train.tolist()} & {tuple(row) for row in text.held_out.tolist()}
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for window, count in zip(text.held_out, text.bytes):
        half = [vocabulary[token] for token in window[SMOKE.window // 2 :]]
        assert count == sum(map(len, half))  # a character of the alphabet stands for a byte
        if "Ã" not in "".join(half):
            assert count == len(tokenizer.decode(window[SMOKE.window // 2 :]).encode())
    assert sorted(text.sections) == ["games", "libs"] and set(text.to_test.labels) == {0, 1}


def test_a_text_of_other_sizes_is_refused(output):
    prepare(output / "text", SMOKE, None)
    with pytest.raises(UserError, match=r"text of other sizes.*another --output"):
        prepare(output / "text", replace(SMOKE, words=600), None)


def test_runs_of_a_seed_see_the_same_windows():
    rows = np.arange(10)[:, None]
    first, second = Windows(rows, 4, seed=1), Windows(rows, 4, seed=1, first=2)
    assert all((first(step + 2) == second(step)).all() for step in range(5))
    epoch = np.concatenate([first(step) for step in range(5)]).ravel()
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert epoch.tolist() != np.concatenate([Windows(rows, 4, seed=2)(step) for step in range(5)]).ravel().tolist()


# Models


def test_a_grown_model_is_the_same_function(output):
    model = decoder_only(SMOKE, small=False)
    ids = torch.randint(3, SMOKE.words, (2, SMOKE.window))
    bigger = grown(model, 5)
    assert len(bigger.model.layers) == 5
    torch.testing.assert_close(bigger(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    for number, source in enumerate([0, 0, 0, 1, 1]):
        expected = model.model.layers[source].self_attn.q_proj.weight
        assert torch.equal(bigger.model.layers[number].self_attn.q_proj.weight, expected)


def test_a_grown_model_is_as_large_as_a_pair(output, tmp_path):
    pair = start(ARMS["copy"], output / "seed0", load(output / "text"), tmp_path, 0)
    single = start(ARMS["single"], output / "seed0", load(output / "text"), tmp_path, 0)
    sizes = [
        sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        for model in (pair, grown(single, layers_of_equal_size(pair, single)))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.11)  # to the nearest of 5 layers


def test_a_silenced_start_ignores_its_encoder(output, tmp_path):
    text = load(output / "text")
    pair = start(ARMS["copy"], output / "seed0", text, tmp_path, 0)
    bits = held_out_bits(pair, text)
    assert bits["right"] != bits["wrong"]
    silence(pair)
    bits = held_out_bits(pair, text)
    assert bits["right"] == bits["wrong"]


def test_fitted_keys_are_those_of_self_attention(output, tmp_path):
    """Where the encoder's output says it all: one causal layer without its sublayers, so the embedding."""
    text = load(output / "text")
    source = start(ARMS["single"], output / "seed0", text, tmp_path, 0)
    pair = start(replace(ARMS["causal"]), output / "seed0", text, tmp_path, 0)
    for layer in pair.model.encoder.layers:
        layer.post_self_attn_layernorm.weight.data.fill_(-1)
        layer.post_feedforward_layernorm.weight.data.fill_(-1)
    windows = text.train[:40]
    fit_keys_and_values(pair, source, windows)
    ids = torch.from_numpy(windows.astype(np.int64))
    encoded = pair.model.encoder(input_ids=ids).last_hidden_state
    layer = source.model.layers[0]
    wanted = layer.self_attn.k_proj(layer.input_layernorm(source.model.embed_tokens(ids)))
    got = pair.model.decoder.layers[0].cross_attn.k_proj(encoded)
    assert (got - wanted).pow(2).mean() < 0.05 * wanted.var()


def test_what_waits_does_not_move(output, tmp_path):
    text = load(output / "text")
    pair = start(ARMS["copy"], output / "seed0", text, tmp_path, 0)
    before = {name: parameter.clone() for name, parameter in pair.named_parameters()}

    def loss(step: int, steps: int) -> torch.Tensor:
        ids = torch.from_numpy(text.train[:2].astype(np.int64))
        return pair(input_ids=ids, labels=ids).loss

    moved: dict[int, set[bool]] = {}

    def after(step: int) -> None:
        others = [name for name in before if "cross_attn" not in name]
        assert not torch.equal(pair.get_parameter(_QUERIES), before[_QUERIES])
        moved[step] = {not torch.equal(pair.get_parameter(name), before[name]) for name in others}

    waiting = ("embeddings", "encoder", "decoder")
    fit(pair, loss, 4, 1e-2, torch.float32, wait=0.5, waiting=waiting, after=after)
    assert moved == {1: {False}, 2: {False}, 3: {True}, 4: {True}}


_QUERIES = "model.decoder.layers.0.cross_attn.q_proj.weight"


def test_pretraining_is_the_stock_loss(output):
    text = load(output / "text")
    model = decoder_only(SMOKE, small=False)
    windows = Windows(text.train, 4, seed=0)
    ids = torch.from_numpy(windows(0).astype(np.int64))
    begun = torch.cat([torch.full((4, 1), BOS), ids], dim=1)
    expected = model(begun, labels=begun).loss
    torch.testing.assert_close(language_modelling(model, windows)(0, 1), expected)


# The whole


@pytest.mark.parametrize("name", ["distilled", "joint", "contrast", "layerwise", "hidden-words", "scratch"])
def test_an_arm_runs(output, tmp_path, name):
    result = run_here(output, Job(name, 0), tmp_path / "scratch")
    assert len(result["right"]) == len(result["wrong"]) == SMOKE.held_out
    assert ("classified" in result) == any(c.measure == "labels" and name in (c.better, c.worse) for c in CLAIMS)
    assert [point["step"] for point in result["curve"]] == ([0, 2, 4] if ARMS[name].curve else [])


@pytest.mark.slow
def test_the_command_and_that_it_goes_on(tmp_path):
    lists = write_lists(tmp_path / "lists")
    command = [sys.executable, "-m", "benchmarks.claims", "--smoke", "--lists", lists, "--output", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    jobs = (len(ARMS) + 2) * SMOKE.seeds
    assert first.stdout.count("s of CPU\n") == jobs
    told = (tmp_path / "out" / "claims.md").read_text()
    assert all(f"| {claim.title} |" in told for claim in CLAIMS)
    content = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert len(content["claims"]) == len(CLAIMS) and set(ARMS) < set(content["runs"])
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    (tmp_path / "out" / "seed1" / "mha.json").unlink()
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.count("s of CPU\n") == 1
    assert (tmp_path / "out" / "claims.md").read_text().startswith("## Claims")
