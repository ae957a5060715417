"""Rewards: the mathematics against plain loops, sampling, and a trainer that learns and goes on to the bit."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.losses import IGNORED
from modeling_t5gemma.post_training.grpo import GrpoTrainer
from modeling_t5gemma.post_training.policy import advantages, policy_terms, token_weights
from modeling_t5gemma.post_training.preferences import Prompt
from modeling_t5gemma.post_training.rollouts import Sampling, sample
from modeling_t5gemma.training.checkpoints import find
from tests import tiny
from tests.post_training import first_word
from tests.post_training.first_word import ENDS, begins_right, log_of, prompts
from tests.post_training.first_word import grpo as make
from tests.post_training.test_dpo import MODELS, StopAfter, with_lora
from tests.selections import slow


def small_words(prompts, completions, completion_ids, **columns) -> list[float]:
    """The share of the answer's tokens that are below 26."""
    return [float(np.mean([4 <= i < 26 for i in ids])) for ids in completion_ids]


# Mathematics


def test_advantages_are_those_of_a_loop():
    rewards = np.random.default_rng(0).normal(size=(3, 4))
    rewards[1] = 0.5  # a group whose answers are all worth the same
    given = torch.from_numpy(rewards.flatten())
    centred = np.stack([row - row.mean() for row in rewards])
    by_group = np.stack([row / (own.std(ddof=1) + 1e-4) for row, own in zip(centred, rewards, strict=True)])
    for scale, expected in (
        ("none", centred),
        ("group", by_group),
        ("batch", centred / (rewards.std(ddof=1) + 1e-4)),
    ):
        np.testing.assert_allclose(advantages(given, 4, scale).numpy(), expected.flatten(), atol=1e-12)
    assert torch.equal(advantages(given, 4, "group")[4:8], torch.zeros(4, dtype=torch.float64))


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


@pytest.mark.parametrize("loss_type", LOSSES)
def test_token_weights_are_the_stated_means(loss_type):
    """Over two micro-batches of ragged answers; the last one of the first is not trained on."""
    lengths = [[3, 1, 5, 0], [2, 2, 4, 1]]
    values = [torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    masks = [torch.arange(5) < torch.tensor(own)[:, None] for own in lengths]
    tokens = sum(map(sum, lengths))
    found = sum(
        (v * token_weights(m, loss_type, completions=8, tokens=torch.tensor(tokens), max_completion_length=7)).sum()
        for v, m in zip(values, masks, strict=True)
    )
    sums = [
        [row[:n].sum().item() for row, n in zip(v, own, strict=True)] for v, own in zip(values, lengths, strict=True)
    ]
    means = [s / max(n, 1) for s, n in zip(itertools.chain(*sums), itertools.chain(*lengths), strict=True)]
    expected = {
        "grpo": sum(means) / 8,
        "bnpo": sum(sum(s) / sum(own) for s, own in zip(sums, lengths, strict=True)) / 2,
        "dr_grpo": sum(map(sum, sums)) / (8 * 7),
        "dapo": sum(map(sum, sums)) / tokens,
    }
    assert found.item() == pytest.approx(expected[loss_type], rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_with_nothing_to_train_on_weighs_nothing(loss_type):
    weights = token_weights(
        torch.zeros(2, 3, dtype=torch.bool), loss_type, completions=2, tokens=torch.tensor(0), max_completion_length=3
    )
    assert torch.equal(weights, torch.zeros(2, 3))


def test_the_policy_objective_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    logps, old, reference = (-torch.rand(4, 6, dtype=torch.float64, generator=generator) * 2 for _ in range(3))
    gains = torch.tensor([1.5, -0.5, 2.0, -1.0], dtype=torch.float64)
    terms = policy_terms(logps, old, reference, gains, epsilon=0.2, epsilon_high=0.3, beta=0.1)
    clipped = 0
    for n in range(4):
        for t in range(6):
            ratio = (logps[n, t] - old[n, t]).exp().item()
            inside = min(max(ratio, 0.8), 1.3)
            r = (reference[n, t] - logps[n, t]).exp().item()
            kl = r - np.log(r) - 1
            expected = -min(ratio * gains[n].item(), inside * gains[n].item()) + 0.1 * kl
            assert terms.loss[n, t].item() == pytest.approx(expected, rel=1e-10)
            assert terms.kl[n, t].item() == pytest.approx(kl, rel=1e-8) and kl >= 0
            assert bool(terms.low[n, t]) == (ratio < 0.8 and gains[n] < 0)
            assert bool(terms.high[n, t]) == (ratio > 1.3 and gains[n] > 0)
            clipped += bool(terms.low[n, t] + terms.high[n, t])
    assert clipped > 3


def test_at_the_sampled_policy_the_gradient_is_the_policy_gradient_and_beyond_the_clip_there_is_none():
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -0.1]], requires_grad=True)
    gains = torch.tensor([2.0, -3.0])
    policy_terms(logps, logps.detach(), None, gains, epsilon=0.2, epsilon_high=0.2, beta=0.0).loss.sum().backward()
    assert torch.equal(logps.grad, torch.tensor([[-2.0, -2.0], [3.0, 3.0]]))
    logps.grad = None
    old = logps.detach() - torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # far more likely now; far less
    policy_terms(logps, old, None, gains, epsilon=0.2, epsilon_high=0.2, beta=0.0).loss.sum().backward()
    assert torch.equal(logps.grad, torch.tensor([[0.0, -2.0], [0.0, 3.0]]))


# Sampling


def sampling(**changes) -> Sampling:
    return Sampling(
        **{"num_generations": 3, "max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "ends": ENDS, **changes}
    )


def count_encoder(model) -> list[tuple[int, ...]]:
    """The shapes that the encoder is called with from now on."""
    seen: list[tuple[int, ...]] = []
    model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_the_encoder_runs_once_a_prompt_for_all_its_answers(kind, tmp_path):
    build, layout = MODELS[kind]
    model = build()
    seen = count_encoder(model)
    sources = [np.array(ids, np.int32) for ids in ([20, 21, 22], [23])]
    answers = sample(model, sources, layout, sampling(), (0,))
    width = 3 + layout.extra_source_tokens()
    assert seen == [(2, width)] and len(answers.ids) == 6


def test_a_step_runs_the_encoder_twice_a_prompt(tmp_path):
    trainer = make(tmp_path, steps=1, batch=3)
    seen = count_encoder(trainer.model)
    trainer.train()
    assert [rows for rows, _ in seen] == [3, 3]  # in sampling, and in training


@pytest.mark.parametrize("kind", MODELS)
def test_samples_are_a_function_of_the_key_and_leave_other_randomness_alone(kind):
    build, layout = MODELS[kind]
    model = build().train()
    sources = [np.array([20, 21], np.int32)]

    def drawn(key):
        return [ids.tolist() for ids in sample(model, sources, layout, sampling(num_generations=8), key).ids]

    state = torch.get_rng_state()
    first = drawn((3, 1))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(5)
    assert drawn((3, 1)) == first and drawn((3, 2)) != first
    assert len({tuple(ids) for ids in first}) > 1
    greedy = [sample(model, sources, layout, sampling(num_generations=1), None).ids[0].tolist() for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_samples_are_of_the_whole_distribution_at_the_temperature():
    """No top-k of the library's own, and the words come as often as the loss's log-probabilities say."""
    build, layout = MODELS["layerwise"]
    model = build()
    source = np.array([20, 21, 22], np.int32)
    how = sampling(num_generations=4000, max_completion_length=1, temperature=1.7)
    found = np.bincount([ids[0] for ids in sample(model, [source], layout, how, (0,)).ids], minlength=tiny.VOCAB)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[2, 20, 21, 22]]), decoder_input_ids=torch.tensor([[2]]), use_cache=False
        ).logits[0, 0]
    expected = (logits.double() / 1.7).softmax(-1).numpy()
    assert (found > 0).sum() > 50 > (expected > 1).sum()
    # The total variation distance of 4000 draws from 97 words is about 0.06.
    assert np.abs(found / 4000 - expected).sum() / 2 < 0.1


def test_answers_end_with_the_first_of_their_ends():
    build, layout = MODELS["layerwise"]
    ends = tuple(range(4, 40))  # so many that most answers end
    answers = sample(build(), [np.array([20, 21], np.int32)], layout, sampling(num_generations=64, ends=ends), (0,))
    assert 0 < sum(answers.finished) < 64
    for ids, finished in zip(answers.ids, answers.finished, strict=True):
        places = [n for n, i in enumerate(ids.tolist()) if i in ends]
        assert places == ([len(ids) - 1] if finished else []) and (finished or len(ids) == 6)


# Training


@pytest.mark.curves
@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_it_learns_what_is_rewarded(tmp_path, seed):
    """The right word depends on the question: without reading it the best reward is a sixth."""
    trainer = first_word.grpo_that_learns(tmp_path, seed)
    trainer.train()
    sampled, held_out = log_of(trainer, "reward"), log_of(trainer, "eval_reward")
    assert sampled[0] < 0.1 and sampled[-1] > 0.7
    assert held_out[0] < 0.1 and held_out[-1] > 0.9
    step = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {
        "reward_std",
        "rewards/begins_right/mean",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
        "tokens_per_second",
    } <= set(step)
    assert (tmp_path / "curves.png").stat().st_size > 1000


SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("iterations, stop", [(1, 2), (2, 3)])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, iterations, stop):
    """Also one that was stopped between two steps on the same answers."""

    def build(folder):
        torch.manual_seed(0)
        return make(
            tmp_path / folder,
            with_lora(MODELS["layerwise"][0](), lora_dropout=0.1),
            steps=5,
            batch=2,
            rewards=(begins_right, small_words),
            num_iterations=iterations,
            beta=0.1,
            training={**SAVES, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
        )

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(StopAfter(stop))
    first.train()
    assert find(tmp_path / "parts").last.name == f"checkpoint-{stop}"
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    for name in ("loss", "reward", "kl", "completions/mean_length", "clip_ratio/region_mean"):
        assert log_of(second, name) == log_of(whole, name), name
    assert len(log_of(whole, "loss")) == 5 and len(log_of(whole, "reward")) == (5 if iterations == 1 else 3)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(set(log_of(whole, "reward"))) > 1


def test_between_two_steps_on_the_same_answers_they_are_part_of_the_checkpoint(tmp_path, monkeypatch):
    trainer = make(tmp_path, steps=3, num_iterations=2, training=SAVES)
    trainer.train()
    kept = [len(list((tmp_path / f"checkpoint-{n}").glob("rollouts-*"))) for n in (1, 2, 3)]
    assert kept == [1, 0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(GrpoTrainer, "_kept_name", lambda self: "rollouts-1.safetensors")  # of another process
        with pytest.raises(UserError, match=r"checkpoint-3 lies between two steps on the same answers .* multiple of"):
            make(tmp_path, steps=4, num_iterations=2).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="answers for 1 micro-batches and a step has 3"):
        make(tmp_path, steps=4, num_iterations=2, batch=1, training={"gradient_accumulation_steps": 3}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_a_second_step_on_the_same_answers_is_clipped_and_the_first_is_not(tmp_path):
    trainer = make(
        tmp_path, steps=4, num_iterations=2, rewards=(small_words,), epsilon=0.01, training={"learning_rate": 1e-2}
    )
    trainer.train()
    clipped = log_of(trainer, "clip_ratio/region_mean")
    assert clipped[0] == clipped[2] == 0 and clipped[1] > 0 and clipped[3] > 0
    assert len(log_of(trainer, "reward")) == 2  # told of where answers were sampled
    for name in ("low", "high"):
        assert all(0 <= share <= 1 for share in log_of(trainer, f"clip_ratio/{name}_mean"))


@pytest.mark.parametrize("kind", ["adapter_off", "loaded"])
def test_the_divergence_begins_at_nothing_and_is_of_the_start(tmp_path, kind):
    torch.manual_seed(5)
    model = MODELS["layerwise"][0]()
    copy = MODELS["layerwise"][0]()
    copy.load_state_dict(model.state_dict())
    trainer = make(
        tmp_path,
        with_lora(model) if kind == "adapter_off" else model,
        reference_model=copy if kind == "loaded" else None,
        rewards=(small_words,),
        beta=0.2,
        steps=6,
        training={"learning_rate": 1e-2},
    )
    trainer.train()
    kl = log_of(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-3


def test_sampling_keeps_a_cache_where_training_saves_memory(tmp_path):
    """The first word is decoded in one position, and so is every further one."""
    trainer = make(tmp_path, steps=1, num_generations=2, training={"gradient_checkpointing": True})
    widths = []
    trainer.model.model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer.train()
    assert set(widths[:-1]) == {1} and widths[-1] > 1


def test_cut_off_answers_can_be_left_out(tmp_path):
    trainer = make(tmp_path, mask_truncated_completions=True)
    (batch,) = trainer._rollouts([next(iter(trainer.get_train_dataloader()))])
    full = batch["decoder_attention_mask"].sum(dim=1)
    trained = (batch["labels"] != IGNORED).sum(dim=1)
    ended = (batch["labels"] == 1).any(dim=1)
    assert torch.equal(trained, torch.where(ended, full, 0)) and not ended.all()


def test_what_a_step_is_scored_on(tmp_path):
    """Questions, answers and columns of a sample stay beside each other, and messages get messages."""
    seen = []

    def look(prompts, completions, completion_ids, **columns):
        seen.append((list(prompts), list(completions), list(completion_ids), dict(columns)))
        return [1.0] * len(prompts)

    make(tmp_path, steps=1, batch=2, rewards=(look,)).train()
    asked, answers, ids, columns = seen[0]
    assert [asked[0]] * 4 == asked[:4] and [asked[4]] * 4 == asked[4:] and asked[0] != asked[4]
    assert set(columns) == {"first", "trainer_state"} and columns["trainer_state"].max_steps == 1
    assert columns["first"] == [prompt.split()[0] for prompt in asked]
    tokenizer = tiny.word_tokenizer()
    assert answers == [tokenizer.decode(own, skip_special_tokens=True) for own in ids]
    talk = [Prompt(p.source, [{"role": "user", "content": p.prompt}], {}, p.where) for p in prompts(4)]
    make(tmp_path / "talk", steps=1, batch=2, train=talk, rewards=(look,)).train()
    assert seen[1][1][0] == [{"role": "assistant", "content": seen[1][1][0][0]["content"]}]


@pytest.mark.parametrize("call", [4, 5], ids=["in-measuring", "in-sampling"])
def test_a_reward_that_fails_names_the_sample_and_loses_no_step(tmp_path, call):
    """What was learnt before is saved, and the run goes on with the mended function as if nothing had happened."""
    calls = []

    def build(folder, breaks):
        def brittle(prompts, completions, completion_ids, **columns) -> list[float]:
            calls.append(len(completions))
            right = small_words(prompts, completions, completion_ids)
            return [float("nan"), *right[1:]] if breaks and len(calls) == call else right

        calls.clear()
        saves = {"save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 3}
        return make(tmp_path / folder, rewards=(brittle,), test=prompts(2, 1), steps=5, training=saves)

    whole = build("whole", breaks=False)
    whole.train()
    with pytest.raises(UserError, match=r"brittle returned nan for prompts:\d+.* goes on from .*checkpoint-3"):
        build("parts", breaks=True).train()
    second = build("parts", breaks=False)
    second.train(resume_from_checkpoint=True)
    for name in ("loss", "reward"):
        assert log_of(second, name) == log_of(whole, name), name
    assert log_of(second, "eval_reward")[-1] == log_of(whole, "eval_reward")[-1]
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_reward_that_fails_at_once_leaves_nothing_to_go_on_from(tmp_path):
    def broken(prompts, completions, **columns):
        raise KeyError("answer")

    with pytest.raises(UserError, match=r"broken raised KeyError on prompts:\d+.* begins anew"):
        make(tmp_path, rewards=(broken,)).train()
    assert find(tmp_path).last is None


def test_a_function_that_does_not_always_apply_has_the_mean_of_where_it_does(tmp_path):
    def sometimes(prompts, completions, **columns):
        return [2.0 if n == 0 else None for n in range(len(completions))]

    def never(prompts, completions, **columns):
        return [None] * len(completions)

    trainer = make(tmp_path, steps=2, rewards=(begins_right, sometimes, never))
    trainer.train()
    assert log_of(trainer, "rewards/sometimes/mean") == [2, 2] and not log_of(trainer, "rewards/never/mean")
    json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_generations": 1}, "at least 2 answers"),
        ({"loss_type": "ppo"}, "take one of grpo, bnpo, dr_grpo, dapo"),
        ({"scale_rewards": "yes"}, "take one of group, batch, none"),
        ({"max_completion_length": 0}, "begin at 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 1.5}, "up to 1"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"beta": 0.1}, "no adapter to switch off"),
    ],
)
def test_settings_without_meaning_are_refused(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        make(tmp_path, **settings)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="With beta 0 no reference"):
        make(tmp_path, reference_model=MODELS["layerwise"][0]())
    with pytest.raises(UserError, match="needs held-out prompts"):
        make(tmp_path, training={"eval_strategy": "steps", "eval_steps": 1})
