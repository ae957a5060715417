"""What lies in a checkpoint's folder and must not go out, under whatever name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from modeling_t5gemma.conversion.convert import carry_out, hub_code_files, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.publishing.contents import carried, check_secrets
from modeling_t5gemma.publishing.repository import prepared
from modeling_t5gemma.publishing.settings import Publication
from tests.conversion.tiny import save_tokenizer, tiny_model

TOKEN = "hf_AbcdEFGH1234ijklMNOP5678qrstUVWX90"
PICKLE = pickle.dumps({"weights": 1})


def test_only_what_is_named_goes_out_and_code_is_the_packages_own(checkpoint, tmp_path, terms):
    folder = checkpoint("adapted_seq2seq")
    foreign = ("tokenizer_evil.py", "tokenizer.pkl", "tokenizer.bak", "chat_template_notes.txt", "pytorch_model.bin")
    for name in (*foreign, "custom_generate.py", "training_args.bin"):
        (folder / name).write_bytes(PICKLE)
    (tmp_path / "secret").write_text(TOKEN)
    (folder / "tokenizer_notes.txt").symlink_to(tmp_path / "secret")
    (folder / "modeling_t5gemma.py").write_text("raise SystemExit")
    given = Publication(folder, "owner/name", bases=("google/gemma-3-270m",), terms=terms)
    with prepared(given) as ready:
        names = set(ready.files())
        code = {name: (ready.folder / name).read_bytes() for name in names if name.endswith(".py")}
    assert not names & {path.name for path in folder.iterdir() if path.suffix in (".pkl", ".bak", ".bin", ".txt")}
    assert code == {path.name: path.read_bytes() for path in hub_code_files()}


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "tokenizer.json", "config.json", "chat_template.jinja", "*.safetensors", "LICENSE"],
)
def test_a_link_is_not_followed(checkpoint, tmp_path, terms, name):
    folder = checkpoint("t5gemma")
    path = next(iter(sorted(folder.glob(name))), folder / name)
    target = path.rename(tmp_path / "elsewhere") if path.exists() else tmp_path / "elsewhere"
    if not target.exists():
        target.write_text("text")
    path.symlink_to(target)
    with (
        pytest.raises(UserError, match=f"{path.name} is a link"),
        prepared(Publication(folder, "owner/name", bases=("google/gemma-2-2b",), terms=terms)),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("tokenizer.json", PICKLE, "holds no tokenizer"),
        ("tokenizer.json", b'{"added_tokens": []}', "holds no tokenizer"),
        ("tokenizer.model", PICKLE, "holds no SentencePiece model"),
        ("tokenizer.model", b"", "holds no SentencePiece model"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "holds no SentencePiece model"),
        ("tokenizer_config.json", PICKLE, "cannot be read"),
        ("special_tokens_map.json", b"[]", "does not hold a JSON object"),
        ("added_tokens.json", b'{"<x>": "one"}', "something else than tokens and their ids"),
        ("generation_config.json", b"[" * 100_000, "cannot be read as JSON"),
        ("chat_template.jinja", PICKLE, "cannot be read as text"),
        ("model.safetensors.index.json", b"", "cannot be read as JSON"),
    ],
)
def test_contents_are_what_the_name_says(tmp_path, name, content, pattern):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        carried(tmp_path)


def test_a_folder_or_a_dead_link_of_such_a_name(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="no regular file"):
        carried(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(UserError, match="no regular file"):
        carried(tmp_path)


def test_a_sentencepiece_model_is_known(tmp_path):
    piece = b"\x0a\x05<unk>\x15\x00\x00\x00\x00"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x00")
    assert [path.name for path in carried(tmp_path)] == ["tokenizer.model"]


def test_files_of_the_hubs_cache_are_no_links(tmp_path):
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    (snapshot / "generation_config.json").symlink_to("../../blobs/1")
    assert carried(snapshot) == [snapshot / "generation_config.json"]


@pytest.mark.parametrize(
    "text",
    [
        f"# Model\n{TOKEN}",
        json.dumps({"hub_token": "any"}),
        json.dumps({"training": {"api_key": "x"}}, indent=2),
        "AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "sk-proj-abcdefghijklmnopqrstuvwxyz",
        "ghp_" + "a1" * 18,
    ],
)
def test_secrets_stay(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README\.md holds what looks like") as refused:
        check_secrets([tmp_path / "README.md"])
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"hub_token": null, "bos_token": "<bos>"}',
        "hf_tokenizers",
        "hf_hub_download",
        "risk-taking-of-people-who-write",
    ],
)
def test_what_is_no_secret(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    check_secrets([tmp_path / "README.md"])


def test_a_secret_in_a_config_stops_everything(checkpoint, terms):
    folder = checkpoint("t5gemma")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": TOKEN}))
    with (
        pytest.raises(UserError, match=r"config\.json holds what looks like"),
        prepared(Publication(folder, "owner/name", bases=("google/gemma-2-2b",), terms=terms)),
    ):
        pass


def test_the_converter_copies_no_linked_tokenizer(tmp_path):
    source = tmp_path / "source"
    tiny_model("gemma2", num_hidden_layers=1).save_pretrained(source)
    save_tokenizer(source)
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    (tmp_path / "secret.json").write_text('{"hub_token": "x"}')
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"special_tokens_map\.json is a link"):
        carry_out(prepare(ConversionOptions(str(source), str(source), tmp_path / "output")))
    assert not Path(tmp_path / "output").exists()
