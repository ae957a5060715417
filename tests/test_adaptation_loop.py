"""The plain adaptation loop: its inputs, its loss, its resumption, and what it measures."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

from modeling_t5gemma.training import checkpoint
from modeling_t5gemma.training.distillation import (
    METRICS_FILE,
    STATE_FILE,
    DistillationSettings,
    batch_of_step,
    distill,
    learning_rate,
)
from modeling_t5gemma.training.evaluation import Estimate, HeldOutLoss, evaluate_student, evaluate_teacher
from modeling_t5gemma.training.heads import Head, cross_entropies, distillation_backward
from modeling_t5gemma.training.precision import Precision, faster_precision
from modeling_t5gemma.training.prefix_lm import PrefixLM
from modeling_t5gemma.training.windows import Windows, cut_windows, hold_out
from tests.tiny import gemma3, layerwise, t5gemma, tokens

FLOAT32 = Precision(torch.float32)
SETTINGS = DistillationSettings(steps=6, batch_size=2, learning_rate=1e-3, warmup_steps=2, save_every=2)
LIKE_DECODER_ONLY = PrefixLM(bos_token_id=2, decoder_start="last_prefix_token", encoder_bos=True)


@pytest.fixture
def windows() -> Windows:
    return cut_windows(tokens(1, 20 * 12 + 5)[0].tolist(), 12, 8)


# Windows and inputs


def test_windows_lie_end_to_end(windows):
    ids = tokens(1, 20 * 12 + 5)[0]
    assert len(windows) == 12
    assert torch.equal(torch.cat([windows.prefixes, windows.targets], dim=1).flatten(), ids[: 20 * 12])
    with pytest.raises(ValueError, match="fewer than one window"):
        cut_windows([1, 2, 3], 2, 2)


def test_held_out_windows_are_spread_and_no_others(windows):
    train, held_out = hold_out(windows, 3)
    assert (len(train), len(held_out)) == (9, 3)
    assert torch.equal(held_out.prefixes, windows.prefixes[[0, 4, 8]])
    rows = {tuple(row.tolist()) for row in train.prefixes} & {tuple(row.tolist()) for row in held_out.prefixes}
    assert not rows
    for count in (0, 12):
        with pytest.raises(ValueError, match="cannot be held out"):
            hold_out(windows, count)


def test_wrong_prefixes_are_other_windows(windows):
    wrong = windows.with_wrong_prefixes()
    assert torch.equal(wrong.targets, windows.targets)
    assert torch.equal(wrong.prefixes[1:], windows.prefixes[:-1])
    with pytest.raises(ValueError, match="at least two"):
        windows[:1].with_wrong_prefixes()


def test_inputs():
    windows = Windows(torch.tensor([[11, 12, 13]]), torch.tensor([[21, 22]]))
    as_lists = {
        (start, bos): [part.tolist() for part in PrefixLM(2, start, bos).student_inputs(windows)]
        for start in ("bos", "last_prefix_token")
        for bos in (False, True)
    }
    assert as_lists == {
        ("bos", False): [[[11, 12, 13]], [[2, 21]]],
        ("bos", True): [[[2, 11, 12, 13]], [[2, 21]]],
        ("last_prefix_token", False): [[[11, 12]], [[13, 21]]],
        ("last_prefix_token", True): [[[2, 11, 12]], [[13, 21]]],
    }
    assert PrefixLM(2).teacher_inputs(windows).tolist() == [[2, 11, 12, 13, 21]]
    assert PrefixLM(2).teacher_inputs_without_prefix(windows).tolist() == [[2, 21]]


# Losses


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_distillation_equals_the_dense_computation(softcap, chunk):
    hidden, student, teacher_hidden, teacher = (
        torch.randn(*shape) for shape in ((50, 16), (97, 16), (50, 24), (97, 24))
    )
    hidden.requires_grad_()
    heads = Head(student, softcap), Head(teacher, softcap)
    loss = distillation_backward(hidden, heads[0], teacher_hidden, heads[1], chunk)
    gradient, hidden.grad = hidden.grad, None

    def log_probabilities(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = states @ weight.T
        return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)

    dense = F.kl_div(
        log_probabilities(hidden, student),
        log_probabilities(teacher_hidden, teacher),
        reduction="sum",
        log_target=True,
    ) / len(hidden)
    dense.backward()
    torch.testing.assert_close(loss, dense.detach())
    torch.testing.assert_close(gradient, hidden.grad)


def test_a_model_is_at_no_distance_from_itself():
    hidden, head = torch.randn(10, 16, requires_grad=True), Head(torch.randn(97, 16), 30.0)
    assert distillation_backward(hidden, head, hidden.detach(), head, 4).item() == pytest.approx(0, abs=1e-6)
    assert hidden.grad.abs().max() < 1e-7


def test_cross_entropies_are_those_of_the_models_logits():
    model = t5gemma()
    ids, target, labels = tokens(2, 9), tokens(2, 5, seed=1), tokens(2, 5, seed=2)
    outputs = model(input_ids=ids, decoder_input_ids=target, labels=labels)
    hidden = model.model(input_ids=ids, decoder_input_ids=target).last_hidden_state
    losses = cross_entropies(hidden.flatten(0, 1), Head.of(model, torch.float32), labels.flatten(), chunk=3)
    torch.testing.assert_close(losses.mean(), outputs.loss.detach())


# Held-out losses


def test_a_causal_layerwise_student_is_its_teacher(windows):
    """Ties the layouts of both to each other: a token too many or too few on either side would show."""
    teacher = gemma3()
    student = layerwise(teacher)
    found = evaluate_student(student, windows, LIKE_DECODER_ONLY, FLOAT32)
    expected = evaluate_teacher(teacher, windows, LIKE_DECODER_ONLY, FLOAT32)
    assert found.right.mean == pytest.approx(expected.right.mean, abs=1e-5)
    assert found.wrong.mean == pytest.approx(expected.wrong.mean, abs=1e-5)
    means = (expected.right.mean, expected.wrong.mean, expected.without.mean)
    assert min(abs(a - b) for a, b in itertools.combinations(means, 2)) > 1e-3


def test_a_student_that_cannot_see_its_encoder_does_not_use_it(windows):
    student = t5gemma()
    for layer in student.model.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attn.o_proj.weight)
    found = evaluate_student(student, windows, PrefixLM(2), FLOAT32)
    assert found.use == Estimate(0.0, 0.0)


def test_estimates():
    loss = HeldOutLoss.of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0]))
    assert (loss.right.mean, loss.wrong.mean, loss.use.mean, loss.without) == (2, 3, 1, None)
    assert loss.use.standard_error == pytest.approx(1 / math.sqrt(3))
    assert HeldOutLoss.from_dict(json.loads(json.dumps(loss.as_dict()))) == loss


def test_evaluating_leaves_the_mode_alone(windows):
    student = t5gemma().train()
    evaluate_student(student, windows, PrefixLM(2), FLOAT32)
    assert student.training


# The loop


def test_learning_rate():
    settings = DistillationSettings(steps=46, learning_rate=1e-4, warmup_steps=4)
    rates = [learning_rate(step, settings) for step in range(46)]
    assert rates[:4] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4])
    assert rates[4] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))


def test_every_epoch_sees_every_window_once():
    settings = DistillationSettings(batch_size=4)
    places = torch.cat([batch_of_step(step, 10, settings) for step in range(5)])
    epochs = places[:10], places[10:]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_it_learns_all_that_the_decoder_sees_but_the_embeddings(windows, tmp_path):
    teacher = gemma3()
    student = layerwise(teacher, bidirectional_layers="all")
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    settings = DistillationSettings(steps=18, batch_size=4, learning_rate=3e-3, warmup_steps=2, save_every=18)
    distill(student, teacher, windows, LIKE_DECODER_ONLY, settings, FLOAT32, tmp_path)
    kept = {name for name, weight in student.named_parameters() if torch.equal(weight, before[name])}
    # Of the encoder's last layer a layerwise decoder sees the keys and values alone.
    seen = ("k_proj", "v_proj", "k_norm", "pre_self_attn_layernorm")
    last = {name for name in before if "encoder.layers.3." in name and not any(part in name for part in seen)}
    embeddings = {name for name in before if "embed_tokens" in name or "lm_head" in name}
    assert kept == embeddings | last | {"model.encoder.norm.weight"}
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(18))
    # Each three steps are an epoch.
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3])
    assert not student.training


def test_separate_cross_attention_learns_too(windows, tmp_path):
    teacher = gemma3()
    student = t5gemma()
    first = evaluate_student(student, windows, PrefixLM(2), FLOAT32).right.mean
    settings = DistillationSettings(steps=20, batch_size=4, learning_rate=3e-3, warmup_steps=2, save_every=20)
    distill(student, teacher, windows, PrefixLM(2), settings, FLOAT32, tmp_path)
    assert evaluate_student(student, windows, PrefixLM(2), FLOAT32).right.mean < first


@pytest.mark.parametrize("stopped_after", [0, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(stopped_after, windows, tmp_path):
    teacher = gemma3()

    def student():
        torch.manual_seed(0)
        return layerwise(teacher, bidirectional_layers="all")

    whole = student()
    distill(whole, teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path / "whole")

    def stop(metrics):
        if metrics["step"] == stopped_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student(), teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path / "resumed", stop)
    resumed = student()
    distill(resumed, teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path / "resumed")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name

    def metrics(run: str) -> list[dict]:
        lines = (tmp_path / run / METRICS_FILE).read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert metrics("whole") == metrics("resumed")


def test_a_finished_run_is_not_repeated(windows, tmp_path):
    teacher = gemma3()
    student = layerwise(teacher, bidirectional_layers="all")
    distill(student, teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path)
    steps = []
    again = layerwise(teacher, bidirectional_layers="all")
    distill(again, teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path, steps.append)
    assert not steps
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters()))


def test_the_state_of_another_run_is_refused(windows, tmp_path):
    teacher = gemma3()
    distill(layerwise(teacher), teacher, windows, LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(windows\)"):
        distill(layerwise(teacher), teacher, windows[:11], LIKE_DECODER_ONLY, SETTINGS, FLOAT32, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(decoder_start, encoder_bos\)"):
        distill(layerwise(teacher), teacher, windows, PrefixLM(2), SETTINGS, FLOAT32, tmp_path)


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_state(tmp_path / STATE_FILE, 1, model, optimizer, {"seed": 0})
    kept = model.weight.clone()

    def killed(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", killed)
    torch.nn.init.ones_(model.weight)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(tmp_path / STATE_FILE, 2, model, optimizer, {"seed": 0})
    assert checkpoint.load_state(tmp_path / STATE_FILE, model, optimizer, {"seed": 0}) == 1
    assert torch.equal(model.weight, kept)


def test_precision():
    assert faster_precision(torch.device("cpu")).dtype in (torch.bfloat16, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        with Precision(dtype).autocast(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
