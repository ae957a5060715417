"""Names that a user may give for a result, and disks that are full, each told in one line before or after the work."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from modeling_t5gemma.commands.outputs import make_folder
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.staging import check_output, staged


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    return {
        "a file": tmp_path / "file",
        "in a file": tmp_path / "file" / "x",
        "a loop of links": tmp_path / "loop",
        "in a loop of links": tmp_path / "loop" / "x",
        "too long": tmp_path / ("n" * 300),
        "no such user": Path("~nosuchuser/x"),
        "undecodable": tmp_path / os.fsdecode(b"a\xff"),
        "in /proc": Path("/proc/x"),
        "a device": Path("/dev/null"),
    }


ALL = ("a file", "in a file", "a loop of links", "in a loop of links", "too long", "no such user", "undecodable",
       "in /proc", "a device")  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_a_place_that_cannot_be_is_refused_and_nothing_left(places, tmp_path, kind):
    before = sorted(os.listdir(os.fsencode(tmp_path)))
    with pytest.raises(UserError, match="--output"), staged(places[kind], overwrite=False, needed=0):
        pytest.fail("nothing can be written here")
    with pytest.raises(UserError, match="--output"):
        make_folder("--output", places[kind])
    assert sorted(os.listdir(os.fsencode(tmp_path))) == before


def test_a_name_without_room_for_the_partial_one(tmp_path):
    with (
        pytest.raises(UserError, match="cannot be written"),
        staged(tmp_path / ("n" * 250), overwrite=False, needed=0),
    ):
        pytest.fail("nothing can be written here")
    assert not list(tmp_path.iterdir())


def test_home_is_followed_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_folder("--output", Path("~/results")) == tmp_path / "results"
    with pytest.raises(UserError, match="exists"):
        check_output(Path("~/results"), overwrite=False)
    with staged(Path("~/made"), overwrite=False, needed=0) as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "made" / "config.json").is_file()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_told_whoever_meets_it(tmp_path, error):
    with pytest.raises(UserError, match="No room left"), staged(tmp_path / "out", overwrite=False, needed=0):
        raise error
    assert not list(tmp_path.iterdir())
