"""The commands of README and of the real task are run as they are printed, one after the other, on tiny models."""

from __future__ import annotations

import concurrent.futures
import io
import json
import random
import runpy
import shutil
import signal
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from modeling_t5gemma import cli
from tests.conversion.tiny import tiny_model
from tests.docs.pages import ROOT, commands
from tests.post_training.chat import assistant, chat_tokenizer, user, words, write
from tests.superglue.parts import FIXTURES

Settings = dict[str, dict[str, object]]

# What makes the runs small; put behind the arguments that are printed.
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "eval_on_start": False, "eval_steps": 1}
TRAINING = {f"training.{key}": value for key, value in STEP.items()}
ANSWERS = {"data.max_source": 40, "data.held_out": 2, **TRAINING}
GENERATED = {"evaluation.generate": 2, "evaluation.max_new_tokens": 4}
README: Settings = {
    "examples/adapt.py": {
        **TRAINING,
        "data.window": 32,
        "data.held_out": 2,
        "training.max_steps": 3,
        "training.save_steps": 1,
        "training.eval_steps": 3,
    },
    "examples/sft.py": {**ANSWERS, "data.max_target": 12, **GENERATED},
    "examples/dpo.py": {**ANSWERS, "data.max_target": 12},
    "examples/grpo.py": {**ANSWERS, "grpo.num_generations": 2, "grpo.max_completion_length": 4},
    "t5gemma chat": {"max-new-tokens": 4},
    "t5gemma evaluate": {"suite": "boolq", "shots": 0, "limit": 4, "data": ROOT / "tests" / "evaluation" / "fixtures"},
    "examples/superglue.py": {
        "task": "cb,copa",
        "data.path": FIXTURES,
        "space": "{learning_rates: [1e-3], batch_sizes: [4], dropouts: [0.1], seeds: [0]}",
        "training.max_steps": 1,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.bf16": False,
    },
}
REAL_TASK: Settings = {
    "examples/package_descriptions.py": {"lists": "lists", "test": 6, "validation": 4},
    "examples/sft.py": {**TRAINING, **GENERATED},
    "examples/compare.py": {"limit": 2, "timed": 1, "new-tokens": 2, "max-target": 4},
    "examples/embed.py": {"training.max_steps": 2, "training.per_device_train_batch_size": 4},
}


def as_downloaded(repository: str, cache: Path) -> Path:
    """The folder of a repository in a cache of the Hub."""
    place, commit = cache / f"models--{repository.replace('/', '--')}", "0123456789" * 4
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A working folder with a clone's scripts."""
    for name in ("convert", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(words: tuple[str, ...]) -> str:
    """What is run: a script, or the program's command."""
    return " ".join(words[:2]) if words[0] == "t5gemma" else words[0]


def run(words: tuple[str, ...], smaller: Settings, monkeypatch, capsys) -> None:
    """A command in this process, as the shell runs a script or the program."""
    handler = signal.getsignal(signal.SIGTERM)
    more = [word for key, value in smaller.get(program(words), {}).items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [*words, *more])
    code: object = 0
    try:
        if words[0] == "t5gemma":
            cli.main()
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert code == 0, f"{' '.join(words)}: {capsys.readouterr().err[-2000:]}"


@pytest.mark.curves
def test_the_commands_of_the_readme(clone, monkeypatch, capsys):
    """The models that it names are in the Hub's cache, the data in the working folder."""
    for name, family, changes in (
        ("gemma-3-1b-pt", "gemma3", {"num_hidden_layers": 1}),
        ("gemma-2-2b", "gemma2", {"num_hidden_layers": 2}),
        ("gemma-2-9b", "gemma2", {"hidden_size": 96}),
    ):
        snapshot = as_downloaded(f"google/{name}", clone / "hub")
        tiny_model(family, max_position_embeddings=2048, **changes).save_pretrained(snapshot)
        chat_tokenizer().save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(clone / "hub"))
    for name in ("text", "TEXT"):  # of the laptop's config, and of README
        (clone / name).mkdir()
        write(clone / name / "text.jsonl", [{"text": "the cat that sat on the mat " * 8} for _ in range(20)])
    write(clone / "DATA.jsonl", words(12))
    pairs = [{**row, "chosen": row["completion"], "rejected": [assistant("zz")]} for row in words(12)]
    write(clone / "PAIRS.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])
    write(clone / "PROMPTS.jsonl", [{"prompt": [user(f"say {n}")], "answer": str(n)} for n in range(12)])
    (clone / "GEMMA_TERMS.html").write_text("Gemma Terms of Use\n\n... Gemma Prohibited Use Policy ...\n")
    ran = set()
    for command in commands(ROOT / "README.md"):
        if command.whole:
            if command.words[0] == "examples/superglue.py":
                shutil.copytree("t5gemma-9b-2b", "t5gemma-2b-2b")  # which README has no line for
            monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n"))  # to chat
            run(command.words, README, monkeypatch, capsys)
            ran.add(program(command.words))
    others = {f"t5gemma {name}" for name in ("convert", "verify", "inspect", "average", "publish", "chat")}
    assert ran >= {*README, *others, "convert/from_gemma2.py"}
    begun = {"adapted": "gemma3-1b-1b", "tuned": "adapted", "preferred": "tuned", "rewarded": "tuned"}
    for name, path in begun.items():
        summary = json.loads((clone / name / "summary.json").read_text())
        assert summary["settings"]["model"]["path"] == path and summary["step"] > 0
        assert (clone / name / "curves.png").is_file()
    for name in ("t5gemma-9b-2b/NOTICE", "tokens/index.json", "adapted-mean/config.json", "superglue/comparison.md"):
        assert (clone / name).is_file(), name


@pytest.mark.needs("sentence_transformers")
def test_the_commands_of_the_real_task(clone, monkeypatch, capsys):
    """Of each loop the first turn, with the decoder-only model beside it; the other seeds are copies."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", _InThisProcess)
    layers = 17  # the last six of which become bidirectional, as printed
    tiny_model("gemma3", max_position_embeddings=2048, num_hidden_layers=layers).save_pretrained("packages-do")
    chat_tokenizer().save_pretrained("packages-do")
    write_lists(clone / "lists", 400)  # of which a few are held out
    for command in commands(ROOT / "examples" / "summarize_packages.md"):
        if not command.whole:
            continue
        if command.words[0] == "examples/compare.py":
            for kind in ("ed", "do"):
                for seed in (1, 2):
                    shutil.copytree(f"runs/{kind}-0", f"runs/{kind}-{seed}")
        run(command.words, REAL_TASK, monkeypatch, capsys)
        if command.words[0] == "examples/sft.py":
            other = tuple(word.replace("packages-ed", "packages-do").replace("ed-0", "do-0") for word in command.words)
            assert other != command.words
            run(other, REAL_TASK, monkeypatch, capsys)
    table = (clone / "compared" / "compared.md").read_text()
    assert "| encoder-decoder | 3 |" in table and "| decoder-only | 3 |" in table
    assert (clone / "embedded" / "retrieval.json").is_file()


class _InThisProcess(concurrent.futures.ThreadPoolExecutor):
    """In place of processes, each of which would import everything again."""

    def __init__(self, workers: int, mp_context: object) -> None:
        super().__init__(workers)


def write_lists(folder: Path, count: int) -> None:
    """Lists of packages as apt has them."""
    draw = random.Random(0)

    def said(length: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(length))

    folder.mkdir()
    # Names that differ in digits alone would be taken for one.
    titles = [(said(1), said(4)) for _ in range(count)]
    records = [f"Package: {name}\nVersion: 1\nDescription: {title}\n" for name, title in titles]
    (folder / "Packages").write_text("\n".join(records))
    described = [f"Package: {name}\nDescription-en: {title}\n {said(32)}\n" for name, title in titles]
    (folder / "Translation-en").write_text("\n".join(described))
