"""The trainer on tiny models: what it computes, and that it survives."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainingArguments

from modeling_t5gemma.collators import Layout
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.objectives import Denoiser, PrefixLM, Schedule, SpanCorruption
from modeling_t5gemma.training.checkpoints import COMPLETE_FILE, complete, complete_checkpoints, find, keep_last
from modeling_t5gemma.training.documents import MemoryDocuments, Pieces
from modeling_t5gemma.training.held_out import Remaining
from modeling_t5gemma.training.mixture import Samples, Source
from modeling_t5gemma.training.resumable import Diverged
from modeling_t5gemma.training.rows import Rows
from modeling_t5gemma.training.teacher import Distillation, Teacher
from modeling_t5gemma.training.trainer import AdaptationTrainer, Recipe
from tests import tiny

PREFIX = Schedule(((1.0, PrefixLM()),))


def text(count: int = 40) -> MemoryDocuments:
    rng = np.random.default_rng(0)
    return MemoryDocuments(
        "text", [rng.integers(4, tiny.VOCAB, rng.integers(6, 30)).astype(np.int32) for _ in range(count)]
    )


def make(
    output: Path,
    model=None,
    *,
    steps: int = 6,
    pack: tuple[int, int] | None = None,
    schedule: Schedule = PREFIX,
    teacher=None,
    recipe: Recipe | None = None,
    held_out: int = 4,
    batch: int = 2,
    accumulation: int = 1,
    windows=None,
    cached: float | None = None,
    share: float = 0.5,
    **training,
) -> AdaptationTrainer:
    torch.manual_seed(0)
    if model is None:
        model = tiny.t5gemma()
    if teacher is None:
        teacher = tiny.gemma3()
    layerwise = model.config.decoder.cross_attention_type == "layerwise"
    layout = Layout(0, 2, 2 if layerwise else None, 2)
    windows = Remaining(windows or Pieces(text(), 16, 6), held_out)
    samples = Samples(
        [Source("text", windows, 1.0)], schedule, seed=3, block=16, total=max(1, steps * batch * accumulation)
    )
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **training,
    )
    return AdaptationTrainer(
        model,
        arguments,
        rows=lambda position: Rows(
            samples,
            pack,
            batch,
            arguments.world_size,
            arguments.process_index,
            position,
            before_source=layout.extra_source_tokens(),
        ),
        layout=layout,
        capacity=pack,
        recipe=recipe,
        teacher=None if teacher is False else Teacher(teacher, layout, Distillation(share=share)),
        cached=cached,
        held_out=windows.pairs(PrefixLM(), 0),
    )


def losses(trainer: AdaptationTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.curves
def test_it_learns_and_reports(tmp_path):
    trainer = make(tmp_path, steps=30, batch=8, eval_strategy="steps", eval_steps=10, eval_on_start=True)
    trainer.train()
    history = trainer.state.log_history
    assert np.mean(losses(trainer)[-5:]) < np.mean(losses(trainer)[:5])
    step = next(entry for entry in history if "loss" in entry)
    assert {"cross_entropy", "distillation", "grad_norm", "tokens_per_second", "model_flops_utilisation"} <= set(step)
    assert step["loss"] == pytest.approx(0.5 * step["cross_entropy"] + 0.5 * step["distillation"], rel=1e-4)
    measured = [entry for entry in history if "eval_loss" in entry]
    assert len(measured) == 4
    for entry in measured:
        assert entry["eval_encoder_use"] == pytest.approx(entry["eval_loss_wrong"] - entry["eval_loss"], abs=1e-5)
        assert {"eval_teacher", "eval_teacher_without"} <= set(entry)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["step"] == 30 and summary["teacher"]["without"]["mean"] > 0
    assert (summary["rows_per_step"], summary["processes"]) == (8, 1)
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("pack", "layerwise"),
    [
        (None, True),
        ((40, 40), False),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param((40, 40), True, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, pack, layerwise):
    def build(folder, **kwargs):
        torch.manual_seed(0)
        model = tiny.layerwise(tiny.gemma3(), bidirectional_layers="all") if layerwise else None
        return make(tmp_path / folder, model, pack=pack, accumulation=2, **kwargs)

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(_StopAfter(3))
    first.train()
    assert find(tmp_path / "parts").last.name == "checkpoint-2"
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_in_the_warm_up_and_across_a_stage(tmp_path):
    corruption = SpanCorruption(Denoiser(3, 0.3), tuple(range(3, 3 + 1)) + tuple(range(80, 90)), 1)
    schedule = Schedule(((0.5, corruption), (0.5, PrefixLM())))
    recipe = Recipe(alone=3, joining=2)

    def build(folder):
        return make(tmp_path / folder, steps=8, batch=4, teacher=False, recipe=recipe, schedule=schedule)

    whole = build("whole")
    whole.train()
    for stop in (1, 3, 5):
        part = build("parts")
        part.add_callback(_StopAfter(stop, save=True))
        part.train(resume_from_checkpoint=True)
    last = build("parts")
    last.train(resume_from_checkpoint=True)
    assert losses(last) == losses(whole)


def test_cross_attention_alone_moves_alone_and_the_rest_joins_without_a_spike(tmp_path):
    trainer = make(tmp_path, steps=6, recipe=Recipe(alone=3, joining=3), weight_decay=0.1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    seen = {}
    trainer.add_callback(_AtStep(3, lambda: seen.update({n: p.clone() for n, p in trainer.model.named_parameters()})))
    trainer.train()
    for name, weight in seen.items():
        assert torch.equal(weight, before[name]) == ("cross_attn" not in name), name
    assert any(not torch.equal(p, seen[n]) for n, p in trainer.model.named_parameters() if "cross_attn" not in n)
    flags = [entry["cross_attention_alone"] for entry in trainer.state.log_history if "loss" in entry]
    assert flags == [1, 1, 1, 0, 0, 0]
    rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["encoder"] <= rates["cross_attention"]


def test_accumulated_micro_batches_weigh_by_their_tokens(tmp_path):
    """Two micro-batches of ragged examples give the gradient of one batch (hazard 24)."""
    one, two = (make(tmp_path / str(n), steps=1, batch=4 // n, accumulation=n) for n in (1, 2))
    for trainer in (one, two):
        trainer.train()
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    assert losses(one)[0] == pytest.approx(losses(two)[0], rel=1e-5)


LAYERS = ["sliding_attention", "full_attention"]


def losses_of_three_steps(output: Path, layers: list[str], **options) -> list[float]:
    torch.manual_seed(0)
    source = tiny.gemma3(num_hidden_layers=len(layers), layer_types=layers)
    trainer = make(output, tiny.layerwise(source, bidirectional_layers="all"), steps=3, **options)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"optim": "adamw_torch_fused"}, 1e-4),
        ({"bf16": True}, 3e-2),
        pytest.param({"optim": "adamw_bnb_8bit"}, 3e-2, marks=pytest.mark.needs("bitsandbytes")),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_the_trainer_has_for_large_models_computes_the_same(tmp_path, options, tolerance):
    plain = losses_of_three_steps(tmp_path / "plain", LAYERS)
    other = losses_of_three_steps(tmp_path / "other", LAYERS, **options)
    assert other == pytest.approx(plain, rel=tolerance) and len(set(other)) == 3


@pytest.mark.parametrize(
    ("backend", "layers"),
    [
        ("eager", LAYERS[:1]),  # compiling takes seconds a layer and a shape
        pytest.param("aot_eager", LAYERS, marks=pytest.mark.slow),
    ],
)
def test_compiled_the_trainer_computes_the_same(tmp_path, backend, layers):
    documents = text()
    whole = MemoryDocuments("whole windows", [documents[n][:16] for n in range(20) if len(documents[n]) >= 16])

    def run(name: str, **options) -> list[float]:
        return losses_of_three_steps(tmp_path / name, layers, windows=Pieces(whole, 16, 6), **options)

    compiled = run("compiled", torch_compile=True, torch_compile_backend=backend)
    assert compiled == pytest.approx(run("plain"), rel=1e-4) and len(set(compiled)) == 3


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=6, save_total_limit=1)
    trainer.add_callback(_AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.signals.received == signal.SIGTERM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert find(tmp_path).last.name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is not trainer.signals._receive


@pytest.mark.parametrize("count, kept", [(None, range(1, 8)), (5, range(3, 8)), (2, range(6, 8)), (1, [7])])
def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path, count, kept):
    for step in range(1, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        complete(tmp_path / f"checkpoint-{step}", {})
        keep_last(tmp_path, count)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_half_a_checkpoint_is_not_resumed_from(tmp_path):
    trainer = make(tmp_path, steps=4)
    trainer.train()
    (tmp_path / "checkpoint-4" / COMPLETE_FILE).unlink()
    found = find(tmp_path)
    assert found.last.name == "checkpoint-2" and [path.name for path in found.cut_short] == ["checkpoint-4"]
    with pytest.raises(UserError, match="cut short"):
        make(tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again = make(tmp_path, steps=4)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(trainer)


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    trainer = make(tmp_path, steps=4)
    save = trainer.save_model

    def full(output, **kwargs):
        save(output, **kwargs)
        if output.endswith("-4"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(UserError, match=r"No room .* step 4.*checkpoint-2"):
        trainer.train()
    assert find(tmp_path).last.name == "checkpoint-2"
    again = make(tmp_path, steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_loss_that_is_not_finite_names_step_examples_and_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=6)

    def poison():
        with torch.no_grad():
            trainer.model.model.decoder.norm.weight.fill_(float("nan"))

    trainer.add_callback(_AtStep(3, poison))
    with pytest.raises(Diverged, match=r"step 4 .* text:\d+@\d+.*checkpoint-2"):
        trainer.train()
    assert find(tmp_path).last.name == "checkpoint-2"


def test_the_teacher_is_aligned(tmp_path):
    """A teacher that knows the text by heart gives each label probability 1, so that both losses are one."""

    class Oracle(torch.nn.Module):
        """Hidden states that say which token comes next."""

        def forward(self, input_ids, use_cache, **kwargs):
            following = torch.roll(input_ids, -1, dims=1)
            states = 50 * torch.nn.functional.one_hot(following, tiny.VOCAB).float()
            return type("Output", (), {"last_hidden_state": states})

    trainer = make(tmp_path)
    for pack in (None, (40, 40)):
        batches = make(tmp_path, pack=pack).get_train_dataloader()
        batch = next(iter(batches))
        taught = batch["teacher"]
        states = Oracle()(taught["input_ids"], False).last_hidden_state.flatten(0, 1)[taught["places"]]
        labels = batch["labels"][batch["labels"] != -100]
        known = states.argmax(-1) == labels
        # The last token of each target is in no input: all others are found at their own position.
        ends = torch.tensor([position == 0 for position in _followed(batch)])
        assert known[~ends].all()
    assert trainer.teacher is not None


def _followed(batch) -> list[int]:
    """For each label 1 if the next label belongs to the same example, else 0."""
    segments = batch.get("decoder_segment_ids", batch.get("decoder_attention_mask"))
    flags = []
    for labels, segment in zip(batch["labels"], segments, strict=True):
        real = [int(s) for s, label in zip(segment, labels, strict=True) if label != -100]
        flags += [int(i + 1 < len(real) and real[i + 1] == real[i]) for i in range(len(real))]
    return flags


@pytest.mark.parametrize("layerwise", [False, True])
def test_packed_and_padded_rows_have_the_same_losses_and_gradients(tmp_path, layerwise):
    from modeling_t5gemma.collators import collate, collate_for_teacher

    source = tiny.gemma3()
    model = (tiny.layerwise(source, bidirectional_layers="all") if layerwise else tiny.t5gemma()).train()
    layout = Layout(0, 2, 2 if layerwise else None, 2)
    samples = Samples([Source("text", Pieces(text(), 16, 6), 1.0)], PREFIX, 0, block=6).block(0)
    teacher = Teacher(source, layout)
    results = []
    for rows, capacity in (([[s] for s in samples], None), ([samples[:3], samples[3:]], (40, 40))):
        model.zero_grad()
        taught = collate_for_teacher(rows, layout, packed=capacity is not None)
        target = teacher.target(taught)
        loss = model(**collate(rows, layout, capacity), target=target, use_cache=False).loss
        loss.backward()
        results.append(
            (target.hidden, loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="max_steps"):
        make(tmp_path, steps=-1)
    with pytest.raises(UserError, match="no weights of its own"):
        make(tmp_path, tiny.layerwise(tiny.gemma3()), recipe=Recipe(alone=2))
    with pytest.raises(UserError, match="one tokenizer"):
        make(tmp_path, teacher=tiny.gemma3(vocab_size=tiny.VOCAB + 1))
    with pytest.raises(UserError, match="No part is called heads"):
        Recipe(learning_rates={"heads": 2.0})
    schedule = Schedule(((1.0, SpanCorruption(Denoiser(3, 0.3), tuple(range(80, 90)), 1)),))
    with pytest.raises(UserError, match="cannot teach it"):
        make(tmp_path, schedule=schedule).train()


class _AtStep:
    def __new__(cls, step, action):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    action()

        return Callback()


class _StopAfter:
    def __new__(cls, step, save=False):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    control.should_training_stop = True
                    control.should_save = save

        return Callback()
