"""Peak memory of a piece of work, and a process of its own to measure it in."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import UserError

T = TypeVar("T")
_STATUS = Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The peak above what there was before: of torch's memory on a GPU, of anonymous memory (RssAnon) on a CPU.

    Raises:
        UserError: the system does not tell anonymous memory.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    if not _STATUS.exists():
        raise UserError("Peak memory is read from /proc, which this system does not have. Give --no-memory.")
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """A function of a module, called in a new process.

    Raises:
        UserError: the process was ended from outside.
    """
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "The system ended the process that was measured, most likely for want of memory. Ask for less: "
                "--input, --batch, --dtype bfloat16."
            ) from error
        except (KeyboardInterrupt, SystemExit):  # the pool would wait for the work to be done
            for child in set(multiprocessing.active_children()) - set(before):
                child.terminate()
            raise


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """New processes give freed memory back at once, so that their peak is what they need."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(2**20)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _anonymous_bytes() -> int:
    return int(_STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024
