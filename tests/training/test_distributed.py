"""Two Gloo processes compute what one does, the teacher included."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(kind: str, output: Path, steps: int, batch: int, ranks: int) -> list[float]:
    """The losses of a run on so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if ranks > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
        command = [sys.executable, "-m", "tests.training.worker", kind, str(output), str(steps), str(batch)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    results = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return json.loads(results[0][0].split("LOSSES")[1])


@pytest.mark.parametrize("kind", ["trainer", "fsdp"])
def test_two_processes_have_the_losses_of_one(kind, tmp_path):
    one = run(kind, tmp_path / "one", 4, 4, ranks=1)
    two = run(kind, tmp_path / "two", 4, 2, ranks=2)
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole = run("trainer", tmp_path / "whole", 4, 4, ranks=1)
    run("trainer", tmp_path / "parts", 2, 4, ranks=1)
    parts = run("trainer", tmp_path / "parts", 4, 2, ranks=2)
    assert len(parts) == 4 and parts == pytest.approx(whole, abs=1e-4)
