"""Searches, whole runs and their reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.superglue import run
from modeling_t5gemma.superglue.report import PAPER, Results, compare, report
from modeling_t5gemma.superglue.search import Setting, check_space, search
from modeling_t5gemma.superglue.settings import DataSettings, HeadSettings, SpaceSettings
from modeling_t5gemma.superglue.tasks import TASKS, tasks_named
from modeling_t5gemma.training.checkpoints import find
from tests.superglue import parts

SPACE = SpaceSettings([1e-5, 1e-3], [4, 8], [0.0, 0.2], [0], trials=14)


def accuracy(setting: Setting) -> float | None:
    """Best near a learning rate of 1e-4; one batch size fails."""
    return None if setting.batch_size == 4 else -abs(setting.learning_rate - 1e-4) - setting.dropout


def test_a_grid_is_tried_whole_and_the_best_is_found(tmp_path):
    seen = []

    def attempt(setting):
        seen.append(setting)
        return accuracy(setting)

    assert search("grid", SPACE, attempt, tmp_path) == Setting(1e-5, 8, 0.0)
    assert len(set(seen)) == len(seen) == 8
    with pytest.raises(UserError, match="None of 8 settings could be trained"):
        search("grid", SPACE, lambda setting: None, tmp_path)


@pytest.mark.needs("optuna")
def test_optuna_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    def run_until(stops: int, folder: Path) -> list[Setting]:
        seen: list[Setting] = []

        def attempt(setting):
            if len(seen) == stops:
                raise KeyboardInterrupt
            seen.append(setting)
            return accuracy(setting)

        try:
            best = search("optuna", SPACE, attempt, folder)
        except KeyboardInterrupt:
            return seen
        good = [setting for setting in seen if accuracy(setting) is not None]
        assert not good or accuracy(best) >= max(map(accuracy, good))
        return seen

    whole = run_until(99, tmp_path / "whole")
    assert len(whole) == 14
    parts_of_it = [run_until(n, tmp_path / "parts") for n in (0, 3, 1, 99)]
    assert [setting for part in parts_of_it for setting in part] == whole
    assert run_until(99, tmp_path / "parts") == []
    assert all(1e-5 <= setting.learning_rate <= 1e-3 and 0 <= setting.dropout <= 0.2 for setting in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": []}, r"space.learning_rates is \[\]"),
        ({"seeds": [1, 1]}, "different values"),
        ({"dropouts": [1.0]}, "at least 0 and below 1"),
        ({"learning_rates": [0.0]}, "Learning rates are above 0"),
    ],
)
def test_a_space_that_cannot_be_searched(change, message):
    with pytest.raises(UserError, match=message):
        check_space(SpaceSettings(**change))


def settings(folder: Path, space: SpaceSettings, data: Path = parts.FIXTURES, search="grid", **kwargs):
    training = parts.arguments(folder, **{"max_steps": 2, "save_steps": 1, **kwargs})
    return run.Settings(DataSettings(str(data)), HeadSettings(), space, training, search)


def test_trials_are_run_once_and_reported(checkpoints, tmp_path, monkeypatch):
    space = SpaceSettings([1e-4, 1e-3], [4], [0.1], [0, 1])
    path, tasks = str(checkpoints["layerwise"]), tasks_named("multirc,wsc")
    run.run_tasks(path, tasks, settings(tmp_path, space), tmp_path)
    table = report(tmp_path)
    for name, metrics in (("multirc", {"accuracy", "f1a", "em"}), ("wsc", {"accuracy"})):
        with (tmp_path / name / "trials.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        assert len(rows) == 3 and metrics <= set(rows[0])
        assert [float(row["accuracy"]) for row in rows] == sorted((float(r["accuracy"]) for r in rows), reverse=True)
        assert not list(tmp_path.glob(f"{name}/*/checkpoint-*"))
        for trial in tmp_path.glob(f"{name}/lr*"):
            labels = [json.loads(line) for line in (trial / "val" / f"{TASKS[name].folder}.jsonl").open()]
            assert len(labels) == (2 if name == "multirc" else 8)
        predicted = (tmp_path / "submission" / f"{TASKS[name].folder}.jsonl").read_text().splitlines()
        assert len(predicted) == (1 if name == "multirc" else 4)
    assert "| multirc | accuracy |" in table and "| multirc | em |" in table and "±" in table
    made = json.loads((tmp_path / "results.json").read_text())
    per_seed = [
        sum(made["tasks"][name]["seeds"][seed]["accuracy"] for name in ("multirc", "wsc")) / 2 for seed in ("0", "1")
    ]
    assert made["mean_accuracy"]["mean"] == pytest.approx(sum(per_seed) / 2)
    assert (tmp_path / "results.png").stat().st_size > 1000

    monkeypatch.setattr(run._TaskRun, "_train", lambda *_: pytest.fail("trained again"))
    run.run_tasks(path, tasks, settings(tmp_path, space), tmp_path)
    assert report(tmp_path) == table
    with pytest.raises(UserError, match=r"another model, training.max_steps"):
        run.run_tasks(str(checkpoints["separate"]), tasks, settings(tmp_path, space, max_steps=3), tmp_path)


def test_a_folder_without_trials_belongs_to_nobody(checkpoints, tmp_path):
    """A path that was mistyped does not stand in the way of the right one."""
    space, tasks = SpaceSettings([1e-3], [4], [0.0], [0]), tasks_named("copa")
    path = str(checkpoints["decoder"])
    with pytest.raises(UserError, match="has neither"):
        run.run_tasks(path, tasks, settings(tmp_path, space, data=tmp_path), tmp_path)
    run.run_tasks(path, tasks, settings(tmp_path, space), tmp_path)
    with pytest.raises(UserError, match=r"another data.path"):
        run.run_tasks(path, tasks, settings(tmp_path, space, data=tmp_path), tmp_path)


def test_killed_between_its_last_step_and_its_result(checkpoints, tmp_path, monkeypatch):
    space = SpaceSettings([1e-3], [4], [0.0], [0])
    path, tasks = str(checkpoints["decoder"]), tasks_named("copa")
    run.run_tasks(path, tasks, settings(tmp_path / "whole", space), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run.ClassificationTrainer, "predict_scores", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_tasks(path, tasks, settings(tmp_path / "parts", space), tmp_path / "parts")
    (trial,) = (tmp_path / "parts" / "copa").glob("lr*")
    assert find(trial).last.name == "checkpoint-2"
    run.run_tasks(path, tasks, settings(tmp_path / "parts", space), tmp_path / "parts")
    files = [(tmp_path / folder / "copa" / "task.json").read_text() for folder in ("whole", "parts")]
    assert files[0] == files[1]


def _interrupted(*_):
    raise KeyboardInterrupt


def test_a_setting_that_explodes_is_a_row_of_the_table(checkpoints, tmp_path):
    space = SpaceSettings([1e30, 1e-3], [4], [0.0], [0])
    tasks = tasks_named("rte")
    run.run_tasks(str(checkpoints["separate"]), tasks, settings(tmp_path, space, max_steps=3), tmp_path)
    chosen = json.loads((tmp_path / "rte" / "task.json").read_text())
    assert chosen["setting"]["learning_rate"] == 1e-3 and chosen["trials"] == 2
    assert "The loss of step" in (tmp_path / "rte" / "trials.csv").read_text()
    everything = SpaceSettings([1e30], [4], [0.0], [0])
    with pytest.raises(UserError, match="None of 1 settings could be trained"):
        run.run_tasks(str(checkpoints["separate"]), tasks, settings(tmp_path, everything, max_steps=3), tmp_path)


def test_a_batch_that_cannot_be_divided(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"A batch of 3 cannot be divided .* 2 accumulation steps"):
        given = settings(tmp_path, SpaceSettings(batch_sizes=[3]), gradient_accumulation_steps=2)
        run.run_tasks(str(checkpoints["separate"]), tasks_named("rte"), given, tmp_path)


def made_up(folder: Path, model: str, accuracies: dict[str, list[float]]) -> Path:
    run.write(folder / run.RUN_FILE, json.dumps({"model": model}))
    for task, values in accuracies.items():
        seeds = {str(n): {"accuracy": a, "f1": a, "f1a": a, "em": a, "score": a} for n, a in enumerate(values)}
        setting = {"learning_rate": 1e-5, "batch_size": 16, "dropout": 0.1}
        content = {"setting": setting, "seeds": seeds, "trials": 1, "best_trial": "none"}
        run.write(folder / task / run.TASK_FILE, json.dumps(content))
    return folder


def test_both_columns_stand_beside_the_papers(tmp_path):
    ours = made_up(tmp_path / "a", "google/t5gemma-2b-2b-ul2", {"cb": [0.9, 0.8], "rte": [0.7, 0.6], "wic": [0.5]})
    baseline = made_up(tmp_path / "b", "google/gemma-2-2b", {"rte": [0.5, 0.7], "cb": [0.6, 0.6]})
    table = compare([ours, baseline], tmp_path)
    assert table == (tmp_path / "comparison.md").read_text()
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines()]
    assert lines[0] == ["accuracy on the development set", "t5gemma-2b-2b-ul2", "gemma-2-2b"]
    assert lines[2:4] == [["cb", "85.0 ± 7.1", "60.0 ± 0.0"], ["rte", "65.0 ± 7.1", "60.0 ± 14.1"]]
    assert lines[4] == ["mean accuracy of 2 of 7 tasks", "75.0 ± 7.1", "60.0 ± 7.1"]
    assert lines[6] == ["the paper's mean accuracy", "88.1", "75.5"]
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    with pytest.raises(UserError, match="No task was run in all"):
        compare([made_up(tmp_path / "c", "x", {"wic": [0.5]}), baseline], tmp_path)
    with pytest.raises(UserError, match="holds no finished task"):
        Results.read(tmp_path / "nothing")


def test_the_papers_numbers():
    assert len(PAPER) == 16 and PAPER["t5gemma-9b-2b-ul2"] == 90.7 and PAPER["t5gemma-xl-xl-prefixlm"] == 84.4
