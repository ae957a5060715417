"""Jobs and their results: a file each, so that a stopped benchmark goes on and a finished job is not run again.

In the output folder: ``text/``; for each seed a folder ``seed0/`` with the decoder-only checkpoints ``large/`` and
``small/``; and the result of each job as ``seed0/NAME.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from .arms import ARMS, Arm
from .sizes import Sizes

LARGE, SMALL = "large", "small"
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every job of an output folder is run with.

    Attributes:
        precision: "bfloat16" or "float32", of the matrix products.
    """

    sizes: Sizes
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype


@dataclass(frozen=True)
class Job:
    """A pretraining ("large" or "small") or an arm, of one seed."""

    name: str
    seed: int

    @property
    def arm(self) -> Arm | None:
        return ARMS.get(self.name)

    def folder(self, output: Path) -> Path:
        return output / f"seed{self.seed}"

    def path(self, output: Path) -> Path:
        return self.folder(output) / f"{self.name}.json"

    def wanted(self, settings: Settings) -> dict[str, Any]:
        """What decides its result, as JSON has it."""
        arm = None if self.arm is None else asdict(self.arm)
        made: dict[str, Any] = json.loads(json.dumps({**asdict(settings), "arm": arm}))
        return made


def result_of(job: Job, output: Path, settings: Settings) -> Result | None:
    """The result of a job if it is finished, with these settings."""
    try:
        held = json.loads(job.path(output).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return held["result"] if held["wanted"] == job.wanted(settings) else None


def finish(job: Job, output: Path, settings: Settings, result: Result) -> None:
    """Write a result, whole or not at all."""
    path = job.path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps({"wanted": job.wanted(settings), "result": result}) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_all(jobs: Sequence[Job], run: Callable[..., Result], output: Path, settings: Settings, workers: int) -> None:
    """Run those that are not finished, in processes of one thread each, the first of the sequence first."""
    left = [job for job in jobs if result_of(job, output, settings) is None]
    if not left:
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin) as pool:
        began = time.monotonic()
        futures = {pool.submit(_run, run, job, output, settings): job for job in left}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                job, seconds = futures[future], future.result()
                print(
                    f"{time.monotonic() - began:6.0f} s  {number} of {len(left)}: seed {job.seed}, {job.name}, "
                    f"{seconds:.0f} s of CPU",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """One thread, and no bar for every small checkpoint that is read or written."""
    torch.set_num_threads(1)
    disable_progress_bar()


def _run(run: Callable[..., Result], job: Job, output: Path, settings: Settings) -> float:
    """Run a job in a scratch folder of its own, and keep its result. CPU seconds."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(job, output, settings, Path(scratch))
    seconds = time.process_time() - began
    finish(job, output, settings, {**result, "cpu_seconds": round(seconds, 1)})
    return seconds


def keep(model: Any, folder: Path) -> None:
    """Save a checkpoint in a folder that appears whole."""
    partial = folder.with_name(f".{folder.name}")
    for each in (partial, folder):
        shutil.rmtree(each, ignore_errors=True)
    model.save_pretrained(partial)
    os.replace(partial, folder)
