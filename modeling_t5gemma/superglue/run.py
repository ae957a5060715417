"""SuperGLUE for one checkpoint: each task's search, its seeds, its predictions.

``OUTPUT/TASK/SETTING/result.json`` is written when a trial is over. The same command passes over trials that have one,
and goes on with one that was stopped where its last complete checkpoint is.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from ..errors import UserError
from ..training.checkpoints import complete_checkpoints, find
from ..training.checks import check_settings
from ..training.examples import steps_of
from ..training.resumable import Diverged
from .data import Example, encode, has_test_split, read_cases
from .models import Checkpoint
from .search import Setting, check_space, search
from .settings import DataSettings, HeadSettings, How, SpaceSettings
from .submission import submission
from .tasks import Task
from .trainer import ClassificationTrainer

RUN_FILE, TASK_FILE, RESULT_FILE = "run.json", "task.json", "result.json"


class Stopped(Exception):
    """A signal ended a trial after a step; its checkpoint is saved.

    Attributes:
        received: the signal.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


@dataclass
class Settings:
    """All sections of a config file. ``training`` has the keys of transformers' ``Seq2SeqTrainingArguments``; its
    learning rate, batch size and seed are those of the space."""

    data: DataSettings
    head: HeadSettings
    space: SpaceSettings
    training: TrainingArguments
    search: How


def run_tasks(path: str, tasks: Sequence[Task], settings: Settings, output: Path) -> None:
    """Search, tune and predict; ``output/TASK/task.json`` says what came out.

    Args:
        path: the checkpoint.

    Raises:
        UserError: something in the settings cannot be used. The folder of a run with other settings is refused.
        Stopped: a signal ended it; the same call goes on from there.
    """
    check_settings(settings)
    check_space(settings.space)
    for size in settings.space.batch_sizes:
        _per_device(size, settings.training)
    checkpoint = Checkpoint.of(path, settings.head, settings.data)
    _claim(output, path, settings)
    for task in tasks:
        _TaskRun(checkpoint, task, settings, output / task.name).run()


@dataclass(frozen=True)
class Examples:
    """A task's data as tokens."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    cut: dict[str, int]

    @classmethod
    def read(cls, checkpoint: Checkpoint, task: Task, data: DataSettings) -> Examples:
        splits: dict[str, list[Example]] = {"test": []}
        cut = {}
        for split in ("train", "val", *(["test"] if data.test and has_test_split(data.path, task) else [])):
            cases = read_cases(data.path, task, split, data.revision)
            splits[split], cut[split] = encode(cases, checkpoint.form)
        return cls(**splits, cut=cut)


class _TaskRun:
    """One task: the search with the first seed, then the chosen setting with the others."""

    def __init__(self, checkpoint: Checkpoint, task: Task, settings: Settings, folder: Path) -> None:
        self.checkpoint, self.task, self.settings, self.folder = checkpoint, task, settings, folder
        self.writes = settings.training.should_save
        with settings.training.main_process_first(local=False, desc="reading"):
            self.examples = Examples.read(checkpoint, task, settings.data)
        if self.writes:
            for split, count in self.examples.cut.items():
                if count:
                    total = len(getattr(self.examples, split))
                    self._tell(f"cut {count} of {total} {split} examples to {checkpoint.form.max_length} tokens")

    def run(self) -> None:
        space = self.settings.space

        def attempt(setting: Setting) -> float | None:
            result = self._trial(setting, space.seeds[0])
            return None if "failed" in result else float(result["metrics"]["accuracy"])

        chosen = search(self.settings.search, space, attempt, self.folder)
        results = {seed: self._trial(chosen, seed) for seed in space.seeds}
        good = {seed: result["metrics"] for seed, result in results.items() if "failed" not in result}
        best = max(good, key=lambda seed: good[seed]["accuracy"])
        if self.writes:
            made = {
                "setting": asdict(chosen),
                "seeds": {str(seed): metrics for seed, metrics in good.items()},
                "failed_seeds": [seed for seed in space.seeds if seed not in good],
                "best_trial": chosen.name(best),
                "search": self.settings.search,
                "trials": sum(1 for _ in self.folder.glob(f"*/{RESULT_FILE}")),
                "examples": {name: len(getattr(self.examples, name)) for name in ("train", "val", "test")},
                "cut": self.examples.cut,
            }
            write(self.folder / TASK_FILE, json.dumps(made, indent=2) + "\n")

    def _trial(self, setting: Setting, seed: int) -> dict[str, Any]:
        """The result of a trial, which is trained unless it is there."""
        folder = self.folder / setting.name(seed)
        path = folder / RESULT_FILE
        if not path.is_file():
            self._train(setting, seed, folder)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.writes:
            # Only now: a kill before the result finds them.
            for checkpoint in [*complete_checkpoints(folder), *find(folder).cut_short]:
                shutil.rmtree(checkpoint)
            write(self.folder / "trials.csv", _table(self.folder))
        return result

    def _train(self, setting: Setting, seed: int, folder: Path) -> None:
        begin = time.perf_counter()
        trainer = self._trainer(setting, seed, folder)
        result: dict[str, Any] = {"setting": asdict(setting), "seed": seed, "steps": trainer.args.max_steps}
        try:
            self._finish(trainer)
        except Diverged as error:
            result["failed"] = str(error)
        else:
            for split in ("val", "test"):
                if examples := getattr(self.examples, split):
                    scores = trainer.predict_scores(examples)
                    if split == "val":
                        result["metrics"] = trainer.metrics(examples, scores)
                    if self.writes:
                        keys = [example.key for example in examples]
                        lines = submission(self.task, keys, scores.argmax(axis=1).tolist())
                        write(folder / split / f"{self.task.folder}.jsonl", lines)
        result["seconds"] = round(time.perf_counter() - begin, 1)
        if self.writes:
            write(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
            outcome = "failed" if "failed" in result else f"dev accuracy {result['metrics']['accuracy']:.3f}"
            self._tell(f"{folder.name}: {outcome}")
        trainer.accelerator.wait_for_everyone()

    def _finish(self, trainer: ClassificationTrainer) -> None:
        trainer.train(resume_from_checkpoint=True)
        if (received := trainer.signals.received) is not None:
            raise Stopped(received)

    def _trainer(self, setting: Setting, seed: int, folder: Path) -> ClassificationTrainer:
        args = copy.copy(self.settings.training)
        args.output_dir, args.run_name = str(folder), f"{self.task.name}_{folder.name}"
        args.learning_rate, args.seed = setting.learning_rate, seed
        args.per_device_train_batch_size = _per_device(setting.batch_size, args)
        args.max_steps = steps_of(args, len(self.examples.train))
        model: PreTrainedModel = self.checkpoint.load(self.task, setting.dropout, seed)
        return ClassificationTrainer(
            model,
            args,
            task=self.task,
            train=self.examples.train,
            held_out=self.examples.val,
            checkpoint=self.checkpoint,
            describe={"task": self.task.name, **asdict(setting), "seed": seed, "model": self.checkpoint.path},
            processing_class=self.checkpoint.form.tokenizer,
        )

    def _tell(self, line: str) -> None:
        if not self.settings.training.disable_tqdm:
            tqdm.write(f"{self.task.name}: {line}")


def _per_device(batch_size: int, args: TrainingArguments) -> int:
    """The part of a batch that a device reads at once.

    Raises:
        UserError: it is no whole number.
    """
    parts = args.world_size * args.gradient_accumulation_steps
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} cannot be divided among {args.world_size} processes with "
            f"{args.gradient_accumulation_steps} accumulation steps: give space.batch_sizes that are multiples of "
            f"{parts}."
        )
    return batch_size // parts


# The training settings that decide what a trial computes, beside those of the space.
_DECIDING = (
    "num_train_epochs", "max_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16",
)  # fmt: skip


def _claim(output: Path, path: str, settings: Settings) -> None:
    """Mark a folder as this run's; what is searched may grow.

    Raises:
        UserError: it holds trials of a run with other settings.
    """
    given = {
        "model": path,
        "data": {name: value for name, value in asdict(settings.data).items() if name != "test"},
        "head": asdict(settings.head),
        "training": {name: getattr(settings.training, name) for name in _DECIDING},
    }
    wanted = json.loads(json.dumps(given, default=str))
    file = output / RUN_FILE
    if file.exists() and (any(output.glob(f"*/*/{RESULT_FILE}")) or any(output.glob("*/*/checkpoint-*"))):
        held = json.loads(file.read_text(encoding="utf-8"))
        changed = [] if held["model"] == path else ["model"]
        for section in ("data", "head", "training"):
            before = held[section]
            changed += [f"{section}.{key}" for key, value in wanted[section].items() if before.get(key) != value]
        if changed:
            raise UserError(
                f"{output} holds trials with another {', '.join(changed)}. Give another --output, or remove this one."
            )
    if settings.training.should_save:
        write(file, json.dumps(wanted, indent=2) + "\n")


def _table(folder: Path) -> str:
    """All trials of a task as CSV, the best first."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*/{RESULT_FILE}")]
    metrics = sorted({name for result in results for name in result.get("metrics", {})})
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["learning_rate", "batch_size", "dropout", "seed", "steps", "seconds", *metrics, "failed"])

    def rank(result: dict[str, Any]) -> tuple[float, list[float]]:
        return -result.get("metrics", {}).get("accuracy", -1), [*result["setting"].values(), result["seed"]]

    for result in sorted(results, key=rank):
        values = [result.get("metrics", {}).get(name, "") for name in metrics]
        row = [*result["setting"].values(), result["seed"], result["steps"], result["seconds"]]
        table.writerow([*row, *values, result.get("failed", "")])
    return out.getvalue()


def write(path: Path, text: str) -> None:
    """Replace a file in one step; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
