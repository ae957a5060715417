"""Reward functions: finding them, calling them, blaming them."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal

import numpy as np
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.rewards import (
    NamedReward,
    RewardSettings,
    exact_match,
    last_number,
    length_penalty,
    load_rewards,
    matches,
    number_equal,
    score,
    weighted,
)

PROMPTS = ["2 + 2", "2 + 2", "3 + 3", "3 + 3"]
TEXTS = ["4", "it is 5", "6", "6.0"]
IDS = [[1], [2, 3, 4], [5], [6, 7]]
WHERE = ["sums:1", "sums:1", "sums:2", "sums:2"]
COLUMNS = {"answer": ["4", "4", "6", "6"]}


def scored(*rewards, columns=COLUMNS, texts=TEXTS):
    loaded = load_rewards(list(rewards))
    return score(loaded, PROMPTS, texts, IDS, columns, WHERE), loaded


def test_those_that_are_shipped():
    assert exact_match(PROMPTS, [" 4\n", "4.", "6", "6"], **COLUMNS) == [1, 0, 1, 1]
    assert exact_match(["?"], ["yes"], column="gold", gold=["yes"]) == [1]
    assert matches(["?"] * 2, ["a <b>c\nd</b>", "<b>"], pattern="<b>.*</b>$") == [1, 0]
    assert number_equal(PROMPTS, TEXTS, **COLUMNS) == [1, 0, 1, 1]
    assert number_equal(["?"], ["4"], answer=["four"]) == [None]
    messages = [[{"role": "assistant", "content": "so 4"}]]
    assert number_equal(["?"], messages, answer=["2 + 2 = 4 #### 4"]) == [1]


@pytest.mark.parametrize(
    "text, number",
    [
        ("it is 1,234.50 dollars.", "1234.5"),
        ("from 3 to 7", "7"),
        ("x = -12", "-12"),
        ("10-3", "3"),
        ("the end is 72.", "72"),
        ("3.14", "3.14"),
        (".5", "0.5"),
        ("$1,000,000", "1000000"),
        ("1, 2, 3", "3"),
        ("room 101b", "101"),
        ("v2", "2"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_length_penalty_falls_in_a_line():
    ids = [[0] * n for n in (1, 6, 7, 8, 10, 12)]
    found = length_penalty(["?"] * 6, [""] * 6, ids, max_length=10, buffer=4)
    assert found == [0, 0, -0.25, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer"):
        length_penalty([], [], [], max_length=4, buffer=5)


def test_functions_come_from_modules_files_and_here_with_arguments_and_weights(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def long(prompts, completions, completion_ids=None, **columns):\n    return map(len, completions)\n"
    )
    rewards = load_rewards(
        [
            f"{file}:long",
            RewardSettings("modeling_t5gemma.post_training.rewards:matches", 2.0, {"pattern": "^6"}),
            RewardSettings("matches", -1.0, {"pattern": "5"}),
        ]
    )
    assert [reward.name for reward in rewards] == ["long", "matches", "matches-2"]
    table = score(rewards, PROMPTS, TEXTS, IDS, COLUMNS, WHERE)
    np.testing.assert_array_equal(table, [[1, 0, 0], [7, 0, 1], [1, 1, 0], [3, 1, 0]])
    np.testing.assert_array_equal(weighted(table, rewards), [1, 6, 3, 5])


def test_none_is_left_out_of_the_sum_and_all_none_is_an_error(tmp_path):
    (tmp_path / "f.py").write_text(
        "def some(completions, **_):\n    return [None if '5' in c else 1 for c in completions]\n"
    )
    table, loaded = scored(f"{tmp_path / 'f.py'}:some", "exact_match")
    assert math.isnan(table[1, 0]) and list(weighted(table, loaded)) == [2, 0, 2, 1]
    with pytest.raises(UserError, match=r"No reward function applies to sums:1: some returned None"):
        scored(f"{tmp_path / 'f.py'}:some")


@pytest.mark.parametrize(
    "body, words",
    [
        (
            "return [1 / (c != '6.0') for c in completions]",
            r"bad raised ZeroDivisionError on sums:2: division by zero",
        ),
        ("return [float('nan') if c == '6' else 1 for c in completions]", r"bad returned nan for sums:2: .* finite"),
        ("return [float('inf')] * len(completions)", r"bad returned inf for sums:1"),
        ("return ['good'] * len(completions)", r"bad returned 'good' for sums:1"),
        ("return [1]", r"bad returned 1 values for 4 completions"),
        ("return 1", r"bad raised TypeError"),
        ("return [1] * int(columns['nothing'])", r"bad raised KeyError"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_the_sample(body, words, tmp_path):
    (tmp_path / "bad.py").write_text(f"def bad(completions, **columns):\n    {body}\n")
    with pytest.raises(UserError, match=words):
        scored(f"{tmp_path / 'bad.py'}:bad")


def test_coroutines_are_waited_for_and_the_trainers_state_is_there():
    async def late(completions, trainer_state, **columns):
        await asyncio.sleep(0)
        assert "5" not in completions[-1] or trainer_state != 3, "too early"
        return [trainer_state * len(text) for text in completions]

    reward = NamedReward("late", late)
    assert score([reward], PROMPTS, TEXTS, IDS, COLUMNS, WHERE, 2)[:, 0].tolist() == [2, 14, 2, 6]
    with pytest.raises(UserError, match="late raised AssertionError on sums:1: too early"):
        score([reward], PROMPTS[:2], TEXTS[:2], IDS[:2], {}, WHERE[:2], 3)


def test_a_missing_column_is_told():
    with pytest.raises(UserError, match=r"exact_match raised ValueError .*no column 'answer', only 'gold'\. "):
        scored("exact_match", columns={"gold": ["4"] * 4})


def test_what_cannot_be_found_is_told(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for path, words in (
        ("exact", "take exact_match, matches"),
        ("last_number", "is no function: take"),
        ("no.such.module:f", "cannot be imported"),
        (f"{tmp_path}/none.py:f", "does not exist"),
        (f"{tmp_path}/broken.py:f", "ZeroDivisionError"),
        ("math:nothing", "is no function"),
    ):
        with pytest.raises(UserError, match=words):
            load_rewards([path])
    with pytest.raises(UserError, match="at least one function"):
        load_rewards([])
