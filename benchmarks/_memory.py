"""Peak memory of a piece of work, as anonymous memory (RssAnon) in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# In the processes that measure memory, freed memory goes back to the system at once. By default the C library keeps
# pieces of up to 32 MiB for later, which adds half again to what works in small pieces and nothing to what works in
# large ones, and says nothing about what either needs.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**20))


def anonymous_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """The peak of anonymous memory above what there is now."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak


def in_own_process(function: Callable[..., int], *arguments: Any) -> int:
    """A function of a module, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
