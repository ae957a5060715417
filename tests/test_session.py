"""What tests share: WARM_PYTHON is a Python (arguments, streams, folder, exit codes, signals); folders made once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.selections import pairwise
from tests.session import made_once
from tests.warm import WARM_PYTHON

SCRIPT = "import os, sys; print(sys.argv, sys.stdin.read(), os.getcwd(), os.environ['GIVEN'], file=sys.stderr)"


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_it_runs_what_a_python_runs(how: str, tmp_path: Path):
    (tmp_path / "told.py").write_text(f"{SCRIPT}\nif __name__ == '__main__':\n    raise SystemExit(3)\n")
    command = {"-c": ["-c", (tmp_path / "told.py").read_text()], "-m": ["-m", "told"], "script": ["told.py"]}[how]
    done = [
        subprocess.run(
            [python, "-u", *command, "an argument", "--option"],
            input="über",
            cwd=tmp_path,
            env={**os.environ, "GIVEN": "yes"},
            capture_output=True,
            text=True,
            check=False,
        )
        for python in (sys.executable, WARM_PYTHON)
    ]
    assert done[0].returncode == 3 and "--option" in done[0].stderr and str(tmp_path) in done[0].stderr
    assert [vars(each) | {"args": None} for each in done[:1]] == [vars(each) | {"args": None} for each in done[1:]]


def test_a_forked_model_computes_what_this_process_does(tmp_path: Path):
    """Threads of torch that a fork had lost would hang."""
    code = """
import torch
torch.manual_seed(0)
a = torch.randn(300, 300, requires_grad=True)
(a @ a).relu().sum().backward()
print(a.grad.double().sum().item())
"""
    namespace: dict[str, object] = {"print": lambda value: namespace.update(here=value)}
    exec(code, namespace)
    done = subprocess.run([WARM_PYTHON, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) == namespace["here"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_of_multiprocessing_are_forks_too(method: str):
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        command = pool.submit(Path.read_text, Path("/proc/self/cmdline")).result()
    assert "server.py" in command
    code = "import multiprocessing as m; print(m.get_context('spawn').Pool(1).map(len, ['abc']))"
    assert subprocess.run([WARM_PYTHON, "-c", code], capture_output=True, check=True).stdout == b"[3]\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_program(number: signal.Signals, tmp_path: Path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([WARM_PYTHON, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    program = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=30)  # the program's end closes the pipe
    assert process.returncode == -number
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):
            os.kill(program, 0)
            time.sleep(0.01)  # until its parent has taken note


def test_what_is_read_at_import_cannot_be_given():
    def run(**given: str) -> subprocess.CompletedProcess:
        return subprocess.run([WARM_PYTHON, "-c", ""], env={**os.environ, **given}, capture_output=True, check=False)

    refused = run(HF_ENDPOINT="http://127.0.0.1:1")
    assert refused.returncode == 1 and refused.stderr.startswith(b"HF_ENDPOINT has been read already")
    assert run(HF_XET_HIGH_PERFORMANCE="1").returncode == 0  # as lm_eval sets it when it is imported


def test_what_is_made_once_is_made_again_after_a_failure():
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        if len(made) == 1:
            raise ValueError
        (folder / "file").write_text("text")

    with pytest.raises(ValueError):
        made_once("a folder of this test", make)
    folders = {made_once("a folder of this test", make) for _ in range(3)}
    assert len(made) == 2 and (folders.pop() / "file").read_text() == "text" and not folders


def test_each_value_meets_each_value_of_another_axis():
    axes = ("abc", range(4), (True, False))
    made = pairwise(*axes)
    assert len(made) == 24 and {each.values for each in made} == set(itertools.product(*axes))
    quick = [each.values for each in made if not each.marks]
    assert 12 <= len(quick) < 16
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(values[i], values[j]) for values in quick} == set(itertools.product(axes[i], axes[j]))
