"""The Markdown of the documentation: its code blocks, the commands and names in it, its links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
# The template of model cards is none of them: its blanks are filled before anyone reads it.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").glob("*.md"))]

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MARK = re.compile(r"<!-- not run: \S.*? -->\s*\Z", re.DOTALL)
SHELL = ("", "sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word behind the fence.
        line: of the page, where the code begins.
        not_run: a comment before it says why it cannot be run.
    """

    page: Path
    language: str
    code: str
    line: int
    not_run: bool

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of a shell block, or as much of one as prose mentions."""

    page: Path
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            match[1].strip(),
            match[2],
            text.count("\n", 0, match.start(2)) + 1,
            _MARK.search(text, 0, match.start()) is not None,
        )
        for match in _FENCE.finditer(text)
    ]


def inline_code(page: Path) -> list[str]:
    return _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """The targets of links and images, code left out."""
    return _LINK.findall(_INLINE.sub("", _FENCE.sub("", page.read_text(encoding="utf-8"))))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[Command]:
    """Every command that begins with a program of this repository."""
    for block in blocks(page):
        if block.language in SHELL:
            for line in _lines(block.code):
                if words := _program(shlex.split(line, comments=True)):
                    yield Command(page, words, whole=True)
    for code in inline_code(page):
        if code.startswith(("t5gemma ", "python ")) and (words := _program(shlex.split(code))):
            yield Command(page, words, whole=False)


def _lines(code: str) -> Iterator[str]:
    """Command lines, continued ones joined, the variable of a loop replaced by its first value."""
    values: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        if loop := re.match(r"\s*for (\w+) in (\S+)", line):
            values[loop[1]] = loop[2]
        line = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), line.strip())
        if line.startswith(("t5gemma ", "python ", "accelerate launch ")):
            yield line


def _program(words: list[str]) -> tuple[str, ...]:
    """The words from the program's name or script on; () for a program that is none of ours."""
    if words[0] == "t5gemma":
        return tuple(words)
    ours = re.compile(r"(benchmarks|convert|examples)/\S+\.py")
    scripts = [place for place, word in enumerate(words) if ours.fullmatch(word)]
    return tuple(words[scripts[0] :]) if scripts else ()
