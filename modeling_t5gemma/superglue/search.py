"""The search for a learning rate, batch size and dropout. Wherever it is stopped, what was tried is on the disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import UserError
from .settings import How, SpaceSettings


@dataclass(frozen=True)
class Setting:
    """What one trial is made with, beside its seed."""

    learning_rate: float
    batch_size: int
    dropout: float

    def name(self, seed: int) -> str:
        """A folder for its trial."""
        return f"lr{self.learning_rate!r}_batch{self.batch_size}_dropout{self.dropout!r}_seed{seed}"


# Runs a setting with the first seed: its accuracy on the development set, None where training failed.
Try = Callable[[Setting], float | None]


def check_space(space: SpaceSettings) -> None:
    """Refuse what cannot be searched.

    Raises:
        UserError: an empty list, or values out of range.
    """
    for name in ("learning_rates", "batch_sizes", "dropouts", "seeds"):
        values = getattr(space, name)
        if not values or len(set(values)) != len(values):
            raise UserError(f"space.{name} is {values}: give different values, at least one.")
    if min(space.learning_rates) <= 0 or min(space.batch_sizes) < 1 or space.trials < 1 or min(space.seeds) < 0:
        raise UserError("Learning rates are above 0, batch sizes and trials at least 1, seeds not negative.")
    if not all(0 <= rate < 1 for rate in space.dropouts):
        raise UserError(f"space.dropouts is {space.dropouts}: a dropout is at least 0 and below 1.")


def search(how: How, space: SpaceSettings, attempt: Try, folder: Path) -> Setting:
    """The setting with the highest accuracy, the first of equals.

    Args:
        folder: where optuna keeps its study.

    Raises:
        UserError: no setting could be trained.
    """
    tried = _grid(space, attempt) if how == "grid" else _optuna(space, attempt, folder)
    good = {setting: accuracy for setting, accuracy in tried.items() if accuracy is not None}
    if not good:
        raise UserError(
            f"None of {len(tried)} settings could be trained: each loss became infinite or not a number. Lower "
            "space.learning_rates."
        )
    return max(good, key=lambda setting: good[setting])


def _grid(space: SpaceSettings, attempt: Try) -> dict[Setting, float | None]:
    settings = itertools.product(space.learning_rates, space.batch_sizes, space.dropouts)
    return {setting: attempt(setting) for setting in itertools.starmap(Setting, settings)}


def _optuna(space: SpaceSettings, attempt: Try, folder: Path) -> dict[Setting, float | None]:
    """Every rank tries the same settings; the first asks optuna for them."""
    study = _Study(space, folder) if PartialState().is_main_process else None
    while True:
        setting: Setting | None = _from_first(study and study.next())
        if setting is None:
            tried: dict[Setting, float | None] = _from_first(study and study.tried())
            return tried
        accuracy = attempt(setting)
        if study is not None:
            study.tell(accuracy)


def _from_first(value: Any) -> Any:
    return broadcast_object_list([value])[0]


class _Study:
    """Optuna's study of a space, in a journal on the disk. Another space is another study.

    A suggestion is a function of the trials before it, and one that a kill left open is tried again: a search that was
    stopped goes on as if it had not been.
    """

    def __init__(self, space: SpaceSettings, folder: Path) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise UserError("--search optuna needs optuna: pip install modeling_t5gemma[superglue]") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        folder.mkdir(parents=True, exist_ok=True)
        self._study: Any = optuna.create_study(
            study_name=json.dumps([space.learning_rates, space.batch_sizes, space.dropouts]),
            storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))),
            direction="maximize",
            load_if_exists=True,
        )
        self._trials = space.trials
        distributions = optuna.distributions
        self._distributions = {
            "learning_rate": distributions.FloatDistribution(
                min(space.learning_rates), max(space.learning_rates), log=True
            ),
            "batch_size": distributions.CategoricalDistribution(space.batch_sizes),
            "dropout": distributions.FloatDistribution(min(space.dropouts), max(space.dropouts)),
        }
        self._open: Any = None

    def next(self) -> Setting | None:
        """The setting to try; None when enough were."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(states=[states.RUNNING]):
            if trial.params.keys() == self._distributions.keys():
                self._open = trial
                return Setting(**trial.params)
            self._study.tell(trial.number, state=states.PRUNED)  # cut short while it was asked for
        done = self._study.get_trials(states=[states.COMPLETE, states.FAIL])
        if len(done) >= self._trials:
            return None
        self._study.sampler = self._optuna.samplers.TPESampler(seed=len(done))
        self._open = self._study.ask(self._distributions)
        return Setting(**self._open.params)

    def tell(self, accuracy: float | None) -> None:
        failed = self._optuna.trial.TrialState.FAIL if accuracy is None else None
        self._study.tell(self._open.number, accuracy, state=failed)

    def tried(self) -> dict[Setting, float | None]:
        states = self._optuna.trial.TrialState
        done = self._study.get_trials(states=[states.COMPLETE, states.FAIL])
        return {Setting(**trial.params): trial.value for trial in done}
