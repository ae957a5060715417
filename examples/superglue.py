"""SuperGLUE with a classification head: an encoder-decoder, or the decoder-only baseline, by one command.

    python examples/superglue.py --config examples/configs/superglue.yaml --task all --model MODEL --output superglue
    python examples/superglue.py --config examples/configs/superglue.yaml --task cb,wic --model MODEL --model ORIGINAL
    python examples/superglue.py --compare superglue/MODEL superglue/ORIGINAL --output superglue

Every key of the config can be given on the command line. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from transformers import Seq2SeqTrainingArguments

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.superglue.report import compare, report
from modeling_t5gemma.superglue.run import Settings, Stopped, run_tasks
from modeling_t5gemma.superglue.settings import DataSettings, HeadSettings, How, SpaceSettings
from modeling_t5gemma.superglue.tasks import tasks_named
from modeling_t5gemma.training.script import instantiate, on_this_machine


def parser() -> ArgumentParser:
    """The command line: --config FILE and every key of every section."""
    made = ArgumentParser(
        description=__doc__,
        usage="superglue.py --task TASK --model MODEL [--config FILE] [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    made.add_argument(
        "--task", default="all", help="boolq, cb, copa, multirc, rte, wic, wsc, some with commas, or all"
    )
    made.add_argument("--model", action="append", default=[], help="a folder or Hub repository; may be repeated")
    made.add_argument("--output", default="superglue", help="where a folder for each model is made")
    made.add_argument("--search", type=How, default="grid")
    made.add_argument("--data", type=DataSettings, default=DataSettings())
    made.add_argument("--head", type=HeadSettings, default=HeadSettings())
    made.add_argument("--space", type=SpaceSettings, default=SpaceSettings())
    made.add_argument("--training", type=Seq2SeqTrainingArguments, help="its learning rate, batch and seed are unused")
    made.add_argument("--compare", nargs="+", default=[], help="folders of models that were run, for one table")
    made.set_defaults(on_this_machine())
    return made


def main() -> None:
    """Run; exit code 0 when everything asked for is done, 143 or 130 when a signal ended it before."""
    given = instantiate(parser())
    output = Path(given.output)
    if given.compare:
        output.mkdir(parents=True, exist_ok=True)
        print(compare([Path(folder) for folder in given.compare], output), end="")
        return
    tasks = tasks_named(given.task)
    folders = {path: output / Path(path).name for path in given.model}
    if not folders or len(set(folders.values())) != len(given.model):
        raise UserError(f"--model is {given.model or 'missing'}: give one or several whose last names differ.")
    settings = Settings(given.data, given.head, given.space, given.training, given.search)
    for path, folder in folders.items():
        try:
            run_tasks(path, tasks, settings, folder)
        except Stopped as stopped:
            print(f"Stopped by {stopped.received.name}. The same command goes on from there.")
            sys.exit(128 + stopped.received)
        if given.training.should_save:
            print(f"{path}\n\n{report(folder)}")
    if len(folders) > 1 and given.training.should_save:
        print(compare(list(folders.values()), output), end="")


if __name__ == "__main__":
    run(main)
