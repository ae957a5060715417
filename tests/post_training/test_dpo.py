"""Preferences: records, the losses against a dense oracle, and a trainer that learns and goes on to the bit."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.lora import lora_config
from modeling_t5gemma.losses import IGNORED
from modeling_t5gemma.post_training.dpo import preference_facts, preference_losses
from modeling_t5gemma.post_training.preferences import (
    collate_answers,
    held_out,
    load_pairs,
    load_prompts,
)
from modeling_t5gemma.post_training.reference import Reference, log_probabilities, without_adapter
from modeling_t5gemma.post_training.rendering import Renderer
from modeling_t5gemma.post_training.settings import DpoSettings
from modeling_t5gemma.training.checkpoints import find
from tests import tiny
from tests.post_training import first_word
from tests.post_training.first_word import LAYOUT, log_of, pairs
from tests.post_training.first_word import dpo as make
from tests.selections import slow

MODELS = {"separate": (tiny.t5gemma, Layout(0, 2)), "layerwise": (first_word.model, LAYOUT)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} w12 "
    "{% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)


def with_lora(model, **kwargs):
    from peft import get_peft_model

    return get_peft_model(model, lora_config(r=4, lora_alpha=8, **kwargs))


# Log-probabilities


@pytest.mark.parametrize("kind", MODELS)
def test_a_source_encoded_once_for_its_answers_has_the_gradients_of_one_encoded_for_each(kind):
    build, layout = MODELS[kind]
    model = build().train()
    some = pairs(3)
    once = collate_answers([p.source for p in some], [(p.chosen, p.rejected) for p in some], layout)
    each = collate_answers(
        [p.source for p in some for _ in range(2)], [(a,) for p in some for a in (p.chosen, p.rejected)], layout
    )
    assert once["input_ids"].shape[0] == 3 and each["input_ids"].shape[0] == 6
    found = []
    for batch in (once, each):
        model.zero_grad()
        logps = log_probabilities(model, batch)
        # Weights of both signs, as a margin has.
        (logps.sum(dim=1) * torch.tensor([1.0, -1.0] * 3)).sum().backward()
        found.append((logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*(logps for logps, _ in found), atol=1e-5, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert (gradient - other).abs().max() < 1e-5 * other.abs().max(), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_logits(kind, temperature):
    build, layout = MODELS[kind]
    model = build()
    some = pairs(3)
    batch = collate_answers([p.source for p in some], [(p.chosen, p.rejected) for p in some], layout)
    with torch.no_grad():
        found = log_probabilities(model, batch, temperature)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        dense = (model(**inputs, use_cache=False).logits.double() / temperature).log_softmax(dim=-1)
    labels = batch["labels"]
    expected = dense.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == IGNORED, 0)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_and_its_smoothing_are_the_papers(smoothing):
    logps, reference, lengths = _random_pairs()
    found = preference_losses(logps, reference, lengths, DpoSettings(beta=0.3, label_smoothing=smoothing))
    for n in range(len(logps)):
        (c, r), (rc, rr) = logps[n].tolist(), reference[n].tolist()
        right = 1 / (1 + np.exp(-0.3 * ((c - rc) - (r - rr))))
        expected = -(1 - smoothing) * np.log(right) - smoothing * np.log(1 - right)
        assert found[n].item() == pytest.approx(expected, rel=1e-10)


def test_ipo_asks_for_a_margin_a_token():
    logps, reference, lengths = _random_pairs()
    found = preference_losses(logps, reference, lengths, DpoSettings(loss_type="ipo", beta=0.3))
    for n in range(len(logps)):
        (c, r), (rc, rr), (lc, lr) = logps[n].tolist(), reference[n].tolist(), lengths[n].tolist()
        assert found[n].item() == pytest.approx(((c - rc) / lc - (r - rr) / lr - 1 / 0.6) ** 2, rel=1e-10)
    # At the margin that is asked for there is nothing to gain.
    at = torch.tensor([[3 / 0.6, 0.0]], dtype=torch.float64)
    assert preference_losses(at, at * 0, torch.tensor([[3, 5]]), DpoSettings(loss_type="ipo", beta=0.3)).item() < 1e-20


def test_facts():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -1.0]])
    facts = preference_facts(logps, torch.tensor([[-2.0, -2.0], [-1.0, -1.0], [-1.0, -1.0]]), beta=0.5)
    assert facts["rewards/chosen"].tolist() == [0.5, -1, 0] and facts["rewards/rejected"].tolist() == [0, 0, 0]
    assert facts["rewards/accuracies"].tolist() == [1, 0, 0] and facts["rewards/margins"].tolist() == [0.5, -1, 0]
    assert facts["logps/chosen"].tolist() == [-1, -3, -1]


def _random_pairs():
    generator = torch.Generator().manual_seed(0)
    logps, reference = (torch.randn(6, 2, dtype=torch.float64, generator=generator) * 4 for _ in range(2))
    return logps, reference, torch.randint(1, 9, (6, 2), generator=generator)


def test_settings_without_meaning_are_refused():
    for settings, words in (
        (DpoSettings(beta=0), "beta is 0"),
        (DpoSettings(loss_type="hinge"), "take one of sigmoid, ipo"),
        (DpoSettings(label_smoothing=0.5), "below 0.5"),
        (DpoSettings(loss_type="ipo", label_smoothing=0.1), "no meaning with loss_type ipo"),
        (DpoSettings(reference_model="x"), "reference_model is x, and reference left out"),
    ):
        with pytest.raises(UserError, match=words):
            settings.check()


# Records


def records(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def renderer(template: str | None = None, **limits) -> Renderer:
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, **{"max_source": 16, "max_target": 8, **limits})


def test_strings_messages_and_implicit_prompts():
    made, loaded = load_pairs(records(prompt=["w5 w6"], chosen=["w7"], rejected=["w8 w9"]), renderer(), "data", 0)
    assert [made[0].source.tolist(), made[0].chosen.tolist(), made[0].rejected.tolist()] == [[5, 6], [7, 1], [8, 9, 1]]
    assert made[0].where == "data:1" and not str(loaded)
    question, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "w5"), ("assistant", "w7"), ("assistant", "w8"))
    )
    explicit = records(prompt=[[question]], chosen=[[good]], rejected=[[bad]])
    implicit = records(chosen=[[question, good]], rejected=[[question, bad]])
    first, second = (load_pairs(each, renderer(TEMPLATE), "data", 0)[0][0] for each in (explicit, implicit))
    for name in ("source", "chosen", "rejected"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert first.source.tolist() == [10, 5, 12, 11] and first.chosen.tolist() == [7, 12]


def test_prompts_are_read_as_trl_reads_them():
    """Whole conversations say their prompt themselves, whatever stands beside them; a string is what its side says."""
    question, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "w5"), ("assistant", "w7"), ("assistant", "w8"))
    )
    whole = {"chosen": [question, good], "rejected": [question, bad]}
    forms = [
        whole,
        {"prompt": "w9", **whole},
        {"prompt": [question], **whole},
        {"prompt": "w5", "chosen": [good], "rejected": [bad]},
        {"prompt": [question], "chosen": "w7", "rejected": "w8"},
    ]
    for form in forms:
        (pair,), _ = load_pairs(datasets.Dataset.from_list([form]), renderer(TEMPLATE), "data", 0)
        found = [each.tolist() for each in (pair.source, pair.chosen, pair.rejected)]
        assert found == [[10, 5, 12, 11], [7, 12], [8, 12]], form


def test_an_answer_that_begins_as_the_other_stays_an_answer():
    """Of a conversation that is the beginning of the other, the last message still is the answer."""
    user, assistant = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
    longer = [user, assistant, {"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    with pytest.raises(UserError, match="one message of the assistant"):
        load_pairs(records(chosen=[[user, assistant]], rejected=[longer]), renderer(TEMPLATE), "data", 0)


def test_unusable_records_are_counted_by_reason_and_too_many_stop():
    bad = records(prompt=["w5", "w5", "w5", ""], chosen=["w6", "w6", "w6", "w6"], rejected=["w7", " ", "w6", "w7"])
    made, loaded = load_pairs(bad, renderer(), "data", 3)
    assert len(made) == 1 and loaded.skipped == {
        "empty answer": 1,
        "both answers are the same": 1,
        "empty question": 1,
    }
    assert "data:2 (empty answer)" in str(loaded)
    with pytest.raises(UserError, match=r"More than 2 records of data .* data:2 \(empty answer\)"):
        load_pairs(bad, renderer(), "data", 2)
    with pytest.raises(UserError, match="nothing to train on"):
        load_pairs(bad.select([1]), renderer(), "data", 1)
    with pytest.raises(UserError, match=r"no column 'rejected'. It has 'prompt', 'chosen', 'worse'"):
        load_pairs(bad.rename_column("rejected", "worse"), renderer(), "data", 0)
    with pytest.raises(UserError, match="no prompt beside answers"):
        load_pairs(bad.remove_columns("prompt"), renderer(), "data", 0)
    _, cut = load_pairs(records(prompt=["w5 " * 9], chosen=["w6"], rejected=["w7"]), renderer(max_source=4), "data", 0)
    assert (cut.cut, cut.cut_tokens) == (1, 5) and "cut 1, 5 tokens in all" in str(cut)


def test_prompts_keep_the_other_columns():
    made, _ = load_prompts(records(prompt=["w5", "w6"], answer=["4", "5"]), renderer(), "sums", 0)
    assert [(p.source.tolist(), p.columns, p.where) for p in made] == [
        ([5], {"answer": "4"}, "sums:1"),
        ([6], {"answer": "5"}, "sums:2"),
    ]
    with pytest.raises(UserError, match=r"no column 'prompt'. It has 'question'"):
        load_prompts(records(question=["w5"]), renderer(), "sums", 0)


def test_tools_are_rendered_where_the_template_has_a_place():
    """Of pairs and of prompts, as in fine-tuning; where it has none, the record is skipped and counted."""
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "w5"), ("assistant", "w6"), ("assistant", "w7"))
    )
    tools = [{"type": "function", "function": {"name": "w30"}}]
    rows = records(prompt=[[user]] * 2, chosen=[[good]] * 2, rejected=[[bad]] * 2, tools=[tools, None])
    with_place = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    for load in (load_pairs, load_prompts):
        (first, second), _ = load(rows, renderer(with_place), "data", 0)
        assert first.source.tolist() == [30, *second.source.tolist()] == [30, 10, 5, 12, 11]
        (only,), told = load(rows, renderer(TEMPLATE), "data", 1)
        assert only.where == "data:2" and "no place" in str(told)


def test_held_out_examples_are_spread_and_not_trained_on():
    train, test = held_out(list(range(10)), 3)
    assert test == [0, 3, 6] and sorted(train + test) == list(range(10))
    assert held_out([1, 2], 0) == ([1, 2], [])
    with pytest.raises(UserError, match="at least one has to remain"):
        held_out([1, 2], 2)


# Training


@pytest.mark.curves
@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_it_learns_a_preference_that_depends_on_the_question(tmp_path, seed):
    trainer = first_word.dpo_that_learns(tmp_path, seed)
    likelier_at_the_start = first_word.likelier(trainer)
    trainer.train()
    assert 0.2 < likelier_at_the_start < 0.8 and first_word.likelier(trainer) > 0.85
    first, last = log_of(trainer, "eval_rewards/accuracies")
    assert first < 0.2 and last > 0.9  # rewards begin at 0, and equal ones are not counted as right
    assert log_of(trainer, "loss")[-1] < 0.6 * log_of(trainer, "loss")[0]
    assert log_of(trainer, "eval_loss")[0] == pytest.approx(np.log(2), abs=1e-4)
    assert {"rewards/margins", "logps/chosen", "tokens_per_second"} <= set(trainer.state.log_history[1])
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_all_references_give_the_same_losses(tmp_path):
    """Precomputed, loaded, and the model without its adapter are one model."""

    def run(name, model, kind, loaded=None):
        trainer = make(
            tmp_path / name, model, settings=DpoSettings(reference=kind), reference_model=loaded, train=pairs(24)
        )
        trainer.train()
        return log_of(trainer, "loss"), log_of(trainer, "rewards/margins")

    build = MODELS["layerwise"][0]
    found = []
    for name, kind, loaded in (("a", "precomputed", False), ("b", "loaded", True), ("c", None, False)):
        torch.manual_seed(1)
        base = build()
        torch.manual_seed(2)
        tuned = with_lora(base)
        torch.manual_seed(1)
        found.append(run(name, tuned, kind, build() if loaded else None))
    for losses, margins in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5) and margins == pytest.approx(found[0][1], abs=1e-5)
    assert abs(found[0][1][-1]) > 1e-4


@pytest.mark.parametrize("kind", ["precomputed", "adapter_off"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, kind):
    def build(folder):
        torch.manual_seed(0)
        model = MODELS["layerwise"][0]()
        return make(
            tmp_path / folder,
            with_lora(model, lora_dropout=0.1) if kind == "adapter_off" else model,
            steps=4,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            settings=DpoSettings(reference=kind),
        )

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(StopAfter(3))
    first.train()
    assert find(tmp_path / "parts").last.name == "checkpoint-2"
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    assert log_of(second, "loss") == log_of(whole, "loss") and len(log_of(whole, "loss")) == 4
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_precomputed_log_probabilities_are_kept_and_belong_to_their_pairs(tmp_path):
    trainer = make(tmp_path, steps=2, test=pairs(3, seed=1))
    trainer.train()
    (file,) = tmp_path.glob("reference-*.npy")
    table = np.load(file)
    assert table.shape == (23, 2) and table.dtype == np.float32
    one = [*trainer.pairs, *trainer.eval_dataset][21]
    batch = collate_answers([one.source], [(one.chosen, one.rejected)], LAYOUT)
    with torch.no_grad():
        alone = log_probabilities(model_at_start(), batch).sum(dim=1)
    np.testing.assert_allclose(table[21], alone.numpy(), atol=1e-4)
    # What is there is used again: even where it is wrong.
    np.save(file, np.zeros_like(table))
    again = make(tmp_path, steps=2, test=pairs(3, seed=1))
    assert again.evaluate()["eval_rewards/chosen"] < -0.1
    with pytest.raises(UserError, match=r"reference-\w+.npy has .* of other pairs .* changed since"):
        make(tmp_path, steps=2, test=pairs(3, seed=2)).train()
    other = make(tmp_path, steps=2, test=pairs(3, seed=1))
    with torch.no_grad():  # trained anew where it was
        other.model.model.decoder.norm.weight.add_(0.1)
    with pytest.raises(UserError, match="another model: they have changed since"):
        other.train()


def model_at_start():
    torch.manual_seed(0)
    return MODELS["layerwise"][0]()


def test_accumulated_micro_batches_weigh_by_their_pairs(tmp_path):
    one, two = (make(tmp_path / str(n), steps=1, batch=4 // n, gradient_accumulation_steps=n) for n in (1, 2))
    for trainer in (one, two):
        trainer.train()
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert log_of(one, name)[0] == pytest.approx(log_of(two, name)[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_are_computed_twice_to_save_memory_have_the_same_losses(tmp_path, lora):
    found = []
    for saving in (False, True):
        torch.manual_seed(1)
        model = MODELS["layerwise"][0]()
        trainer = make(
            tmp_path / str(saving), with_lora(model) if lora else model, steps=3, gradient_checkpointing=saving
        )
        trainer.train()
        found.append(log_of(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][2] != found[0][0]


def test_switching_the_adapter_off_leaves_frozen_adapters_frozen():
    model = with_lora(MODELS["layerwise"][0]())
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with without_adapter(model):
        pass
    assert [p.requires_grad for p in model.parameters()] == before and any(before)


def test_a_reference_is_needed_and_named():
    with pytest.raises(UserError, match="no adapter to switch off"):
        Reference(MODELS["layerwise"][0](), None)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="reference loaded"):
        make(tmp_path, reference_model=MODELS["layerwise"][0]())
    with pytest.raises(UserError, match="needs held-out pairs"):
        make(tmp_path, eval_strategy="steps", eval_steps=1)


class StopAfter(TrainerCallback):
    """Ends a run after a step, without a checkpoint there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
