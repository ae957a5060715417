"""``t5gemma generate``: files in, files out, in order, whole or not at all."""

from __future__ import annotations

import json
import re
import sys

import pytest

from modeling_t5gemma.commands.generate import generate
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_texts
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.inference.records import Record, read_records
from tests.inference.conftest import MAKE, TURN_END

TEXTS = ["the cat", "a", "the man that sat on the mat", "cab", "he is the one"]
FEW = ("--max-new-tokens", 8, "--quiet")


@pytest.fixture(scope="module")
def expected(checkpoints):
    """Answers to ``TEXTS``, one at a time."""

    def answers(kind: str) -> list[str]:
        found = load_checkpoint(str(checkpoints(kind)))
        texts = [
            next(generate_texts(found.model, found.tokenizer, [text], max_new_tokens=8, do_sample=False))
            for text in TEXTS
        ]
        return [Record("", "", None).answered(text) for text in texts]

    return answers


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_line_a_text(kind, batch_size, checkpoints, expected, invoke, tmp_path):
    (tmp_path / "in.txt").write_text("\r\n".join(TEXTS))
    output = tmp_path / "out.txt"
    output.write_text("before")
    result = invoke(
        generate,
        checkpoints(kind),
        "--input",
        tmp_path / "in.txt",
        "--output",
        output,
        "--batch-size",
        batch_size,
        *FEW,
    )
    assert result.exit_code == 0, result.output
    assert output.read_text().split("\n") == [*expected(kind), ""]
    assert not result.stdout and sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_standard_input_and_output(checkpoints, expected, invoke):
    result = invoke(generate, checkpoints("separate"), *FEW, input="\n".join(TEXTS) + "\n")
    assert result.stdout.split("\n") == [*expected("separate"), ""]


def test_json_keeps_its_columns(checkpoints, expected, invoke, tmp_path):
    rows = [{"id": number, "prompt": text, "ö": [None, "é"]} for number, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    result = invoke(generate, checkpoints("layerwise"), "--input", tmp_path / "in.jsonl", "--output", output, *FEW)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Record("", "", None).answered(row["generated"]) for row in found] == expected("layerwise")
    assert [{name: row[name] for name in row if name != "generated"} for row in found] == rows


def test_chat_and_messages_are_the_same_question(checkpoints, invoke, tmp_path):
    (tmp_path / "in.txt").write_text("the cat\n")
    messages = [{"role": "user", "content": "the cat"}]
    for column in ("messages", "prompt"):
        (tmp_path / f"{column}.jsonl").write_text(json.dumps({column: messages}) + "\n")
    folder = checkpoints("separate")
    found = load_checkpoint(str(folder))
    ids = found.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)[1:]
    ends = [1, TURN_END]
    (text,) = generate_texts(found.model, found.tokenizer, [ids], max_new_tokens=8, eos_token_id=ends)
    answer = Record("", "", None).answered(text)
    assert invoke(generate, folder, "--input", tmp_path / "in.txt", "--chat", *FEW).stdout == f"{answer}\n"
    assert invoke(generate, folder, "--input", tmp_path / "in.txt", "--no-chat", *FEW).stdout != f"{answer}\n"
    for column in ("messages", "prompt"):
        row = json.loads(invoke(generate, folder, "--input", tmp_path / f"{column}.jsonl", *FEW).stdout)
        assert row == {column: messages, "generated": text}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("in.txt", b"the cat\n\nthe mat\n", "line 2, is empty"),
        ("in.txt", b"the cat\n  \t\n", "line 2, is empty"),
        ("in.txt", b"the cat\nt\0h\0e\0\n", "line 2, has a NUL character.*UTF-16"),
        pytest.param("in.jsonl", b"[" * 100_000, "line 1, is not valid JSON", id="deep"),
        ("in.jsonl", b'{"prompt": "a\\ud800"}\n', "line 1, is not Unicode"),
        ("in.txt", b"the cat\nthe \xff mat\n", "line 2, is not UTF-8.*byte 4"),
        ("in.txt", b"the cat\n" + b"a " * 300, r"line 2, is \d+ tokens long.*at most 256.*--truncate"),
        ("in.jsonl", b'{"prompt": "a"}\n{"prompt": "a"\n', "line 2, is not valid JSON"),
        ("in.jsonl", b'{"prompt": "a"}\n["a"]\n', "line 2, is not an object"),
        (
            "in.jsonl",
            b'{"prompt": "a"}\n{"text": "a"}\n',
            "line 2, should have prompt or messages, and has neither, but text",
        ),
        ("in.jsonl", b'{"prompt": "a", "messages": []}\n', "line 1, should have prompt or messages, and has both"),
        ("in.jsonl", b'{"prompt": ""}\n', "line 1, has an empty prompt"),
        ("in.jsonl", b'{"prompt": 3}\n', "line 1, has a prompt that is no list"),
        ("in.jsonl", b'{"messages": "a"}\n', "line 1, has a messages that is no list"),
        ("in.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1, has a messages that is no list"),
        ("in.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1, ends with the assistant"),
        (
            "in.jsonl",
            b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}\n',
            "line 1, cannot be read.*alternate",
        ),
        ("in.jsonl", b'{"prompt": "a", "generated": "b"}\n', "line 1, has a column 'generated' already"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_generated(
    name, content, message, checkpoints, invoke, tmp_path, monkeypatch
):
    monkeypatch.setattr("modeling_t5gemma.commands.generate.generate_texts", lambda *_, **__: 1 / 0)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "out").write_text("before")
    result = invoke(generate, checkpoints("separate"), "--input", tmp_path / name, "--output", tmp_path / "out", *FEW)
    assert isinstance(result.exception, UserError)
    assert re.search(message, str(result.exception))
    assert name in str(result.exception)
    assert (tmp_path / "out").read_text() == "before"


def test_a_file_of_another_system_has_the_same_prompts():
    plain = ["the cat", "the mat"]
    for content in ("the cat\nthe mat\n", "\ufeffthe cat\r\nthe mat"):
        lines = content.encode().splitlines(keepends=True)
        assert [each.prompt for each in read_records(lines, "in", of_json=False, chat=False)] == plain
    marked = '\ufeff{"prompt": "the cat"}\n'.encode()
    assert [each.prompt for each in read_records([marked], "in", of_json=True, chat=False)] == plain[:1]


def test_a_bad_line_of_standard_input(checkpoints, invoke, tmp_path):
    result = invoke(
        generate, checkpoints("separate"), "--output", tmp_path / "out", "--batch-size", 1, *FEW, input=b"a\n\n"
    )
    assert isinstance(result.exception, UserError) and "standard input, line 2" in str(result.exception)
    assert not list(tmp_path.iterdir()), "neither the output nor a part of it"


def test_truncating_is_counted(checkpoints, invoke, tmp_path):
    (tmp_path / "in.txt").write_text("the cat\n" + "cab " * 100 + "the end\n")
    (tmp_path / "end.txt").write_text(("cab " * 100 + "the end")[-240:] + "\n")
    folder = checkpoints("separate")
    found = load_checkpoint(str(folder))
    ids = found.tokenizer("cab " * 100 + "the end", add_special_tokens=False).input_ids[-256:]
    (last,) = generate_texts(found.model, found.tokenizer, [ids], max_new_tokens=8)
    result = invoke(generate, folder, "--input", tmp_path / "in.txt", "--truncate", *FEW)
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n")[1] == Record("", "", None).answered(last)
    assert "Shortened 1 of 2 lines to 256 tokens." in result.stderr


def test_places_that_cannot_be_written_or_read(checkpoints, invoke, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    for arguments, message in (
        (("--input", tmp_path / "none.txt"), "is no file"),
        (("--input", tmp_path / "in.txt", "--output", tmp_path / "in.txt"), "is the input too"),
        (("--input", tmp_path / "in.txt", "--output", tmp_path / "none" / "out"), "in none that exists"),
        (("--input", tmp_path / "in.txt", "--output", tmp_path), "is a folder"),
        (("--input", tmp_path / "in.txt", "--chat", "--max-new-tokens", 900), "--max-new-tokens 900"),
    ):
        result = invoke(generate, checkpoints("separate"), *arguments)
        assert isinstance(result.exception, UserError) and message in str(result.exception), result.output


def test_sampling_is_seeded(checkpoints, invoke):
    def sampled(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-p", 0.95, "--seed", seed)
        return invoke(generate, checkpoints("layerwise"), *FEW, *options, input="the cat\n").stdout

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("batch_size, lines", [(1, TEXTS), (8, TEXTS[:1]), (8, TEXTS)])
def test_a_terminal_shows_words_as_they_come(batch_size, lines, checkpoints, tmp_path, monkeypatch, capsys):
    written = []
    (tmp_path / "in.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("typer.echo", lambda text="", nl=True, err=False: written.append(text + "\n" * nl))
    generate(
        str(checkpoints("decoder_only")), input_=str(tmp_path / "in.txt"), max_new_tokens=20, batch_size=batch_size,
        output="-", chat=False, temperature=None, top_p=None, num_beams=1, seed=0, truncate=False, base=None,
        dtype="auto", device="auto", quiet=False,
    )  # fmt: skip
    found = load_checkpoint(str(checkpoints("decoder_only")))
    expected = [next(generate_texts(found.model, found.tokenizer, [line], max_new_tokens=20)) for line in lines]
    streams = batch_size == 1 or len(lines) == 1
    if not streams:
        expected = [Record("", "", None).answered(text) for text in expected]
    assert "".join(written) == "".join(f"{text}\n" for text in expected)
    assert (len(written) > len(lines)) == streams
    assert not capsys.readouterr().err


def test_an_answer_stays_on_its_line():
    assert Record("", "", None).answered("a\nb\r\nc\rd") == "a\\nb\\nc\\nd"
    assert json.loads(Record("", "", {"a": 1}).answered("a\nb")) == {"a": 1, "generated": "a\nb"}
