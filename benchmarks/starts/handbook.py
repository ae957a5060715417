"""The English prose of the Debian Administrator's Handbook as a text file.

    python benchmarks/starts/handbook.py handbook.txt                        # fetched with apt-get download
    python benchmarks/starts/handbook.py handbook.txt --html FOLDER          # or from its pages
    python benchmarks/starts/handbook.py handbook.txt --whole                # with titles, lists and listings

The book, in the package debian-handbook, is by Raphaël Hertzog and Roland Mas, under CC BY-SA 3.0 or GPL 2 or later.
Its paragraphs (``<div class="para">``) of more than 60 characters, each once, in the order of the pages' file names;
or everything but navigation, line by line, which is easier to predict.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PAGES = Path("usr/share/doc/debian-handbook/html/en-US")
SHORTEST = 60


class Paragraphs(HTMLParser):
    """Collects the text of the paragraphs, tags left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._depth = 0
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self._depth or dict(attrs).get("class") == "para"):
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._depth:
            self._depth -= 1
            if not self._depth:
                self.found.append(" ".join("".join(self._pieces).split()))
                self._pieces = []

    def handle_data(self, data: str) -> None:
        if self._depth:
            self._pieces.append(data)


class Lines(HTMLParser):
    """Collects the lines of a page as it is laid out, without navigation."""

    BREAKS = frozenset({"br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "li", "p", "pre", "tr"})
    VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = str(dict(attrs).get("class"))
        skip = tag in ("head", "script", "style") or kind.startswith("docnav") or kind == "toc"
        if tag not in self.VOID and (self._skipped or skip):
            self._skipped += 1
        if tag in self.BREAKS:
            self.found.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag not in self.VOID:
            self._skipped -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.found.append(data)


def whole(folder: Path) -> list[str]:
    pages = []
    for page in sorted(folder.glob("*.html")):
        parser = Lines()
        parser.feed(page.read_text(encoding="utf-8"))
        lines = (" ".join(line.split()) for line in "".join(parser.found).split("\n"))
        pages.append("\n".join(line for line in lines if line))
    return pages


def prose(folder: Path) -> list[str]:
    found: dict[str, None] = {}
    for page in sorted(folder.glob("*.html")):
        parser = Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        found |= {text: None for text in parser.found if len(text) > SHORTEST}
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--html", type=Path, help="a folder of the book's pages")
    parser.add_argument("--whole", action="store_true", help="titles, lists and listings too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.html is None:
            for command in (["apt-get", "download", "debian-handbook"], ["sh", "-c", "dpkg -x *.deb ."]):
                subprocess.run(command, cwd=scratch, check=True)
        pieces = (whole if given.whole else prose)(given.html or Path(scratch) / PAGES)
    if not pieces:
        sys.exit(f"{given.html or PAGES} has no pages of the book.")
    given.output.write_text("\n\n".join(pieces), encoding="utf-8")
    unit = "pages" if given.whole else "paragraphs"
    print(f"{given.output}: {len(pieces)} {unit}, {sum(map(len, pieces))} characters")


if __name__ == "__main__":
    main()
