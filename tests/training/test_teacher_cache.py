"""A teacher's distribution as samples on disk."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch

from modeling_t5gemma import cli
from modeling_t5gemma.collators import Layout
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.losses import SampledTarget, linear_loss
from modeling_t5gemma.training import teacher_cache
from modeling_t5gemma.training.documents import Pieces
from modeling_t5gemma.training.shards import Vocabulary
from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.training.teacher import Teacher
from modeling_t5gemma.training.teacher_cache import Taught, draw_words, write_cache
from modeling_t5gemma.training.tokenizing import tokenize_source
from tests import tiny
from tests.training.test_trainer import losses, make, text

VOCABULARY = Vocabulary("words", "f" * 64)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(tiny.gemma3(), Layout(0, 2, None, 2))


@pytest.fixture
def pieces() -> Pieces:
    return Pieces(text(12), 16, 6)


def written(folder, pieces, teacher, samples=3, **kwargs) -> Taught:
    write_cache(folder, pieces, teacher, VOCABULARY, samples=samples, batch_size=2, **kwargs)
    return Taught(folder, pieces, VOCABULARY)


def test_samples_have_the_teachers_distribution_at_their_own_place(tmp_path, pieces, teacher):
    """Aligned by construction: frequencies against the teacher's own softmax, place by place."""
    count = 4000
    cache = written(tmp_path, pieces, teacher, samples=count)
    window = torch.from_numpy(cache.piece(3).astype(np.int64))
    with torch.no_grad():
        p = teacher.model(torch.cat([torch.tensor([2]), window[:-1]])[None]).logits[0].softmax(-1)
    words = torch.from_numpy(cache.taught(3).astype(np.int64))
    assert words.shape == (len(window), count)
    found = torch.zeros_like(p).scatter_add_(1, words, torch.ones_like(words, dtype=p.dtype)) / count
    # Each frequency has a standard deviation of at most sqrt(p / count).
    assert ((found - p).abs() <= 5.5 * (p / count).sqrt() + 1 / count).all()


def test_sampling_is_unbiased_and_the_likeliest_words_are_not():
    """The gradient of a student that equals its teacher is 0: samples say so on average, top-k never (hazard 25)."""
    torch.manual_seed(0)
    hidden, head = 0.3 * torch.randn(1, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    p = (hidden @ head.T).softmax(-1)

    def gradient(ids, weights):
        h = hidden.clone().requires_grad_()
        linear_loss(h, head, torch.tensor([0]), target=SampledTarget(ids, weights)).total.backward()
        return h.grad

    generator = torch.Generator().manual_seed(0)
    draws, count = 1000, 5
    single = [
        gradient(draw_words(hidden, head, None, count, generator), torch.full((1, count), 1 / count).double())
        for _ in range(draws)
    ]
    mean, error = torch.stack(single).mean(0), torch.stack(single).std(0) / draws**0.5
    assert (mean.abs() < 4.5 * error).all()
    top = p.topk(count, dim=-1)
    biased = gradient(top.indices, top.values / top.values.sum())
    assert (biased.abs() > 20 * error).any()
    assert biased.norm() > 10 * mean.norm()


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path, pieces, teacher, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    written(whole, pieces, teacher)

    def stop(windows):
        if (parts / "starts-00001.bin").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(parts, pieces, teacher, progress=stop)
    with pytest.raises(UserError, match="is not finished"):
        Taught(parts, pieces, VOCABULARY)
    written(parts, pieces, teacher)
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in parts.iterdir()) and len(files) > 5
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in files)


def test_a_cache_of_something_else_is_refused(tmp_path, pieces, teacher):
    written(tmp_path, pieces, teacher)
    with pytest.raises(UserError, match="window 16, not 15"):
        Taught(tmp_path, Pieces(text(12), 15, 6), VOCABULARY)
    with pytest.raises(UserError, match="tokenizer"):
        Taught(tmp_path, pieces, Vocabulary("words", "0" * 64))
    with pytest.raises(UserError, match="samples 3, not 4"):
        written(tmp_path, pieces, teacher, samples=4)
    with pytest.raises(UserError, match="t5gemma teacher-cache"):
        Taught(tmp_path / "nothing", pieces, VOCABULARY)


@pytest.mark.parametrize("pack", [None, (40, 40)])
def test_training_on_a_cache_is_training_on_the_teacher(tmp_path, pieces, teacher, pack):
    """With many samples the first loss is the cross-entropy against the teacher: the divergence plus its entropy."""
    cache = written(tmp_path / "cache", pieces, teacher, samples=3000)
    shared = {"steps": 1, "pack": pack, "batch": 3 if pack else 8}
    cached = make(tmp_path / "cached", teacher=False, windows=cache, cached=1.0, **shared)
    direct = make(tmp_path / "direct", teacher=teacher.model, windows=pieces, share=1.0, **shared)
    target = direct.teacher.target(next(iter(direct.get_train_dataloader()))["teacher"])
    p = (target.hidden @ target.weight.T).softmax(-1)
    for trainer in (cached, direct):
        trainer.train()
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert losses(cached)[0] == pytest.approx(losses(direct)[0] + entropy, rel=0.02)


def test_the_command_needs_a_decoder_only_teacher(tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    for name, model in (("original", tiny.gemma3()), ("student", tiny.t5gemma())):
        model.save_pretrained(tmp_path / name)
        tiny.word_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.jsonl").write_text('{"text": "' + "w5 w6 w7 " * 9 + '"}\n')
    source = TextSource(str(tmp_path / "text.jsonl"))
    tokenize_source(source, str(tmp_path / "original"), tmp_path / "tokens", processes=1, shard_tokens=1000)
    told = {}
    for name in ("original", "student"):
        words = [str(tmp_path / "tokens"), "--teacher", str(tmp_path / name), "--output", str(tmp_path / f"by {name}")]
        monkeypatch.setattr(sys, "argv", ["t5gemma", "teacher-cache", *words, "--window", "16", "--dtype", "float32"])
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        told[name] = ended.value.code or 0, capsys.readouterr()
    assert told["original"][0] == 0 and "16 samples a token of 2 windows" in told["original"][1].out
    assert told["student"][0] == 2
    assert "student is an encoder-decoder (t5gemma), and a teacher is decoder-only" in told["student"][1].err
