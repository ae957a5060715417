"""examples/package_descriptions.py: reading lists, choosing, keeping the test out of the training set."""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_t5gemma.errors import UserError

ROOT = Path(__file__).parents[1]
LIMITS = {"description": (20, 400), "title": (5, 60), "words": 2, "per_source": 2}

PACKAGES = """\
Package: bear
Version: 1.0
Description: hunts in the woods

Package: bear-data
Source: bear (1.0+b1)
Tag: role::app-data,
 use::gameplaying
Description: hunts in the woods (data)

Package: only-here
Version: 2
"""
TRANSLATION = """\
Package: bear
Description-md5: 00
Description-en: hunts in the woods: a game
 A bear has no
 fish. Sixteen rivers
 have some.
 .
 Its rules:
  * one fish
    a day
  * no bees
 Those are all.

Package: bear-data
Description-en: hunts in the woods (data)
 The maps.

Package: of-another-architecture
Description-en: something else
 Which Packages does not have.
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "package_descriptions", ROOT / "examples" / "package_descriptions.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["package_descriptions"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lists(tmp_path) -> Path:
    """As a mirror has one of them, and apt the other; and a translation that is not asked for."""
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "Packages.xz").write_bytes(lzma.compress(PACKAGES.encode()))
    (folder / "a.mirror.org_debian_dists_some_main_i18n_Translation-en").write_text(TRANSLATION)
    (folder / "a.mirror.org_debian_dists_some_main_i18n_Translation-en_GB").write_text(
        "Package: tea\nDescription: x\n"
    )
    return folder


def packages(script, count: int, seed: int = 0) -> list:
    """Distinct packages, some of one source."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]

    def word() -> str:
        return "".join(rng.choices(syllables, k=4))

    made = []
    for number in range(count):
        title, description = (" ".join(word() for _ in range(length)) for length in (3, 24))
        made.append(script.Package(f"package{number}", word() if number % 3 else "shared", title, description))
    return made


def test_paragraphs_are_joined_and_lists_kept(script, lists):
    bear, data = script.read_packages(lists)
    assert (bear.name, bear.source, bear.title) == ("bear", "bear", "hunts in the woods: a game")
    assert bear.description == (
        "A bear has no fish. Sixteen rivers have some.\n\n"
        "Its rules:\n * one fish\n   a day\n * no bees\nThose are all."
    )
    assert (data.name, data.source, data.description) == ("bear-data", "bear", "The maps.")
    record = script.record(bear)
    assert record["prompt"] == bear.description + script.ASKED and record["completion"] == bear.title


def test_versions_of_a_source_stay_together(script):
    assert len({script.split_of(f"gcc-{version}-cross") for version in ("9", "10", "11.2", "12")}) == 1
    places = [script.split_of(package.source) for package in packages(script, 3000)]
    assert 0.02 < places.count("test") / len(places) < 0.08
    assert 0.005 < places.count("validation") / len(places) < 0.04


def test_a_split_is_the_same_whatever_order_packages_come_in(script):
    given = packages(script, 900)
    limits = script.Limits(**LIMITS)
    splits, counts = script.split(given, limits)
    assert script.split(given[::-1], limits) == (splits, counts)
    for name, some in splits.items():
        assert some and all(script.split_of(package.source) == name for package in some)
    names = [package.name for some in splits.values() for package in some]
    assert len(names) == len(set(names))
    everything = [package for some in splits.values() for package in some]
    assert sum(package.source == "shared" for package in everything) == LIMITS["per_source"]
    left_out = sum(count for what, count in counts.items() if what.startswith("left out"))
    assert len(names) + left_out == counts["packages with an English description"] == 900


def test_what_is_copied_into_the_training_set_is_not_tested(script):
    given = packages(script, 40)
    held_out, train = given[:4], given[4:]
    words = held_out[1].description.split()
    copied = " ".join(words[:20] + train[0].description.split())  # 13 of 17 runs of 8 words
    train.append(script.Package("copy", "x", "another title", copied))
    train.append(script.Package("named", "y", held_out[2].title.upper() + " 2", "something else"))
    assert script.without_copies(held_out, train) == [held_out[0], held_out[3]]
    some = " ".join(words[:12] + train[0].description.split())  # 5 of 17
    assert script.without_copies(held_out[1:2], [script.Package("part", "x", "another title", some)]) == held_out[1:2]


@pytest.mark.parametrize(
    ("title", "description", "reason"),
    [
        ("fine title", "long enough to be used", None),
        ("fine title (transitional package)", "long enough to be used", "transitional"),
        ("fine title", "This Metapackage installs the others", "metapackage"),
        ("fine title", "short", "description not of"),
        ("fine title", "much too long " * 40, "description not of"),
        ("title", "long enough to be used", "title not of"),
        ("a b", "long enough to be used", "title not of"),
    ],
)
def test_packages_without_content_are_left_out(script, title, description, reason):
    found = script.unusable(script.Package("name", "source", title, description), script.Limits(**LIMITS))
    assert found is None if reason is None else reason in found


def test_equal_descriptions_count_once(script):
    given = packages(script, 300)
    doubled = script.Package("zz", "elsewhere", "quite another title", given[1].description + " 2")
    splits, _ = script.split([*given, doubled], script.Limits(**LIMITS))
    descriptions = [package.description.removesuffix(" 2") for some in splits.values() for package in some]
    assert len(descriptions) == len(set(descriptions))


def test_the_script_writes_what_it_says(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "read_packages", lambda lists: packages(script, 900))
    limits = script.Limits(**LIMITS)
    monkeypatch.setattr(script, "Limits", lambda: limits)
    script.main(tmp_path / "out", lists=tmp_path, test=5, validation=3)
    lines = {file.stem: file.read_text().splitlines() for file in (tmp_path / "out").glob("*.jsonl")}
    assert {name: len(some) for name, some in lines.items()}.items() >= {"test": 5, "validation": 3}.items()
    assert list(json.loads(lines["train"][0])) == ["prompt", "completion", "description", "package", "source"]
    counts = json.loads((tmp_path / "out" / "about.json").read_text())["counts"]
    assert counts["train"] == len(lines["train"]) and f"{counts['train']:,}  train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("Packages", "has no Translation-en file"), ("Packages.zst", "packed as .zst, not as one of .gz, .xz, .bz2")],
)
def test_missing_and_unreadable_lists_are_told(script, tmp_path, name, message):
    (tmp_path / name).write_text(PACKAGES)
    with pytest.raises(UserError, match=message):
        script.read_packages(tmp_path)


def test_apt_that_fails_is_told(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no apt-get here.*--lists"):
        script.fetch_lists(tmp_path / "a")
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    asked: list[str] = []

    def failing(command, **kwargs):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 100, "", "E: nobody\nanswers\n")

    monkeypatch.setattr(script.subprocess, "run", failing)
    with pytest.raises(UserError, match="cannot fetch the lists of packages: E: nobody answers"):
        script.fetch_lists(tmp_path / "b")
    assert asked[:2] == ["apt-get", "update"] and f"-oDir::State={tmp_path / 'b'}" in asked
