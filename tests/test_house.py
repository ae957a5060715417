"""The house itself: what is promised by its files is there, and imports stay where they belong."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_t5gemma"

# The files that travel with a checkpoint and run where the package is not installed.
HUB_FILES = {
    "attention",
    "blocked_attention",
    "blocks",
    "cache",
    "configuration_t5gemma",
    "cross_attention",
    "dense_attention",
    "flash_attention",
    "flex_attention",
    "labels",
    "layers",
    "losses",
    "masks",
    "modeling_t5gemma",
    "packed_attention",
    "stacks",
}


def house_files() -> list[Path]:
    """Every file that git does not ignore; of a copy without git, all but hidden folders and bytecode."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if listed is not None and listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        files = list(ROOT.rglob("*"))
    folders = {path: path.relative_to(ROOT).parts[:-1] for path in files if path.is_file()}
    return [path for path, parents in folders.items() if not any(p[0] == "." or p == "__pycache__" for p in parents)]


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def requirements(text: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for requirement in requirements((ROOT / name).read_text(encoding="utf-8")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {requirement} is no pin"
        found.setdefault(canonicalize_name(requirement.name), set()).add(specifier.version)
    return found


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "modeling_t5gemma.")]


# Dependencies


def test_floors_are_the_tested_floors():
    config = setup_cfg()
    extras = config["options.extras_require"]
    tested = [
        config["options"]["install_requires"],
        *(
            extras[name]
            for name in ("convert", "docs", "embed", "evaluate", "export", "metrics", "superglue", "test", "train")
        ),
    ]
    floors = {}
    for requirement in (r for text in tested for r in requirements(text) if r.name != "modeling_t5gemma"):
        lowest = [s.version for s in requirement.specifier if s.operator == ">="]
        assert len(lowest) == 1, f"{requirement} has no floor"
        floors[canonicalize_name(requirement.name)] = set(lowest)
    pinned = pins("constraints-floor.txt")
    assert {name: pinned.get(name) for name in floors} == floors


def test_every_dependency_is_pinned_and_allowed():
    config = setup_cfg()
    pinned = pins("constraints.txt")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    for requirement in (r for text in texts for r in requirements(text) if r.name != "modeling_t5gemma"):
        versions = pinned[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), f"{requirement} against {versions}"


# Files


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_pyproject_stays_three_lines():
    assert len((ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()) == 3


def test_ci_is_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


def test_no_absolute_paths_or_addresses_of_a_machine():
    home = re.compile(rb"(?<![\w.~/:$}])/(?:home|mnt|opt|root|srv|tmp|Users|work|workspace)/\w")
    index = re.compile(rb"https?://\S*(?:/simple\b|/whl\b|pythonhosted)|--(?:extra-)?index-url|--find-links")
    here = Path(__file__).resolve()
    for path in house_files():
        if path.resolve() == here:
            continue
        text = path.read_bytes()
        for pattern in (home, index):
            found = pattern.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found[0].decode(errors='replace')!r}"


def test_wheel_carries_every_file_of_the_package(tmp_path: Path):
    source = tmp_path / "source"
    for path in house_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == PACKAGE.name or len(relative.parts) == 1:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / relative)
    build = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, capture_output=True, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("modeling_t5gemma/")}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "t5gemma = modeling_t5gemma.cli:main" in archive.read(entry_points).decode()
    package = source / PACKAGE.name
    written = {path.relative_to(source).as_posix() for path in package.rglob("*") if path.is_file()}
    assert shipped == written


# Imports


def test_every_module_imports():
    for name in modules():
        importlib.import_module(name)


def test_import_brings_in_nothing_that_transformers_own_does_not():
    loaded = "print(json.dumps(sorted(sys.modules)))"
    stock_first = (
        f"from transformers import T5GemmaForConditionalGeneration; {loaded}; import modeling_t5gemma; {loaded}"
    )
    stock, both = map(json.loads, python(f"import json, sys; {stock_first}").splitlines())
    packages = {name.split(".")[0] for name in both} - {name.split(".")[0] for name in stock}
    packages -= {*sys.stdlib_module_names, "modeling_t5gemma"}
    packages -= {"sentencepiece"}  # of AutoTokenizer, which finds the tokenizer of a converted checkpoint by its name
    assert not packages, "transformers' own T5Gemma does without these"
    own = {name.split(".")[1] for name in both if name.startswith("modeling_t5gemma.")}
    own -= {"errors", "pipelines", "text"}  # transformers is told of a pipeline and of a tokenizer
    assert own <= HUB_FILES, "part of the package that only some users need"


@pytest.mark.parametrize("name", sorted(HUB_FILES))
def test_hub_file_imports_hub_files_alone(name: str):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in HUB_FILES, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != PACKAGE.name, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import):
            named = {alias.name.split(".")[0] for alias in node.names}
            assert PACKAGE.name not in named, f"line {node.lineno}: {ast.unparse(node)}"


def test_trainers_keep_to_the_public_names_of_transformers():
    from transformers import Seq2SeqTrainer

    def own(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    def written(kind: type) -> set[str]:
        """Private names that a class defines, or that it reads or writes of anything."""
        nodes = list(ast.walk(ast.parse(inspect.getsource(kind))))
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        return {name for name in defined | {n.attr for n in nodes if isinstance(n, ast.Attribute)} if own(name)}

    theirs = set().union(*(written(kind) for kind in Seq2SeqTrainer.__mro__[:-1]))
    modules = "training.trainer", "post_training.sft", "post_training.dpo", "post_training.grpo", "superglue.trainer"
    kinds = {
        kind
        for name in modules
        for found in vars(importlib.import_module(f"modeling_t5gemma.{name}")).values()
        if isinstance(found, type) and issubclass(found, Seq2SeqTrainer)
        for kind in found.__mro__
        if kind.__module__.startswith("modeling_t5gemma.")
    }
    assert len(kinds) >= 10 and "_save_checkpoint" in theirs
    for kind in kinds:
        assert not written(kind) & theirs, kind


# The tests' own surroundings


def test_network_is_loopback_only():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:  # connecting one sends nothing
        datagram.connect(("127.0.0.1", 9))
        with pytest.raises(RuntimeError, match="this machine only"):
            datagram.connect(("192.0.2.1", 9))
    with pytest.raises(RuntimeError, match="this machine only"):
        socket.getaddrinfo("example.invalid", 443)


def test_hub_is_offline_and_elsewhere(tmp_path: Path):
    from huggingface_hub import constants

    assert constants.is_offline_mode()
    assert Path.home() not in Path(constants.HF_HUB_CACHE).parents


@pytest.mark.loopback
def test_hub_is_online_for_loopback():
    from huggingface_hub import constants

    assert not constants.is_offline_mode()
