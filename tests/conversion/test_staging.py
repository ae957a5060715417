"""A kill at any moment leaves nothing or a whole checkpoint, and the next run clears what it left."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import staging

# Children fork from a server that has imported everything but run nothing, so that a kill costs a fork.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["modeling_t5gemma.conversion.convert"])
_FILE_EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.copyfile",
    "shutil.rmtree",
    "ctypes.dlsym",
}


def convert_and_die(source: str, output: str, overwrite: bool, die_at: int | None, counter) -> None:
    """Convert, and send oneself SIGKILL at the ``die_at``-th time that a file is opened, renamed or removed."""
    from modeling_t5gemma.conversion.convert import carry_out, prepare
    from modeling_t5gemma.conversion.options import ConversionOptions

    prepared = prepare(ConversionOptions(source, source, Path(output), overwrite=overwrite, max_shard_size="300KB"))

    def hook(event: str, arguments: tuple) -> None:
        if event in _FILE_EVENTS:
            counter.value += 1
            if counter.value == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    carry_out(prepared)


def run(source: Path, output: Path, overwrite: bool = False, die_at: int | None = None) -> int:
    """Convert in a process of its own; the number of events it came to."""
    counter = SERVER.Value("i", 0)
    process = SERVER.Process(target=convert_and_die, args=(str(source), str(output), overwrite, die_at, counter))
    process.start()
    process.join()
    assert process.exitcode == (0 if die_at is None else -signal.SIGKILL)
    return counter.value


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def moments(events: int, count: int) -> list[int]:
    """Spread over the run, and each of the last ones, where the renames are."""
    return sorted({*range(1, events, max(1, events // count)), *range(events - 5, events + 1)})


def test_killed_at_any_moment(sources, tmp_path):
    output = tmp_path / "output"
    events = run(sources("gemma2"), output)
    whole = content(output)
    assert whole and len(list(tmp_path.iterdir())) == 1
    seen = set()
    for moment in moments(events, 6):
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        run(sources("gemma2"), output, die_at=moment)
        seen.add(output.exists())
        if output.exists():
            assert content(output) == whole, moment
    assert seen == {True, False}
    run(sources("gemma2"), output, overwrite=True)
    assert content(output) == whole and list(tmp_path.iterdir()) == [output]


def test_killed_while_overwriting(sources, tmp_path):
    """There is a whole checkpoint at every moment, the old one or the new one."""
    output = tmp_path / "output"
    run(sources("gemma2", seed=1), output)
    old = content(output)
    events = run(sources("gemma2"), output, overwrite=True)
    new = content(output)
    seen = set()
    for moment in moments(events, 3):
        run(sources("gemma2", seed=1), output, overwrite=True)
        run(sources("gemma2"), output, overwrite=True, die_at=moment)
        assert content(output) in (old, new), moment
        seen.add(content(output) == new)
    assert seen == {True, False}


def test_only_what_is_here_can_be_lost(tmp_path, monkeypatch):
    """A model on the Hub has a name like a path; an output may have the same one."""
    monkeypatch.chdir(tmp_path)
    source = Path("google") / "gemma"
    for output in (source, source.parent):
        staging.check_apart(output, [source])
    source.mkdir(parents=True)
    for output in (source, source.parent):
        with pytest.raises(UserError, match="would be lost"):
            staging.check_apart(output, [source])
    staging.check_apart(source / "output", [source])
    staging.check_apart(Path("google") / "other", [source])


def test_a_file_system_that_cannot_exchange(tmp_path, monkeypatch):
    """Two renames, and what a kill between them leaves is put back."""
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    output = tmp_path / "output"
    for text in ("old", "new"):
        with staging.staged(output, overwrite=True, needed=0) as folder:
            (folder / "config.json").write_text(text)
    assert (output / "config.json").read_text() == "new" and list(tmp_path.iterdir()) == [output]
    output.rename(tmp_path / ".output.12345678.replaced")
    staging.remove_leftovers(output)
    assert (output / "config.json").read_text() == "new" and list(tmp_path.iterdir()) == [output]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    output = tmp_path / "output"
    (tmp_path / ".output.dead.partial").mkdir()
    (tmp_path / ".other.dead.partial").mkdir()
    with staging.staged(output, overwrite=False, needed=0) as living:
        assert not (tmp_path / ".output.dead.partial").exists()
        with staging.staged(output, overwrite=False, needed=0) as second:
            assert living.exists()
            (second / "second").touch()
        (living / "first").touch()
        with pytest.raises(UserError, match="exists"):
            staging.check_output(output, overwrite=False)
        output.rename(tmp_path / "moved")
    assert (output / "first").exists() and (tmp_path / ".other.dead.partial").exists()


def convert_and_wait(arguments: list[str], writing) -> None:
    from modeling_t5gemma import cli
    from modeling_t5gemma.conversion import convert

    def wait(*_: object) -> None:
        writing.set()
        time.sleep(60)

    convert.write_safetensors = wait
    sys.argv = ["t5gemma", "convert", "--quiet", *arguments]
    cli.main()


def test_terminated_it_cleans_up(sources, tmp_path):
    """SIGTERM, as a scheduler sends it, through the command line."""
    source, writing = str(sources("gemma2")), SERVER.Event()
    arguments = ["--enc", source, "--dec", source, "--output", str(tmp_path / "output")]
    process = SERVER.Process(target=convert_and_wait, args=(arguments, writing))
    process.start()
    assert writing.wait(timeout=60) and len(list(tmp_path.iterdir())) == 1
    process.terminate()
    process.join(timeout=30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def convert_with_little_room(arguments: list[str], stderr: Path) -> None:
    import resource

    from modeling_t5gemma import cli

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    sys.argv, sys.stderr = ["t5gemma", "convert", "--quiet", *arguments], stderr.open("w")
    cli.main()


def test_a_disk_that_fills_up(sources, tmp_path):
    """The operating system's own refusal, in a folder whose parents had to be made: nothing of them stays."""
    source, stderr, outputs = str(sources("gemma2")), tmp_path / "stderr", tmp_path / "outputs"
    outputs.mkdir()
    arguments = ["--enc", source, "--dec", source, "--output", str(outputs / "new" / "output")]
    process = SERVER.Process(target=convert_with_little_room, args=(arguments, stderr))
    process.start()
    process.join()
    assert process.exitcode == 2
    assert re.fullmatch(r"error: No room left for [^\n]+\n", stderr.read_text())
    assert not list(outputs.iterdir())
