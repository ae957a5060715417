"""What the documentation tells people to type: blocks run, commands are parsed by their programs, names exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from modeling_t5gemma.objectives import schedule_from
from tests.conversion.tiny import save_tokenizer, tiny_model
from tests.docs import programs
from tests.docs.pages import PAGES, ROOT, SHELL, Block, Command, blocks, commands, inline_code, name_of
from tests.test_house import setup_cfg

PYTHON = {page: [block for block in blocks(page) if block.language == "python"] for page in PAGES}
COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random stand-in for the checkpoint that the README converts."""
    from modeling_t5gemma.conversion.convert import carry_out, prepare
    from modeling_t5gemma.conversion.options import ConversionOptions

    source, folder = (tmp_path_factory.mktemp("docs") / name for name in ("source", "gemma3-1b-1b"))
    tiny_model("gemma3").save_pretrained(source)
    save_tokenizer(source)
    carry_out(prepare(ConversionOptions(str(source), str(source), folder, cross_attention="layerwise")))
    return folder


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found], ids=name_of)
def test_python_blocks_run(page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the top of a page to its end in one namespace; but for those marked ``<!-- not run: why -->``."""
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in PYTHON[page]:
        if not block.not_run:
            # Empty lines before it, so that a traceback has the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path):
    """Python in a block that is not called so would not be run."""

    def is_python(block: Block) -> bool:
        return re.search(r"^(import \w+|from \w[\w.]* import )", block.code, re.MULTILINE) is not None

    for block in blocks(page):
        assert block.language in ("python", "yaml", "text", *SHELL), f"{block}: {block.language}"
        called_so = block.language in ("python", "text") or "<<" in block.code  # a shell may be told a script
        assert called_so or not is_python(block), f"{block} is Python"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """By the program's own parser, without running it. Prose may leave out what is required, and nothing else."""
    monkeypatch.chdir(ROOT)  # the config files that commands name are relative to it
    try:
        programs.parse(command.words)
    except SystemExit as refused:
        said = capsys.readouterr().err
        assert not command.whole and re.search(r"[Mm]issing|required", said), f"{refused.code}: {said}"
        named = {word.partition("=")[0] for word in command.words if word.startswith("--")}
        first, *rest = command.words
        parser = programs.subcommands()[rest[0]] if first == "t5gemma" else programs.parser_of(first)
        assert named <= programs.options_of(parser)


def test_options_in_prose_exist():
    """Of some program that the pages name; of a key of a section (``--lora.rank``) the section."""
    scripts = {command.words[0] for command in COMMANDS if command.words[0] != "t5gemma"}
    parsers = [*programs.subcommands().values(), *map(programs.parser_of, sorted(scripts))]
    known = set().union(*map(programs.options_of, parsers))
    for page in PAGES:
        for code in inline_code(page):
            if option := re.match(r"--[a-z][\w.-]*", code):
                exact, section = option[0], option[0].partition(".")[0]
                assert exact in known or (section != exact and section in known), f"{name_of(page)}: {code}"


def test_files_and_names_in_code_exist():
    path = re.compile(r"(benchmarks|convert|docs|examples|modeling_t5gemma|tests)/[\w./-]*\w")
    module = re.compile(r"modeling_t5gemma((?:\.\w+)+)")
    for page in PAGES:
        for code in inline_code(page):
            if path.fullmatch(code):
                assert (ROOT / code).exists(), f"{name_of(page)} names {code}"
            if found := module.fullmatch(code):
                home = ROOT / "modeling_t5gemma" / found[1][1:].replace(".", "/")
                places = (home, home.with_suffix(".py"), home.parent, home.parent.with_suffix(".py"))
                assert any(place.exists() for place in places), f"{name_of(page)} names {code}"


def test_extras_and_make_targets_exist():
    extras = set(setup_cfg()["options.extras_require"])
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        asked = ",".join(re.findall(r"(?:modeling_t5gemma|'\.)\[([\w,]+)\]", text))
        assert set(filter(None, asked.split(","))) <= extras, name_of(page)
        code = "\n".join([*(block.code for block in blocks(page)), *inline_code(page)])
        made = set(re.findall(r"^\s*make ([a-z][a-z-]*)", code, re.MULTILINE))
        assert made <= targets, name_of(page)


def test_yaml_blocks_are_configs():
    """They parse, and each objective that is shown is one."""
    shown = [(block, line) for page in PAGES for block in blocks(page) if block.language == "yaml"
             for line in block.code.splitlines() if line.startswith("objective: ")]  # fmt: skip
    assert shown
    for block, line in shown:
        spec = yaml.safe_load(line)["objective"]
        assert schedule_from(spec, range(7, 106), eos=1).stages, f"{block}: {line}"
    for page in PAGES:
        for block in blocks(page):
            assert block.language != "yaml" or yaml.safe_load(block.code), block
