"""The site is built without a warning, from files alone, and everything in it leads somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import modeling_t5gemma
from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links, name_of


class Page(HTMLParser):
    """Of a page of the site: its anchors, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag in ("img", "link", "script") and (target := given.get("src") or given.get("href")):
            self.loads.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of a strict build, by path."""
    home = tmp_path_factory.mktemp("site")
    for name in ("zensical.toml", "README.md"):
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "docs", home / "docs")
    (home / "modeling_t5gemma").symlink_to(ROOT / "modeling_t5gemma")
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.resolve(): Page(path) for path in (home / "site").rglob("*.html")}
    assert len(pages) > len(DOCS)
    return pages


def test_links_and_anchors_lead_somewhere(site: dict[Path, Page]):
    for path, page in site.items():
        if path.name == "404.html":  # served for any address, so it names none
            continue
        for target in (*page.links, *page.loads):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path.name}: {target}"
            if url.fragment and there in site:
                assert unquote(url.fragment) in site[there].anchors, f"{path.name}: {target}"


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]):
    for path, page in site.items():
        assert not [target for target in page.loads if urlsplit(target).netloc], path.name


def test_every_page_is_in_the_navigation():
    text = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    listed = re.findall(r'= "([\w-]+\.md)"', text)
    assert sorted(listed) == [path.name for path in DOCS]


def test_every_public_name_is_in_the_reference(site: dict[Path, Page]):
    (reference,) = (page for path, page in site.items() if path.name == "api.html")
    missing = {f"modeling_t5gemma.{name}" for name in modeling_t5gemma.__all__} - reference.anchors
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_the_repository_lead_somewhere(page: Path):
    """Read where they are, without the site."""
    for target in links(page):
        url = urlsplit(target)
        if url.scheme:
            continue
        there = (page.parent / url.path).resolve() if url.path else page
        assert there.exists(), f"{name_of(page)}: {target}"
        if url.fragment:
            assert url.fragment in anchors(there), f"{name_of(page)}: {target}"
