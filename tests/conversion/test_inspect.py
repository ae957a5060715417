"""``t5gemma inspect`` tells what is in a checkpoint, from its config and headers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import modeling_t5gemma as m
from modeling_t5gemma.cli import app
from modeling_t5gemma.commands.inspect import notes, parameters_table, stacks_table
from modeling_t5gemma.conversion.inspection import PARTS, inspect_checkpoint
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import hub


def cells(table) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    rows = zip(*(list(column.cells) for column in table.columns))
    return {first: rest for first, *rest in rows}


def test_a_layerwise_gemma3(sources, convert):
    inspection = inspect_checkpoint(
        str(convert(sources("gemma3"), cross_attention="layerwise", encoder_attention="1-2", share_embeddings=True))
    )
    rows = cells(stacks_table(inspection))
    assert rows["layers"] == ["4: 2 sliding, 2 full"] * 2
    assert rows["bidirectional"] == ["1-2", "none"]
    assert rows["query / kv heads x head_dim"] == ["4 / 2 x 32"] * 2
    assert rows["RoPE"] == ["sliding 10,000, full 1,000,000"] * 2
    assert rows["norms"] == ["before and after, on queries and keys"] * 2
    assert rows["softcap: attention, logits"] == ["none, none"] * 2
    assert rows["cross-attention"] == ["", "layerwise: each layer reads the encoder's same"]
    text = "\n".join(notes(inspection))
    assert (
        "shared by both stacks" in text and "layers 0-3 of" in text and "Cross-attention began as: layerwise" in text
    )
    assert "bos 2, eos [1, 6], pad 0, decoder_start 2" in text


@pytest.mark.parametrize("cross_attention", ["copy", "layerwise"])
def test_parameters_are_those_of_the_model(cross_attention, sources, convert):
    folder = convert(sources("gemma2"), cross_attention=cross_attention)
    inspection = inspect_checkpoint(str(folder))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert sum(tensor.parameters for tensor in inspection.tensors.values()) == model.num_parameters()
    assert cells(parameters_table(inspection))["all"][0] == f"{model.num_parameters():,}"
    embedding = model.model.decoder.embed_tokens.weight.numel()
    assert sum(t.parameters for t in inspection.part("decoder embedding")) == embedding
    without = model.num_parameters() - 2 * embedding
    assert cells(parameters_table(inspection))["without embeddings"][0] == f"{without:,}"
    cross = sum(p.numel() for name, p in model.named_parameters() if "cross_attn" in name)
    assert sum(t.parameters for t in inspection.part("cross-attention")) == cross
    assert sum(len(inspection.part(part)) for part in PARTS) == len(inspection.tensors)


def test_dtypes_and_bytes(sources, convert):
    inspection = inspect_checkpoint(str(convert(sources("gemma3"), dtype="bfloat16")))
    count = sum(tensor.parameters for tensor in inspection.tensors.values())
    assert cells(parameters_table(inspection))["all"][1:] == [f"{2 * count / 1e6:,.1f} MB", "BF16"]


def test_a_config_alone(sources, convert, tmp_path):
    folder = convert(sources("gemma2"))
    whole = inspect_checkpoint(str(folder))
    (tmp_path / "config_only").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "config_only")
    alone = inspect_checkpoint(str(tmp_path / "config_only"))
    assert not alone.has_weights and not alone.missing
    shapes = [{name: tensor.shape for name, tensor in seen.tensors.items()} for seen in (alone, whole)]
    assert shapes[0] == shapes[1]
    assert "no weights" in str(parameters_table(alone).title)


def test_a_preset_of_the_release(tmp_path):
    m.T5GemmaConfig.from_preset("2b-2b").save_pretrained(tmp_path)
    inspection = inspect_checkpoint(str(tmp_path))
    assert sum(tensor.parameters for tensor in inspection.tensors.values()) == 5_596_853_760
    assert cells(stacks_table(inspection))["layers"] == ["26: 13 sliding, 13 full"] * 2


def test_what_is_missing_and_unknown_is_named(sources, convert):
    folder = convert(sources("gemma3"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.other.weight"] = tensors.pop("model.encoder.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = "\n".join(notes(inspect_checkpoint(str(folder))))
    assert "lack 1 tensors such as model.encoder.norm.weight" in text
    assert "unknown to the config, 1 tensors such as model.encoder.other.weight" in text


def test_other_heads_and_encoders_alone(sources, convert, tmp_path):
    folder = convert(sources("gemma3"))
    m.AdaptedSeq2SeqEncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    inspection = inspect_checkpoint(str(tmp_path / "encoder"))
    assert not inspection.missing and inspection.part("encoder") and not inspection.part("decoder")


def test_a_hub_repository(sources, convert, monkeypatch):
    folder = convert(sources("gemma3"))
    whole = inspect_checkpoint(str(folder))
    headers = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in whole.tensors.items()}
    monkeypatch.setattr(hub, "describe", lambda repo, revision: (Path(folder), headers))
    assert inspect_checkpoint("someone/model").tensors == whole.tensors


def test_the_command(sources, convert):
    result = CliRunner().invoke(app, ["inspect", str(convert(sources("gemma3")))], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "AdaptedSeq2SeqForConditionalGeneration" in result.output and "without embeddings" in result.output


def test_tables_fit_eighty_columns(sources, convert):
    console = Console(width=80, record=True)
    console.print(stacks_table(inspect_checkpoint(str(convert(sources("gemma3"))))))
    assert max(map(len, console.export_text().splitlines())) <= 80


def test_bad_input(sources, tmp_path):
    for given, message in (
        (str(tmp_path / "nowhere"), "neither a folder nor a Hub repository"),
        ("nowhere", "neither a folder nor a Hub repository"),
        (str(sources("gemma2")), "model type 'gemma2'"),
        (str(tmp_path), "config.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            inspect_checkpoint(given)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5gemma", "encoder": {"qk_norm": True}}))
    with pytest.raises(UserError, match=r"config\.json cannot be loaded|no valid|says"):
        inspect_checkpoint(str(tmp_path))
