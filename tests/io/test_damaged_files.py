"""Damaged and odd files of a checkpoint end in one line that names them, or do no harm."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.documents import read_record
from modeling_t5gemma.conversion.inspection import inspect_checkpoint
from modeling_t5gemma.conversion.options import ConversionOptions
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_texts
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.inference.sampling import generation_config
from modeling_t5gemma.io.checkpoints import check_weights, load_config, locate
from modeling_t5gemma.io.text_files import read_json
from tests.inference.conftest import MAKE
from tests.io.conftest import checkpoint
from tests.io.mutations import FILES, damage


def say_something(folder: Path) -> None:
    found = load_checkpoint(str(folder))
    config = generation_config(found.model, found.tokenizer, max_new_tokens=2)
    list(generate_texts(found.model, found.tokenizer, ["a the"], generation_config=config))


@pytest.mark.parametrize("seed", range(30))
def test_damage_at_random(seed, tmp_path):
    rng = random.Random(seed)
    kind = rng.choice(list(MAKE))
    folder = shutil.copytree(checkpoint(kind), tmp_path / "damaged")
    did = damage(rng.choice([folder / name for name in FILES if (folder / name).exists()]), rng)
    try:
        if kind == "decoder_only":
            prepare(ConversionOptions(str(folder), str(folder), tmp_path / "out"))
        else:
            inspect_checkpoint(str(folder))
        say_something(folder)
    except UserError as error:
        assert "\n" not in str(error), did


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_what_is_no_file(name, kind, spoilt):
    file = spoilt("layerwise") / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file)
    with pytest.raises(UserError, match=name):
        say_something(file.parent)


@pytest.mark.parametrize(
    "content",
    [b'{"a": "\\ud800"}', b"", b"\xff", b"[]", b"{", b"[" * 100_000, b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}"],
)
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2**31},
        {"hidden_size": "32"},
        {"hidden_size": -32},
        {"vocab_size": True},
        {"pad_token_id": 10**6},
        {"rms_norm_eps": float("nan")},
        {"hidden_activation": "evil"},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    ],
)
def test_fields_of_a_stack(fields, spoilt):
    folder = spoilt("separate")
    config = json.loads((folder / "config.json").read_text())
    config["decoder"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(folder)


@pytest.mark.parametrize(
    "fields", [{"architectures": 3}, {"architectures": [1.5]}, {"architectures": ["Gemma3ForCausalLM"], "decoder": 3}]
)
def test_fields_of_a_source(fields, spoilt, tmp_path):
    folder = str(spoilt("decoder_only", **fields))
    with pytest.raises(UserError, match=r"config\.json"):
        prepare(ConversionOptions(folder, folder, tmp_path / "out"))


def test_a_norm_that_is_one_number(spoilt, tmp_path):
    folder = spoilt("decoder_only")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight as \[\]"):
        prepare(ConversionOptions(str(folder), str(folder), tmp_path / "out"))


def test_a_config_larger_than_its_files(spoilt):
    folder = spoilt("decoder_only", vocab_size=1 << 27)
    with pytest.raises(UserError, match="more than the files of weights hold"):
        load_checkpoint(str(folder))


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    """None of them is looked for on the Hub."""
    monkeypatch.setattr("modeling_t5gemma.io.hub.download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for given in ("nowhere", "./nowhere", "~/nowhere", "runs/nowhere", "a/b/c", "x" * 300, "a/b.gguf", "file", ""):
        with pytest.raises(UserError, match=r"There is no folder|neither a folder|\.gguf"):
            locate(given)
            load_config(locate(given))


def test_a_record(spoilt):
    folder = spoilt("layerwise", "conversion.json", encoder={"source": "x", "layers": 3})
    with pytest.raises(UserError, match=r"conversion\.json is not as t5gemma convert wrote it"):
        read_record(folder)


def test_weights_of_a_model_that_is_there_already(spoilt):
    folder = spoilt("separate")
    model = load_checkpoint(str(folder)).model
    check_weights(folder, model)
    weights = load_file(folder / "model.safetensors")
    name = "model.encoder.norm.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is \(31,\)"):
        check_weights(folder, model)
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {name}"):
        check_weights(folder, model)


def diverged(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("1.mlp.up_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["decoder_only", "layerwise"])
def test_weights_that_are_not_finite_say_nothing(kind, spoilt):
    with pytest.raises(UserError, match="logits that are not finite"):
        say_something(diverged(spoilt(kind)))


def test_weights_that_are_not_finite_are_not_converted(spoilt, tmp_path):
    folder = str(diverged(spoilt("decoder_only")))
    options = ConversionOptions(folder, folder, tmp_path / "out", cross_attention="layerwise")
    with pytest.raises(UserError, match=r"up_proj\.weight of .* not finite"):
        carry_out(prepare(options))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_scored(spoilt):
    scoring = pytest.importorskip("modeling_t5gemma.evaluation.scoring")
    batches = pytest.importorskip("modeling_t5gemma.evaluation.batches")
    model = load_checkpoint(str(diverged(spoilt("layerwise")))).model
    size = batches.BatchSize.of(model.device, model.config.decoder.vocab_size, 1)
    with pytest.raises(UserError, match="probabilities that are not finite"):
        scoring.log_likelihoods(model, [scoring.Pair((5, 6), (7, 8))], 0, size)
