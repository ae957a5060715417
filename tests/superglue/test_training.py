"""Checkpoints become classifiers, learn, and go on where they were stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.superglue.data import InputForm, encode, read_cases
from modeling_t5gemma.superglue.models import Checkpoint
from modeling_t5gemma.superglue.settings import DataSettings, HeadSettings
from modeling_t5gemma.superglue.tasks import TASKS
from modeling_t5gemma.superglue.trainer import ClassificationTrainer
from modeling_t5gemma.training.checkpoints import find
from tests.superglue import parts

KINDS = [
    ("separate", HeadSettings()),
    ("separate", HeadSettings(pooling="mean")),
    ("layerwise", HeadSettings()),
    ("layerwise", HeadSettings(reads="encoder_decoder")),
    ("decoder", HeadSettings()),
]
IDS = ["last", "mean", "layerwise", "encoder-decoder", "decoder-only"]


def trainer(folder, checkpoint, task, data, dropout=0.0, batch=4, seed=0, **kwargs) -> ClassificationTrainer:
    train, val = (encode(read_cases(str(data), task, split), checkpoint.form)[0] for split in ("train", "val"))
    return ClassificationTrainer(
        checkpoint.load(task, dropout, seed),
        parts.arguments(folder, per_device_train_batch_size=batch, seed=seed, **kwargs),
        task=task,
        train=train,
        held_out=val,
        checkpoint=checkpoint,
    )


@pytest.mark.parametrize(("name", "head"), KINDS, ids=IDS)
def test_it_learns(name, head, checkpoints, learnable, tmp_path):
    checkpoint = Checkpoint.of(str(checkpoints[name]), head, DataSettings())
    made = trainer(tmp_path, checkpoint, TASKS["boolq"], learnable, max_steps=50, batch=16, learning_rate=5e-3)
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_accuracy"] >= 0.9 and after["eval_loss"] < before["eval_loss"]
    entry = next(entry for entry in made.state.log_history if "loss" in entry)
    assert entry["tokens_per_second"] > 0 and entry["model_flops_utilisation"] > 0


@pytest.mark.parametrize(("name", "head"), KINDS[2:], ids=IDS[2:])
def test_choices_are_scored_one_by_one(name, head, checkpoints, tmp_path):
    """A choice's score does not depend on the other; the loss is that of the softmax over both."""
    checkpoint, task = Checkpoint.of(str(checkpoints[name]), head, DataSettings()), TASKS["copa"]
    made = trainer(tmp_path, checkpoint, task, parts.FIXTURES)
    examples = made.eval_dataset
    scores = made.predict_scores(examples)
    for choice in (0, 1):
        others = [replace(each, ids=_with(each.ids, 1 - choice, each.ids[choice] * 2)) for each in examples]
        np.testing.assert_allclose(made.predict_scores(others)[:, choice], scores[:, choice], atol=2e-4)
    labels = torch.tensor([example.label for example in examples])
    loss = made.compute_loss(made.model.eval(), made._collate(examples), num_items_in_batch=len(examples))
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(scores), labels)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(("name", "head"), [KINDS[0], KINDS[3], KINDS[4]], ids=[IDS[0], IDS[3], IDS[4]])
def test_a_resumed_trial_has_the_bits_of_an_uninterrupted_one(name, head, checkpoints, tmp_path):
    checkpoint = Checkpoint.of(str(checkpoints[name]), head, DataSettings())

    def build(folder):
        return trainer(
            tmp_path / folder, checkpoint, TASKS["rte"], parts.FIXTURES, dropout=0.2, gradient_accumulation_steps=2
        )

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(_StopAfter(3))
    first.train()
    assert find(tmp_path / "parts").last.name == "checkpoint-2"
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    losses = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (whole, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_there_and_follows_the_seed(checkpoints, tmp_path):
    for name in ("separate", "decoder"):
        checkpoint = Checkpoint.of(str(checkpoints[name]), HeadSettings(), DataSettings())
        weights = {}
        for dropout, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1)):
            folder = tmp_path / f"{name}{len(weights)}{dropout}{seed}"
            made = trainer(folder, checkpoint, TASKS["rte"], parts.FIXTURES, dropout, seed=seed, max_steps=2)
            made.train()
            weights.setdefault((dropout, seed), []).append(torch.cat([p.flatten() for p in made.model.parameters()]))
        assert torch.equal(*weights[0.5, 0])
        assert not torch.equal(weights[0.5, 0][0], weights[0.0, 0][0])
        assert not torch.equal(weights[0.5, 0][0], weights[0.5, 1][0])
    stacks = checkpoint_of(checkpoints["separate"]).load(TASKS["rte"], 0.3, 0)
    rates = {module.p for module in stacks.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}


def _with(ids, place, other):
    return tuple(other if n == place else each for n, each in enumerate(ids))


def checkpoint_of(path, **head) -> Checkpoint:
    return Checkpoint.of(str(path), HeadSettings(**head), DataSettings())


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(checkpoints, tmp_path):
    checkpoint = checkpoint_of(checkpoints["layerwise"])
    one, two = (
        trainer(
            tmp_path / str(n),
            checkpoint,
            TASKS["wic"],
            parts.FIXTURES,
            batch=4 // n,
            gradient_accumulation_steps=n,
            max_steps=1,
            optim="sgd",
        )
        for n in (1, 2)
    )
    for each in (one, two):
        each.train()
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_predictions_do_not_depend_on_the_batch_and_keep_the_order(checkpoints, tmp_path):
    for name, head in KINDS:
        made = trainer(
            tmp_path, Checkpoint.of(str(checkpoints[name]), head, DataSettings()), TASKS["boolq"], parts.FIXTURES
        )
        scores = []
        for size in (1, 3, 8):
            made.args.per_device_eval_batch_size = size
            scores.append(made.predict_scores(made.eval_dataset))
        for other in scores[1:]:
            np.testing.assert_allclose(scores[0], other, atol=2e-4)
        assert len(np.unique(scores[0].round(3), axis=0)) > 1


def test_what_each_model_reads(checkpoints):
    """A layerwise encoder begins with <bos>, a separate one does not, a decoder-only model as its tokenizer says."""
    cases = read_cases(str(parts.FIXTURES), TASKS["boolq"], "train")
    rows = {name: encode(cases, checkpoint_of(path).form)[0][0].ids[0] for name, path in checkpoints.items()}
    assert rows["layerwise"] == rows["decoder"] == [2, *rows["separate"]]
    assert 2 not in rows["separate"]


def test_a_long_example_loses_the_end_of_its_passage_and_is_counted(checkpoints):
    words = parts.tokenizer()
    cases = read_cases(str(parts.FIXTURES), TASKS["boolq"], "train")
    for bos, specials in ((None, False), (2, False), (None, True)):
        whole, none = encode(cases, InputForm(words, bos, specials, 500, 0))
        assert none == 0
        limit = sorted(each.length for each in whole)[5]
        examples, cut = encode(cases, InputForm(words, bos, specials, limit, 0))
        assert cut == sum(each.length > limit for each in whole) > 0
        for case, example, full in zip(cases, examples, whole, strict=True):
            (ids,), (before,) = example.ids, full.ids
            assert len(ids) == min(limit, len(before))
            tail = len(words(case.texts[0].after, add_special_tokens=False)["input_ids"])
            assert ids[-tail:] == before[-tail:] and ids[: limit - tail] == before[: limit - tail]
    with pytest.raises(UserError, match=r"train.jsonl:1 has \d+ tokens without its longest part.*reads 8"):
        encode(cases, InputForm(words, None, False, 8, 0))


def test_a_spelt_padding_token_is_text(checkpoints):
    form = checkpoint_of(checkpoints["decoder"]).form
    assert form.pad not in form.ids(["the <pad> frog"])[0]
    assert form.ids(["frog"])[0][0] == 2


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["separate"], tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    weights.pop("model.encoder.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no model.encoder.layers.1.mlp.up_proj.weight: it is not whole"):
        checkpoint_of(tmp_path / "part").load(TASKS["rte"], 0.0, 0)


def test_what_does_not_fit_is_refused(checkpoints, tmp_path):
    with pytest.raises(UserError, match="reads its last token"):
        checkpoint_of(checkpoints["decoder"], pooling="mean")
    with pytest.raises(UserError, match=r"There is no folder .*none"):
        checkpoint_of(tmp_path / "none")
    with pytest.raises(UserError, match="was made for 1 to 256"):
        Checkpoint.of(str(checkpoints["separate"]), HeadSettings(), DataSettings(max_length=257))


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            control.should_save = False
