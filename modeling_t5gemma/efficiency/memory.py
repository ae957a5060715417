"""Peak memory of a piece of work, and a process of its own to measure it in."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import UserError

T = TypeVar("T")
_CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: torch.device = _CPU) -> int:
    """The peak above what there was before: of torch's memory on a GPU, of anonymous memory (RssAnon) on a CPU.

    What the process freed before and the C library kept goes back to the system first. Work that finds room there
    would seem to need none.

    Raises:
        UserError: the system does not tell anonymous memory.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    if not _STATUS.exists():
        raise UserError(
            "Peak memory is read from /proc, which this system does not have. Leave it out: t5gemma efficiency "
            "--no-memory."
        )
    _give_back_freed_memory()
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


def in_own_process(function: Callable[..., T], *arguments: Any, for_memory: bool = False) -> T:
    """A function of a module, called in a new process.

    Args:
        for_memory: the process gives freed memory back at once, so that its peak is what it needs. By default the C
            library keeps pieces of up to 32 MiB for later, which adds half again to what works in small pieces and
            nothing to what works in large ones; for times it is what users have.

    Raises:
        UserError: the process was ended from outside.
    """
    before = multiprocessing.active_children()
    with (
        _freed_memory_given_back() if for_memory else nullcontext(),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "The system ended the process that was measured, most likely for want of memory. Ask for less: "
                "shorter inputs, a smaller batch, bfloat16."
            ) from error
        except (KeyboardInterrupt, SystemExit):  # the pool would wait for the work to be done
            for child in set(multiprocessing.active_children()) - set(before):
                child.terminate()
            raise


@contextmanager
def _freed_memory_given_back() -> Iterator[None]:
    """Processes that begin in here give freed memory back at once."""
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


def _give_back_freed_memory() -> None:
    gc.collect()
    with suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _anonymous_bytes() -> int:
    return int(_STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024
