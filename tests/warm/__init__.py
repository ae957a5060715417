"""A ``python`` that has imported torch, transformers and this package before it starts, for tests that need a process.

``WARM_PYTHON`` stands in for ``sys.executable``: ``subprocess.run([WARM_PYTHON, ...])`` runs a script, ``-m module``
or ``-c code`` with the arguments, environment, folder and streams that it is given, and dies of the signals that it is
sent. It is a fork of a server, which the first such process has filled: a fresh interpreter spends five to ten seconds
of CPU time on its imports, a fork a tenth of one. What modules read while they are imported (``HF_ENDPOINT``) is the
server's: a test that sets such a thing, or that is about imports, takes ``sys.executable``. Processes that
``multiprocessing`` starts, in a test or below one, are of this kind. SIGKILL ends the stand-in at once and the program
a moment later: who needs its end reads its output to the end, or kills the program itself, by the id that it prints.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from tests.session import BEGINS_HERE, SESSION

_HERE = Path(__file__).parent
_ADDRESS = SESSION / "socket"
WARM_PYTHON = str(SESSION / "python")


def _start() -> subprocess.Popen:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(_ADDRESS))
        listener.listen(64)
        command = [sys.executable, _HERE / "server.py", str(listener.fileno()), _HERE.parents[1]]
        # Its standard input is open as long as this process is there; Ctrl-C is for its clients.
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
    client = shlex.join([sys.executable, "-I", "-S", str(_HERE / "client.py"), str(_ADDRESS)])
    python = Path(WARM_PYTHON)
    python.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
    python.chmod(0o755)
    return server


if BEGINS_HERE:
    _server = _start()
os.environ["T5GEMMA_TEST_PYTHON"] = WARM_PYTHON
multiprocessing.set_executable(WARM_PYTHON)
