"""Tokenizing: the same shards for any number of processes and any number of stops, or a plain error."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from modeling_t5gemma.cli import app
from modeling_t5gemma.commands.tokenize import parse_count
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training import shards, tokenizing
from modeling_t5gemma.training.shards import TokenShards, Vocabulary
from modeling_t5gemma.training.sources import TextSource
from modeling_t5gemma.training.tokenizing import TokenStream, encode, tokenize_source
from tests.post_training.chat import chat_tokenizer
from tests.tiny import VOCAB, word_tokenizer
from tests.warm import WARM_PYTHON

BAD = '{"text": "cut'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, count: int, longest: int = 60) -> list[list[int]]:
    """JSON lines of random words, every 500th of them bad; the tokens of the good ones."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, VOCAB, length).tolist() for length in rng.integers(1, longest, count)]
    with path.open("w") as file:
        for number, document in enumerate(documents):
            text = json.dumps({"text": " ".join(f"w{token}" for token in document)})
            file.write((BAD if number % 500 == 499 else text) + "\n")
    return [document for number, document in enumerate(documents) if number % 500 != 499]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(path: Path, tokenizer: str, output: Path, **options) -> tokenizing.Tokenized:
    options = {"processes": 1, "shard_tokens": 20_000, **options}
    return tokenize_source(TextSource(str(path)), tokenizer, output, **options)


def test_documents_are_the_texts(tmp_path: Path, tokenizer: str):
    documents = write_lines(tmp_path / "a.jsonl", 3000)
    calls = []
    done = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", progress=lambda *counts: calls.append(counts))
    found = TokenShards(tmp_path / "out")
    assert [document.tolist() for document in map(found.__getitem__, range(len(found)))] == documents
    assert (done.documents, done.tokens, done.records) == (len(documents), sum(map(len, documents)), 3000)
    assert done.skipped == {"not valid JSON": 6} and done.first_skipped[0].endswith("a.jsonl:500: not valid JSON")
    assert calls[0] == (0, 0) and tuple(map(sum, zip(*calls))) == (done.documents, done.tokens)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert all(20_000 <= shard["tokens"] < 20_060 for shard in index["shards"][:-1])


def test_a_text_that_spells_a_special_token_has_none(tmp_path: Path, tokenizer: str):
    (tmp_path / "a.txt").write_text("w5 <pad> w6 <eos><bos>")
    run(tmp_path / "a.txt", tokenizer, tmp_path / "out")
    tokens = TokenShards(tmp_path / "out")[0].tolist()
    assert tokens[0] == 5 and 6 in tokens and not {0, 1, 2} & set(tokens)


def test_texts_without_tokens_are_skipped(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        tokenizing, "encode", lambda _, texts: [np.zeros(n % 2, np.int32) for n, _ in enumerate(texts)]
    )
    (tmp_path / "a.jsonl").write_text('{"text": "w5"}\n' * 4)
    done = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert done.documents == 2 and done.skipped == {"no tokens": 2}


def test_too_many_bad_records(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 2000)
    with pytest.raises(UserError, match=r"More than 3 bad records. The first: .*a\.jsonl:500"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", max_bad=3)
    assert not (tmp_path / "out" / "index.json").exists()
    # A higher limit goes on with the same folder.
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", max_bad=4)
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "again", max_bad=4)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_kill_and_go_on(tmp_path: Path, tokenizer: str):
    """kill -9 of the command with two processes; a run with one goes on, to what one gives undisturbed."""
    write_lines(tmp_path / "a.jsonl", 12_000)
    undisturbed = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "whole")
    output = tmp_path / "out"
    code = "import os; from modeling_t5gemma.cli import main; print(os.getpid(), flush=True); main()"
    command = [WARM_PYTHON, "-c", code, "tokenize"]
    command += [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer, "--output", str(output), "--processes", "2"]
    command += ["--shard-tokens", "20K"]
    process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.PIPE, text=True)
    finished = 0
    deadline = time.monotonic() + 60
    while finished < 2 and time.monotonic() < deadline:
        if (output / "progress.json").exists():
            finished = len(json.loads((output / "progress.json").read_text())["shards"])
        time.sleep(0.005)
    program = int(process.stdout.readline())
    helpers = descendants(program)
    os.kill(program, signal.SIGKILL)
    process.wait()
    assert finished >= 2 and not (output / "index.json").exists()
    with pytest.raises(UserError, match="goes on where it was stopped"):
        TokenShards(output)
    kept = {name: (output / name).stat().st_mtime_ns for name in ("tokens-00000.bin", "tokens-00001.bin")}

    alone = [*command[command.index("tokenize") :], "--processes", "1"]
    told = CliRunner().invoke(app, alone, catch_exceptions=False).stdout
    assert content(output) == content(tmp_path / "whole")
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept, "complete shards are not written again"
    assert f"{undisturbed.documents:,} documents (" in told and "24 records skipped: 24 not valid JSON" in told
    assert len(told.splitlines()) == 1
    deadline = time.monotonic() + 10
    while (left := list(filter(is_alive, helpers))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(helpers) >= 2 and not left, "processes are left behind"


def descendants(process: int) -> list[int]:
    children = list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def is_alive(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 8])
def test_stopped_at_any_write(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, stop: int):
    """A full disk at the n-th file: nothing half, and the next run ends as an undisturbed one."""
    write_lines(tmp_path / "a.jsonl", 2500)
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "whole")
    writes = 0
    write_atomically = shards.write_atomically

    def limited(path: Path, parts) -> None:
        nonlocal writes
        writes += 1
        if writes < stop:
            return write_atomically(path, parts)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # bytes; a write beyond it fails as on a full disk
        try:
            return write_atomically(path, parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_atomically", limited)
        with pytest.raises(UserError, match="No room left"):
            run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert not any(name.startswith((".", "index")) for name in content(tmp_path / "out"))
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 1000)
    first = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    before = content(tmp_path / "out")
    again = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert again.kept == first.documents and (again.tokens, again.skipped) == (first.tokens, first.skipped)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path: Path, tokenizer: str, finished: bool):
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    write_lines(path, 2000)
    if finished:
        run(path, tokenizer, output)
    else:
        with pytest.raises(UserError, match="More than 2"):
            run(path, tokenizer, output, max_bad=2)
    with pytest.raises(UserError, match="another shard_tokens: 20000 then, 1000 now"):
        run(path, tokenizer, output, shard_tokens=1000)
    with pytest.raises(UserError, match="another column"):
        tokenize_source(TextSource(str(path), column="b"), tokenizer, output, processes=1, shard_tokens=20_000)
    other = word_tokenizer()
    other.add_tokens(["more"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        run(path, str(tmp_path / "other"), output)
    with path.open("a") as file:
        file.write('{"text": "w9"}\n')
    with pytest.raises(UserError, match="another files"):
        run(path, tokenizer, output)


def test_a_folder_of_something_else(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 10)
    with pytest.raises(UserError, match=r"holds other files \(a\.jsonl\)"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "a.jsonl")


def test_two_runs_at_once(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 10)
    with tokenizing._locked(tmp_path / "out"), pytest.raises(UserError, match="Another run is writing"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")


def test_no_tokenizer(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", 10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        run(tmp_path / "a.jsonl", str(tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_know_their_tokenizer(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 10)
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    own = tokenizing.vocabulary_of(tokenizing.load_tokenizer(tokenizer), "elsewhere")
    TokenShards(tmp_path / "out", own)
    changed = tokenizing.load_tokenizer(tokenizer)
    changed.eos_token = "w5"
    for other in (tokenizing.vocabulary_of(changed, "other"), Vocabulary("other", "0" * 64)):
        with pytest.raises(UserError, match="the ids mean other words"):
            TokenShards(tmp_path / "out", other)


def test_a_stream_counts_records(tmp_path: Path, tokenizer: str):
    documents = write_lines(tmp_path / "a.jsonl", 1200)
    stream = TokenStream(TextSource(str(tmp_path / "a.jsonl")), tokenizer)
    found = [tokens.tolist() for tokens in stream(0)]
    assert len(found) == 1200 and [tokens for tokens in found if tokens] == documents
    assert found[499] == [] and [tokens.tolist() for tokens in stream(490)] == found[490:]
    with pytest.raises(UserError, match="More than 1 bad"):
        list(TokenStream(TextSource(str(tmp_path / "a.jsonl")), tokenizer, max_bad=1)(0))


def test_the_command_tells_what_it_did(tmp_path: Path, tokenizer: str):
    write_lines(tmp_path / "a.jsonl", 600)
    arguments = ["tokenize", str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer, "--processes", "1"]
    shown = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert "599 documents, " in shown.output and "1 records skipped: 1 not valid JSON (first: " in shown.output
    quiet = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "b"), "--quiet"], catch_exceptions=False)
    assert quiet.output == "" and len(TokenShards(tmp_path / "b")) == 599


def test_counts_of_tokens():
    assert [parse_count(text) for text in ("7", "500K", "1.5m", "2G", "2B")] == [7, 500_000, 1_500_000, 2 * 10**9] + [
        2 * 10**9
    ]
    for text in ("", "0", "-1", "K", "1T", "ten"):
        with pytest.raises(UserError, match="--shard-tokens"):
            parse_count(text)


def test_numbers_begin_at_one(tmp_path: Path, tokenizer: str):
    for options in (dict(processes=0), dict(shard_tokens=0)):
        with pytest.raises(UserError, match="begin at 1"):
            run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", **options)


def test_a_killed_process_is_told(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch):
    write_lines(tmp_path / "a.jsonl", 10)
    monkeypatch.setattr(tokenizing, "_encode_in_process", abort)
    with pytest.raises(UserError, match="A tokenizing process was killed"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", processes=2)


def abort(texts: list[str]) -> None:
    os.abort()


def test_a_long_text_has_the_tokens_that_it_has_at_once(monkeypatch: pytest.MonkeyPatch):
    """In pieces it takes the memory of one: 20 MB took 4 GB."""
    loaded = chat_tokenizer()
    texts = ["the cat  is \n here the sea " * 200, "the", "a" * 1000]
    whole = encode(loaded, texts)
    monkeypatch.setattr(tokenizing, "_PIECE", 101)
    monkeypatch.setattr(tokenizing, "_NEAR", 50)
    pieces = tokenizing._pieces(texts[0])
    assert "".join(pieces) == texts[0] and len(pieces) > 40 and max(map(len, pieces)) <= 101
    for expected, found in zip(whole[:2], encode(loaded, texts)):
        assert found.dtype == np.int32 and found.tolist() == expected.tolist()
