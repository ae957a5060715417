"""Rewards of sampled answers: functions of the user's, or one of those here.

A reward function has TRL's signature: it gets lists of one length as keywords, ``prompts``, ``completions``,
``completion_ids`` and one for every further column of the records, and ``trainer_state``, and returns as many numbers,
None where it does not apply. It may be a coroutine function. Completions are strings where prompts are, and otherwise
lists of one message of the assistant.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .settings import RewardSettings

Reward = Callable[..., Sequence[float | None]]
# Arguments that every function gets, which no column may overwrite.
TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "prompt", "completion")


@dataclass(frozen=True)
class NamedReward:
    """A reward function, what it is called in logs and messages, and its weight."""

    name: str
    function: Reward
    weight: float = 1.0


def load_rewards(settings: Sequence[RewardSettings | str]) -> list[NamedReward]:
    """The functions that the settings name; a name that comes twice gets a number.

    Raises:
        UserError: there are none, or one cannot be found.
    """
    if not settings:
        raise UserError("There is no reward: name at least one function in grpo.rewards.")
    rewards: list[NamedReward] = []
    for each in (RewardSettings(one) if isinstance(one, str) else one for one in settings):
        function = functools.partial(_found(each.function), **each.arguments)
        name = each.function.rpartition(":")[2]
        same = sum(reward.name.partition("-")[0] == name for reward in rewards)
        rewards.append(NamedReward(f"{name}-{same + 1}" if same else name, function, each.weight))
    return rewards


def _found(path: str) -> Reward:
    module, _, name = path.rpartition(":")
    try:
        home = _imported(module or __name__)
    except UserError:
        raise
    except Exception as error:  # a file of the user's can raise anything
        raise UserError(f"The reward {path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(home, name, None)
    if not callable(function) or (not module and name not in SHIPPED):
        known = f": take {', '.join(SHIPPED)}, or give module:function or file.py:function" if not module else ""
        raise UserError(f"The reward {path} is no function{known}.")
    found: Reward = function
    return found


def _imported(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    file = Path(module).expanduser()
    if not file.is_file():
        raise UserError(f"{module} does not exist, and a reward is to be read from it.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def score(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list[Any]],
    where: Sequence[str],
    state: Any = None,
) -> npt.NDArray[np.float64]:
    """What every function (F) gives every completion (N), (N, F), NaN where it does not apply.

    Args:
        where: names the sample of each completion.
        state: the trainer's, for rewards that depend on how far training is.

    Raises:
        UserError: a function raises, returns another number of values or what is no finite number, or no function
            applies to a sample; names function and sample.
    """
    arguments: dict[str, Sequence[Any]] = {
        **{name: values for name, values in columns.items() if name not in TAKEN},
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
    }
    table = np.stack([_values(reward, arguments, where, state) for reward in rewards], axis=1)
    if len(nothing := np.flatnonzero(np.isnan(table).all(axis=1))):
        names = ", ".join(reward.name for reward in rewards)
        raise UserError(f"No reward function applies to {where[nothing[0]]}: {names} returned None.")
    return table


def weighted(table: npt.NDArray[np.float64], rewards: Sequence[NamedReward]) -> npt.NDArray[np.float64]:
    """The weighted sum of the rewards that apply, (N, F) to (N,)."""
    total: npt.NDArray[np.float64] = np.nansum(table * [reward.weight for reward in rewards], axis=1)
    return total


def _values(
    reward: NamedReward, arguments: dict[str, Sequence[Any]], where: Sequence[str], state: Any
) -> npt.NDArray[np.float64]:
    try:
        given = _called(reward, arguments, state)
    except Exception as error:  # whatever a function of the user's raises
        place = _first_that_raises(reward, arguments, state)
        sample = f"{where[0]} to {where[-1]}" if place is None else where[place]
        raise UserError(
            f"The reward {reward.name} raised {type(error).__name__} on {sample}: {error}. Mend the function, or let "
            "it return None where it does not apply."
        ) from error
    if len(given) != len(where):
        raise UserError(f"The reward {reward.name} returned {len(given)} values for {len(where)} completions.")
    values = np.full(len(given), np.nan)
    for place, value in enumerate(given):
        if value is None:
            continue
        try:
            values[place] = float(value)
        except (TypeError, ValueError):
            values[place] = np.nan
        if not math.isfinite(values[place]):
            raise UserError(
                f"The reward {reward.name} returned {value!r} for {where[place]}: a reward is a finite number, or "
                "None where the function does not apply."
            )
    return values


def _called(reward: NamedReward, arguments: dict[str, Sequence[Any]], state: Any) -> list[float | None]:
    given: Any = reward.function(**arguments, trainer_state=state)
    return list(asyncio.run(given) if inspect.iscoroutine(given) else given)


def _first_that_raises(reward: NamedReward, arguments: dict[str, Sequence[Any]], state: Any) -> int | None:
    """The first completion that the function raises on when it gets that one alone."""
    for place in range(len(arguments["completions"])):
        try:
            _called(reward, {name: values[place : place + 1] for name, values in arguments.items()}, state)
        except Exception:
            return place
    return None


# Rewards to begin with


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], *, column: str = "answer", **columns: Any
) -> list[float]:
    """1 where the text is that of a column, but for white space around it, otherwise 0."""
    wanted = _column(columns, column)
    return [float(text_of(completion).strip() == str(want).strip()) for completion, want in zip(completions, wanted)]


def matches(prompts: Sequence[Any], completions: Sequence[Any], *, pattern: str, **columns: Any) -> list[float]:
    """1 where a regular expression is found (``.`` is any character, also the end of a line), otherwise 0; ``^`` and
    ``$`` bind it to the ends of the text."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.search(text_of(completion)) is not None) for completion in completions]


def number_equal(
    prompts: Sequence[Any], completions: Sequence[Any], *, column: str = "answer", **columns: Any
) -> list[float | None]:
    """1 where the last number of the text equals the last number of a column, otherwise 0; None where the column has
    no number.

    A number is written with digits, a sign, a decimal point and commas between thousands; 1,000 equals 1000.0. Words,
    fractions and powers of ten are not understood.
    """
    wanted = [last_number(str(want)) for want in _column(columns, column)]
    return [
        None if want is None else float(last_number(text_of(completion)) == want)
        for completion, want in zip(completions, wanted)
    ]


def length_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    buffer: int,
    **columns: Any,
) -> list[float]:
    """0 up to ``max_length - buffer`` tokens, then falling in a line to -1 at ``max_length`` and beyond: the soft
    overlong punishment of DAPO (arXiv 2503.14476, equation 13)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer ({buffer}) is above 0 and at most max_length ({max_length})")
    return [-min(1.0, max(0.0, (len(ids) - (max_length - buffer)) / buffer)) for ids in completion_ids]


SHIPPED = ("exact_match", "matches", "number_equal", "length_penalty")

# A sign counts where it is no minus between two numbers or words.
_NUMBER = re.compile(r"(?<![\w.)])-?\d+(?:,\d{3})*(?:\.\d+)?|(?<!\d)\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])-?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:  # digits of other scripts are not all numbers
        return None


def text_of(completion: Any) -> str:
    """A completion's text, be it a string or messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _column(columns: dict[str, Any], name: str) -> Sequence[Any]:
    if name not in columns:
        there = ", ".join(repr(own) for own in columns if own not in TAKEN)
        raise ValueError(f"the records have no column {name!r}, only {there or 'none'}")
    found: Sequence[Any] = columns[name]
    return found
