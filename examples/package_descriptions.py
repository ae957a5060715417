"""A real summarisation set that needs no login: what Debian's packages say of themselves, and their titles.

    python examples/package_descriptions.py packages

writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` into the folder ``packages``, in a fixed shuffled
order, with the columns

- ``prompt``: the description and a line that asks for the title, for a text-to-text model,
- ``completion``: the title,
- ``description``: the description alone, the document of a retrieval pair whose query is ``completion``,
- ``package``, ``source``: the package's name and that of the source it is built from,

and ``about.json`` with what was read and counted. ``apt-get update`` fetches the lists of the distribution that the
machine's sources name, in English, into a temporary folder; nothing of the machine changes and no rights are needed.
Where there is no apt, download two files of any Debian mirror into a folder and name it with --lists:
``dists/bookworm/main/binary-amd64/Packages.xz`` and ``dists/bookworm/main/i18n/Translation-en.xz``.

What keeps the answers of the test out of the training set: packages that are built from one source, or from two
versions of it (gcc-11, gcc-12), are all on one side, which a hash of the source's name without digits decides. What
other sources copied from each other is looked for as well: a held-out package is left out if the training set has its
title, or half of its description in runs of eight words.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modeling_t5gemma.cli import run
from modeling_t5gemma.errors import UserError

ASKED = "\n\nThe title of this package:\n"
SPLITS = {"test": 0.05, "validation": 0.02}  # of the families; the rest is to train on
RUN = 8  # words
_OPEN: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# They say what happens to an installation, not what a program does.
_NO_CONTENT = re.compile(r"transitional|dummy package|empty package|meta-?package", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """What a package says of itself; ``description`` is without its title."""

    name: str
    source: str
    title: str
    description: str


@dataclass(frozen=True)
class Limits:
    """Which packages are used.

    Attributes:
        description: characters.
        title: characters.
        words: of a title at least.
        per_source: packages built from one source, so that no project is most of the set.
    """

    description: tuple[int, int] = (200, 1200)
    title: tuple[int, int] = (15, 80)
    words: int = 3
    per_source: int = 2


def main(
    output: Annotated[Path, typer.Argument(help="The folder to write into.")],
    lists: Annotated[
        Path | None, typer.Option(help="A folder with Packages and Translation-en files, instead of fetching them.")
    ] = None,
    test: Annotated[int, typer.Option(help="Examples of the test at most.")] = 1000,
    validation: Annotated[int, typer.Option(help="Examples to look at while training, at most.")] = 256,
) -> None:
    """Write Debian's package descriptions and their titles as JSON lines."""
    if lists is not None:
        packages = read_packages(lists)
    else:
        with tempfile.TemporaryDirectory() as folder:
            packages = read_packages(fetch_lists(Path(folder)))
    splits, counts = split(packages, Limits())
    splits["test"], splits["validation"] = splits["test"][:test], splits["validation"][:validation]
    output.mkdir(parents=True, exist_ok=True)
    digests = {name: _write(output / f"{name}.jsonl", map(record, some)) for name, some in splits.items()}
    counts |= {name: len(some) for name, some in splits.items()}
    _write(output / "about.json", [{"counts": counts, "sha256": digests}])
    for what, count in counts.items():
        print(f"{count:7,}  {what}")


def record(package: Package) -> dict[str, str]:
    """A line of the files."""
    return {
        "prompt": package.description + ASKED,
        "completion": package.title,
        "description": package.description,
        "package": package.name,
        "source": package.source,
    }


# Reading


def fetch_lists(folder: Path) -> Path:
    """Let apt fetch the lists of packages into a folder.

    Raises:
        UserError: there is no apt, or it fails.
    """
    if shutil.which("apt-get") is None:
        raise UserError("There is no apt-get here: download lists of packages, and name their folder with --lists.")
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    folder.chmod(0o755)  # apt downloads as a user of its own if it can
    options = {
        "Dir::State": folder,
        "Dir::State::lists": lists,
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
    }
    command = ["apt-get", "update", *(f"-o{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or "no message"
        raise UserError(f"apt-get cannot fetch the lists of packages: {reason}")
    return lists


def read_packages(lists: Path) -> list[Package]:
    """The packages of all lists in a folder that have a description in English.

    Raises:
        UserError: a list is missing or cannot be read.
    """
    sources: dict[str, str] = {}
    for fields in stanzas_of(lists, "Packages"):
        # "Source: name (version)", where it has another name or version than the package
        sources.setdefault(fields["Package"], fields.get("Source", fields["Package"]).split()[0])
    packages: dict[str, Package] = {}
    for fields in stanzas_of(lists, "Translation-en"):
        name = fields["Package"]
        if name in sources and name not in packages:
            packages[name] = Package(name, sources[name], *title_and_description(fields["Description-en"]))
    return list(packages.values())


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The records of a Debian control file, whose fields go on in lines that begin with a space (deb822(5))."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def title_and_description(field: str) -> tuple[str, str]:
    """A description field's first line, and the rest as text.

    Lines of a paragraph are joined; what is indented further stays as it is (Debian policy, section 5.6.13).
    """
    title, *lines = field.split("\n")
    text: list[str] = []
    joins = False
    for line in lines:
        indented = line[1:].startswith((" ", "\t"))
        line = "" if line.strip() == "." else line[1:].rstrip()
        if joins and line and not indented:
            text[-1] += " " + line.strip()
        else:
            text.append(line)
        joins = bool(line) and not indented
    return title.strip(), "\n".join(text).strip()


def stanzas_of(folder: Path, kind: str) -> Iterator[dict[str, str]]:
    """The records of the files of a kind, whichever mirror and suite they are from."""
    files = sorted(path for path in folder.glob("*") if re.fullmatch(rf"(.*_)?{kind}(\.\w+)?", path.name))
    if not files:
        raise UserError(f"{folder} has no {kind} file: it needs Packages and Translation-en, as a mirror has them.")
    for file in files:
        packing = file.name.rpartition(kind)[2]
        if packing not in _OPEN:
            raise UserError(
                f"{file} is packed as {packing}, not as one of {', '.join(filter(None, _OPEN))}: unpack it."
            )
        with _OPEN[packing](file, "rt", encoding="utf-8") as lines:
            yield from stanzas(lines)


# Choosing


def split(packages: Sequence[Package], limits: Limits) -> tuple[dict[str, list[Package]], dict[str, int]]:
    """The packages of each split, in an order that looks random and is always the same; and what was left out.

    Raises:
        UserError: nothing is left to train on.
    """
    counts = {"packages with an English description": len(packages)}
    dropped: Counter[str] = Counter()
    chosen: list[Package] = []
    seen: set[str] = set()
    of_source: Counter[str] = Counter()
    for package in sorted(packages, key=lambda package: _hash(package.name)):
        reason = unusable(package, limits)
        if reason is None and _normal(package.description) in seen:
            reason = "the same description as another package"
        if reason is None and of_source[package.source] == limits.per_source:
            reason = f"more than {limits.per_source} of one source"
        if reason is not None:
            dropped[f"left out: {reason}"] += 1
            continue
        seen.add(_normal(package.description))
        of_source[package.source] += 1
        chosen.append(package)
    splits: dict[str, list[Package]] = {"train": [], **{name: [] for name in SPLITS}}
    for package in chosen:
        splits[split_of(package.source)].append(package)
    if not splits["train"]:
        raise UserError("No package is left to train on. Are these Debian's lists?")
    for name in SPLITS:
        kept = without_copies(splits[name], splits["train"])
        dropped[f"left out of {name}: much of it is in train"] = len(splits[name]) - len(kept)
        splits[name] = kept
    return splits, counts | dict(dropped.most_common())


def unusable(package: Package, limits: Limits) -> str | None:
    """Why a package has nothing to summarise, or None."""
    if _NO_CONTENT.search(package.title) or _NO_CONTENT.search(package.description):
        return "dummy, transitional or metapackage"
    low, high = limits.description
    if not low <= len(package.description) <= high:
        return f"description not of {low} to {high} characters"
    low, high = limits.title
    if not low <= len(package.title) <= high or len(package.title.split()) < limits.words:
        return f"title not of {low} to {high} characters and {limits.words} words"
    return None


def split_of(source: str) -> str:
    """Where the packages of a source belong. Sources that differ in digits alone belong together."""
    place = int(_hash(re.sub(r"[\d.]+", "", source))[:8], 16) / 2**32
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "train"


def without_copies(held_out: Sequence[Package], train: Sequence[Package]) -> list[Package]:
    """The held-out packages whose title, and most of whose description, the training set does not have."""
    titles = {_normal(package.title) for package in train}
    runs = {run for package in train for run in _runs(package.description)}
    kept: list[Package] = []
    for package in held_out:
        own = _runs(package.description)
        if _normal(package.title) not in titles and sum(run in runs for run in own) < len(own) / 2:
            kept.append(package)
    return kept


def _runs(text: str) -> list[int]:
    words = _normal(text).split()
    return [hash(tuple(words[begin : begin + RUN])) for begin in range(max(1, len(words) - RUN + 1))]


def _normal(text: str) -> str:
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines; their SHA-256."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(lines, encoding="utf-8")
    os.replace(partial, path)
    return _hash(lines)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run(app)
