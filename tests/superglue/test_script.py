"""examples/superglue.py as its users run it."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.superglue.tasks import TASKS
from modeling_t5gemma.training.checkpoints import find
from tests.superglue.parts import FIXTURES
from tests.warm import WARM_PYTHON

ROOT = Path(__file__).parents[2]


def start(*arguments: object, python: str = WARM_PYTHON) -> subprocess.Popen:
    command = [python, "examples/superglue.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-4000:]
    return output


@pytest.fixture
def config(tmp_path) -> Path:
    """The shipped config, made small."""
    content = yaml.safe_load((ROOT / "examples" / "configs" / "superglue.yaml").read_text())
    content["data"] |= {"path": str(FIXTURES), "max_length": 200}
    content["space"] = {"learning_rates": [1e-4, 1e-3], "batch_sizes": [4], "dropouts": [0.1], "seeds": [0]}
    content["training"] |= {"max_steps": 9, "save_steps": 1, "eval_steps": 3, "bf16": False}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def script(monkeypatch):
    """The script's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location("superglue_script", ROOT / "examples" / "superglue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["superglue.py", *map(str, arguments)])
        module.main()

    main.parser = module.parser
    return main


def test_killed_at_any_moment_it_comes_to_the_same_results(config, checkpoints, tmp_path, script):
    def command(folder):
        given = ("--config", config, "--task", "rte", "--model", checkpoints["layerwise"])
        return (*given, "--output", tmp_path / folder, "--space.learning_rates", "[1e-4]")

    script(*command("whole"))
    trial = tmp_path / "parts" / "layerwise" / "rte" / "lr0.0001_batch4_dropout0.1_seed0"
    for number, after in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        process = start(*command("parts"))
        while process.poll() is None and not list(trial.glob(f"checkpoint-{after}")):
            time.sleep(0.005)
        time.sleep(random.random() * 0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), output[-4000:]
        assert "Traceback" not in output
    assert find(trial).last is not None
    assert "| rte | accuracy |" in finish(start(*command("parts"), python=sys.executable))
    for name in ("results.json", "results.md"):
        first, second = ((tmp_path / folder / "layerwise" / name).read_text() for folder in ("whole", "parts"))
        assert first == second


def test_both_columns_of_the_papers_table_by_one_command(config, checkpoints, tmp_path, script, capsys):
    script(
        *("--config", config, "--model", checkpoints["layerwise"], "--model", checkpoints["decoder"]),
        *("--output", tmp_path / "out", "--space.learning_rates", "[1e-3]", "--training.max_steps", "2"),
        *("--training.save_strategy", "no", "--training.eval_strategy", "no"),
    )
    for name in ("layerwise", "decoder"):
        made = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert set(made["tasks"]) == set(TASKS)
        submitted = {path.stem for path in (tmp_path / "out" / name / "submission").iterdir()}
        assert submitted == {task.folder for task in TASKS.values()}
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert capsys.readouterr().out.endswith(table) and "| mean accuracy of 7 tasks |" in table
    script("--compare", *(tmp_path / "out" / name for name in ("layerwise", "decoder")), "--output", tmp_path / "c")
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "squad"], "There is no task squad"),
        (["--model", "nowhere/else"], "--model is .* whose last names differ"),
        (["--training.warmup_steps", "-1"], "The training settings don't fit"),
        (["--data.path", "./nowhere"], "There is no folder ./somewhere/else"),
        (["--compare", "nowhere"], "nowhere holds no finished task"),
    ],
)
def test_bad_settings_are_told_in_one_line(arguments, message, config, tmp_path, script):
    with pytest.raises(UserError, match=message) as error:
        script("--config", config, "--model", "./somewhere/else", "--output", tmp_path / "out", *arguments)
    assert "\n" not in str(error.value)


def test_the_shipped_config_is_valid(script):
    cli = script.parser()
    config = ROOT / "examples" / "configs" / "superglue.yaml"
    given = cli.instantiate(cli.parse_args(["--config", str(config), "--model", "m", "--training.bf16", "false"]))
    assert given.space.seeds == [0, 1, 2] and given.training.num_train_epochs == 5 and given.search == "grid"
