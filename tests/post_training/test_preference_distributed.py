"""Preferences and rewards on two Gloo processes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.post_training.worker import with_dpo, with_fsdp
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    outputs = run_ranks(2, "tests.post_training.worker", tmp_path_factory.mktemp("two"))
    return [json.loads(output.split("FOUND")[1]) for output in outputs]


def test_two_processes_have_the_preferences_of_one(two, tmp_path):
    one = with_dpo(tmp_path, 3, 4)
    first, second = (each["dpo"] for each in two)
    assert set(one) == set(first) and len(one["loss"]) == 3
    for name, value in one.items():
        assert first[name] == pytest.approx(value, abs=1e-4), name
    assert second["eval_loss"] == first["eval_loss"]


def test_two_processes_sample_for_themselves_and_learn_together(two):
    first, second = (each["grpo"] for each in two)
    assert first["answers"] != second["answers"]
    assert first["weights"] == second["weights"] and first["loss"] == second["loss"]
    together = np.mean([first["own"], second["own"]], axis=0)
    assert first["reward"] == pytest.approx(together, abs=1e-6) and len(together) == 2


def test_a_reward_that_fails_in_one_process_ends_both_with_the_steps_saved(two):
    first, second = (each["failure"] for each in two)
    assert first.startswith("A reward failed in another process. ") and second.startswith("The reward brittle raised ")
    for told in (first, second):
        assert re.search(r" The same command goes on from \S+checkpoint-2\.$", told), told


def test_a_sharded_model_samples_what_the_whole_one_does(two):
    whole = with_fsdp()["found"]
    first, second = (each["fsdp"]["found"] for each in two)
    assert [answers for answers, _ in first] == [answers for answers, _ in whole]
    assert [answers for answers, _ in second] != [answers for answers, _ in whole]
    for (_, sharded), (_, alone) in zip(first, whole, strict=True):
        assert sharded == pytest.approx(alone, abs=1e-3)
