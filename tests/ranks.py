"""A module's ``main`` in the processes of a distributed run."""

from __future__ import annotations

import os
import socket
import subprocess

from tests.warm import WARM_PYTHON


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(ranks: int, module: str, *arguments: object) -> list[str]:
    """What each process of ``python -m module`` wrote; Gloo joins them where there are several."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [WARM_PYTHON, "-m", module, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment | own, **pipes))
    results = [process.communicate(timeout=400) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in results]
