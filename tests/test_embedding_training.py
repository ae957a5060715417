"""The encoder as a text encoder: pooling, contrastive training by examples/embed.py, saving, MTEB."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_t5gemma.errors import UserError
from tests import tiny

pytestmark = pytest.mark.needs("sentence_transformers", "datasets", "jsonargparse")

ROOT = Path(__file__).parents[1]
SHORT, LONG = "w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16"


@pytest.fixture(scope="module")
def embed():
    spec = importlib.util.spec_from_file_location("embed", ROOT / "examples" / "embed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["embed"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["layerwise", "separate"])
def checkpoint(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = (
        tiny.layerwise(tiny.gemma3(), bidirectional_layers="all") if request.param == "layerwise" else tiny.t5gemma()
    )
    model.save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    (folder / "NOTICE").write_text("made of something")
    return folder


def pairs(file: Path, count: int, seed: int) -> str:
    """Queries in one half of the words, documents in the other, a word for each of the query's between others."""
    rng = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(count):
            meant = rng.sample(range(30), 4)
            said = [f"w{word + 50}" for word in meant] + [f"w{rng.randrange(80, tiny.VOCAB)}" for _ in range(4)]
            rng.shuffle(said)
            query = " ".join(f"w{word + 10}" for word in meant)
            lines.write(json.dumps({"completion": query, "description": " ".join(said)}) + "\n")
    return str(file)


def arguments(checkpoint: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        f"--model.path={checkpoint}",
        f"--data.train={pairs(tmp_path / 'train.jsonl', 600, 0)}",
        f"--data.test={pairs(tmp_path / 'test.jsonl', 60, 1)}",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.disable_tqdm=true",
        *more,
    ]


def test_training_finds_what_belongs_together(embed, checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    training = {"max_steps": 70, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    given = arguments(checkpoint, tmp_path, *(f"--training.{key}={value}" for key, value in training.items()))
    losses: list[float] = []
    real = embed.SentenceTransformerTrainer.log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embed.SentenceTransformerTrainer,
            "log",
            lambda self, logs, *rest: losses.append(logs.get("loss")) or real(self, logs, *rest),
        )
        measures = embed.embed(embed.settings_of([*given, "--model.max_seq_length=32"]))
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.7 * losses[0]
    before, after = (measures[when]["cosine_mrr@10"] for when in ("before", "after"))
    assert before < 0.3 and after > before + 0.3, (before, after)  # of 60 documents, which no query shares a word with
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text()) == measures
    assert (tmp_path / "out" / "NOTICE").is_file()
    again = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == 32
    told = embed.table(measures)
    assert f"| after | {measures['after']['cosine_accuracy@1']:.3f} |" in told


def test_the_measures_are_kept_whatever_the_last_check_finds(embed, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "check_saved", lambda *_: pytest.fail("the saved vectors differ"))
    settings = embed.settings_of(arguments(checkpoint, tmp_path, "--training.max_steps=1"))
    with pytest.raises(pytest.fail.Exception, match="saved vectors"):
        embed.embed(settings)
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text()).keys() == {"before", "after"}


def test_what_is_trained_in_bfloat16_is_saved_as_it_was_measured(embed, checkpoint, tmp_path):
    """``embed`` itself compares the vectors."""
    measures = embed.embed(
        embed.settings_of(arguments(checkpoint, tmp_path, "--training.bf16=true", "--training.max_steps=2"))
    )
    assert measures.keys() == {"before", "after"}


def test_batches_larger_than_the_memory_have_the_same_gradient(embed, checkpoint, tmp_path):
    given = arguments(checkpoint, tmp_path)
    gradients = []
    for more in ([], ["--contrast.mini_batch_size=3"]):
        settings = embed.settings_of([*given, *more])
        torch.manual_seed(0)
        model = embed.sentence_transformer(str(checkpoint), device="cpu")
        loss = embed.loss_of(model, settings)
        texts = embed.pairs_of(settings.data, settings.data.train)[:8]
        features = [model.preprocess(texts[column]) for column in ("query", "document")]
        loss(features, None).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_vector_does_not_depend_on_the_batch(embed, checkpoint, pooling):
    model = embed.sentence_transformer(str(checkpoint), pooling, device="cpu")
    together = model.encode([SHORT, LONG, ""])
    assert np.isfinite(together).all()
    for text, vector in zip((SHORT, LONG), together, strict=False):
        np.testing.assert_allclose(model.encode([text])[0], vector, atol=1e-5)
    last = model.encode([SHORT, SHORT.replace("w7", "w20")])
    assert np.abs(last[0] - last[1]).max() > 1e-3


@torch.no_grad()
def test_the_last_token_is_the_last_real_one(embed, checkpoint):
    model = embed.sentence_transformer(str(checkpoint), "lasttoken", device="cpu")
    features = model.preprocess([SHORT, LONG])
    begin = int(model[0].auto_model.config.decoder.cross_attention_type == "layerwise")
    assert features["attention_mask"].sum(1).tolist() == [3 + begin, 9 + begin]
    assert (features["input_ids"][:, 0] == 2).all() == bool(begin)  # <bos> where training has it
    hidden = model[0].auto_model(features["input_ids"], attention_mask=features["attention_mask"])[0]
    expected = torch.stack([hidden[0, 2 + begin], hidden[1, 8 + begin]])
    torch.testing.assert_close(model.encode([SHORT, LONG], convert_to_tensor=True), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_long_texts_are_cut_and_prompts_stand_before(embed, checkpoint):
    model = embed.sentence_transformer(str(checkpoint), max_seq_length=5, device="cpu")
    assert model.preprocess([LONG])["input_ids"].shape == (1, 5)
    assert model[0].preprocess([LONG], max_length=3)["input_ids"].shape == (1, 3)
    prompted = model.encode([SHORT], prompt="w30 ")
    np.testing.assert_allclose(prompted, model.encode([f"w30 {SHORT}"]), atol=1e-6)


@torch.no_grad()
def test_a_saved_model_keeps_its_settings(embed, checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = embed.sentence_transformer(
        str(checkpoint), "lasttoken", 7, device="cpu", prompts={"query": "w40 "}, model_kwargs={"dtype": torch.float32}
    )
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    texts = [SHORT, LONG]
    np.testing.assert_allclose(again.encode(texts), model.encode(texts), atol=1e-6)
    np.testing.assert_allclose(again.encode_query(texts), model.encode(texts, prompt="w40 "), atol=1e-6)
    assert again.max_seq_length == 7
    half = SentenceTransformer(
        str(tmp_path), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.bfloat16}
    )
    assert half.dtype == torch.bfloat16


def test_what_cannot_be_is_told(embed, checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"pooling is 'max'.*'mean', 'lasttoken'"):
        embed.sentence_transformer(str(checkpoint), "max")
    with pytest.raises(UserError, match=r"max_seq_length is 9999.* 2 to 256"):
        embed.sentence_transformer(str(checkpoint), max_seq_length=9999)
    settings = embed.settings_of(arguments(checkpoint, tmp_path, "--data.query=title"))
    with pytest.raises(UserError, match=r"no column 'title'.*'completion', 'description'"):
        embed.embed(settings)
    with pytest.raises(UserError, match="begins as and would overwrite"):
        embed.embed(embed.settings_of([*arguments(checkpoint, tmp_path), f"--training.output_dir={checkpoint}"]))
    for column, words in (("number", "does not hold texts, but"), ("nothing", "no pair of two texts in 'nothing'")):
        (tmp_path / "odd.jsonl").write_text('{"number": 1, "nothing": "", "description": "w5"}\n' * 3)
        odd = embed.settings_of([*arguments(checkpoint, tmp_path), f"--data.query={column}"])
        with pytest.raises(UserError, match=words):
            embed.pairs_of(odd.data, str(tmp_path / "odd.jsonl"))
    tiny.gemma3().save_pretrained(tmp_path / "decoder-only")
    with pytest.raises(UserError, match="Give an encoder-decoder") as error:
        embed.sentence_transformer(str(tmp_path / "decoder-only"))
    assert len(str(error.value)) < 400


def test_what_is_left_out_and_cut_is_told(embed, checkpoint, tmp_path, capsys):
    settings = embed.settings_of([*arguments(checkpoint, tmp_path), "--data.query=completion"])
    rows = [{"completion": "w5", "description": LONG}, {"completion": "w5", "description": None}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(embed.pairs_of(settings.data, str(tmp_path / "some.jsonl"))) == 1
    assert "left out 1 of 2 pairs" in capsys.readouterr().out
    begins = embed.sentence_transformer(str(checkpoint), device="cpu")[0].tokenizer.begins
    for cut, longer in ((9 + begins, 0), (8 + begins, 1)):
        model = embed.sentence_transformer(str(checkpoint), max_seq_length=cut, device="cpu")
        assert model[0].count_longer([SHORT, LONG]) == longer


@pytest.mark.needs("mteb")
@pytest.mark.parametrize("checkpoint", ["separate"], indirect=True)
@torch.no_grad()
def test_mteb_takes_it(embed, checkpoint, tmp_path):
    import mteb
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.models_protocols import EncoderProtocol
    from scipy.stats import spearmanr

    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(5, tiny.VOCAB)}" for _ in range(rng.randrange(3, 9))) for _ in range(40)]
    scores = [rng.uniform(0, 5) for _ in range(20)]
    lines = [
        {"sentence1": first, "sentence2": second, "score": score}
        for first, second, score in zip(texts[::2], texts[1::2], scores, strict=True)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    class Local(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Local",
            description="Words.",
            dataset={"path": str(tmp_path), "revision": "1"},
            type="STS",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )

    model = embed.sentence_transformer(str(checkpoint), device="cpu")
    assert isinstance(SentenceTransformerEncoderWrapper(model), EncoderProtocol)
    result = mteb.evaluate(model, Local(), cache=None, show_progress_bar=False, co2_tracker=False)
    left, right = model.encode(texts[::2]), model.encode(texts[1::2])
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    assert result.task_results[0].get_score() == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-4)
