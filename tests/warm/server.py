"""``python server.py DESCRIPTOR ROOT``: fork a process that has imported everything for each client of a socket.

Ends when its standard input does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import types

# Others' modules that programs import once they have read their options.
LATE = ("accelerate.commands.launch", "datasets", "matplotlib.pyplot", "torch.distributed.run")
# Read while modules are imported, where some of it is set as well. Each worker of the tests has an HF_HOME of its own.
READ_ONCE = ("HF_", "OMP_", "PYTHONPATH", "TRANSFORMERS_")
ENVIRONMENT = dict(os.environ)


def load(root: str) -> None:
    """Import what programs do. A thread would not be in the forks, so there may be none."""
    sys.path[0] = root
    package = importlib.import_module("modeling_t5gemma")
    modules = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for name in (*modules, *LATE):
        importlib.import_module(name)
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # so that forks go on sharing its pages


def serve(descriptor: str, root: str) -> list[str]:
    """Returns the arguments of a program, in the process that is to run it and in no other."""
    with socket.socket(fileno=int(descriptor)) as listener:
        loaded = False
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not loaded:
                load(root)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who attend
                loaded = True
            if os.fork() == 0:
                break
            connection.close()
        else:
            os._exit(0)
    return attend(connection)


def attend(connection: socket.socket) -> list[str]:
    """Fork a client's program, pass the client's signals on to it, and its end to the client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 250)
    request = json.loads(connection.recv(*struct.unpack("I", size), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        return become(descriptors, **request)
    for descriptor in descriptors:
        os.close(descriptor)

    def relay() -> None:
        with contextlib.suppress(ProcessLookupError):
            while sent := connection.recv(1):
                os.kill(pid, sent[0])
            os.kill(pid, signal.SIGKILL)  # as the client was

    threading.Thread(target=relay, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def become(descriptors: list[int], numbers: list[int], argv: list[str], env: dict[str, str], cwd: str) -> list[str]:
    """Take over what the client was given: open files under their numbers, environment and folder."""
    above = max(numbers) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in descriptors]
    for number, descriptor in zip(numbers, moved, strict=True):
        os.dup2(descriptor, number)
    for descriptor in {*descriptors, *moved} - {*numbers}:
        os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffering = 1 if name == "stderr" or env.get("PYTHONUNBUFFERED") else -1
        stream = open(number, "w" if number else "r", buffering, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for name in sorted(env.keys() | ENVIRONMENT.keys()):
        known = env.get(name) in (ENVIRONMENT.get(name), os.environ.get(name)) or name == "HF_HOME"
        if name.startswith(READ_ONCE) and not known:
            raise SystemExit(f"{name} has been read already: take sys.executable instead of WARM_PYTHON")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_executable(env["T5GEMMA_TEST_PYTHON"])
    return argv


def run(argv: list[str]) -> None:
    """As the interpreter does it."""
    first, *rest = argv
    if first in ("-B", "-u"):
        run(rest)
    elif first == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def program() -> int:
    """The exit code of what was asked for."""
    try:
        run(serve(*sys.argv[1:]))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave() -> None:
    """In place of taking apart all that was imported, which takes a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    atexit.register(leave)  # the first one, so that it is called last
    code = program()
