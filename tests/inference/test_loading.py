"""Checkpoints and adapters: what loads, and what is refused with its name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model

import modeling_t5gemma as m
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.adapters import BASE_FILE, fingerprint
from modeling_t5gemma.inference.loading import Checkpoint, load_checkpoint
from modeling_t5gemma.lora import lora_config
from tests.inference.conftest import MAKE, make_tokenizer
from tests.tiny import tokens


@pytest.mark.parametrize("kind", MAKE)
def test_models_of_every_kind(kind, checkpoints):
    folder = checkpoints(kind)
    found = load_checkpoint(str(folder))
    assert not found.model.training and found.tokenizer.chat_template
    assert found.model.config.is_encoder_decoder == (kind != "decoder_only")
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_checkpoint(str(folder), dtype="bfloat16").model.parameters()} == {torch.bfloat16}
    assert found.file("config.json") == folder / "config.json" and found.file("sentinels.json") is None


@pytest.fixture
def adapter(checkpoints, tmp_path):
    """``adapter(kind, recorded=True)``: an adapter's folder, the model with it, and its base's folder."""

    def make(kind: str, recorded: bool = True):
        base = checkpoints(kind)
        model = load_checkpoint(str(base)).model
        record = {"path": str(base), "fingerprint": fingerprint(model)}
        config = lora_config(target_modules=r".*\.(q|v)_proj")
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted.save_pretrained(tmp_path / "adapter")
        if recorded:
            (tmp_path / "adapter" / BASE_FILE).write_text(json.dumps(record))
        return tmp_path / "adapter", adapted, base

    return make


@pytest.mark.parametrize("kind", ["layerwise", "decoder_only"])
def test_an_adapter_is_on_its_base(kind, adapter):
    folder, adapted, base = adapter(kind)
    found = load_checkpoint(str(folder))
    ids = tokens(1, 7)
    expected, plain = (
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        for model in (adapted, load_checkpoint(str(base)).model)
    )
    assert torch.equal(found.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)
    assert not torch.equal(plain, expected)
    assert found.file("adapter_config.json") == folder / "adapter_config.json"
    assert found.file("config.json") == base / "config.json", "looked for beside the base too"


def test_an_adapter_s_own_tokenizer_and_ends(adapter):
    folder, _, base = adapter("separate")
    make_tokenizer("{{ 'its own' }}").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 6]}')
    found = load_checkpoint(str(folder))
    assert found.tokenizer.chat_template == "{{ 'its own' }}"
    assert found.model.generation_config.eos_token_id == [1, 6]
    assert load_checkpoint(str(base)).tokenizer.chat_template != "{{ 'its own' }}"


def test_a_base_that_has_moved(adapter, tmp_path):
    folder, _, base = adapter("separate")
    moved = shutil.copytree(base, tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / BASE_FILE).unlink()
    with pytest.raises(UserError, match=str(tmp_path / "gone")):
        load_checkpoint(str(folder))
    assert load_checkpoint(str(folder), base=str(moved)).places == (str(folder), str(moved))


@pytest.mark.parametrize(
    "other, recorded",
    [
        ("same shapes", True),  # only the record tells them apart
        *(
            (other, recorded)
            for other in ("other width", "fewer layers", "decoder_only")
            for recorded in (True, False)
        ),
    ],
)
def test_an_adapter_of_another_base(other, recorded, adapter, tmp_path):
    folder, _, base = adapter("separate", recorded)
    kind = other if other in MAKE else "separate"
    changes = {
        "other width": {"hidden_size": 24},
        "fewer layers": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    }.get(other, {})
    MAKE[kind](**changes).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as error:
        load_checkpoint(str(folder), base=str(tmp_path / "other"))
    assert str(base) in str(error.value) and str(tmp_path / "other") in str(error.value)


def test_a_base_for_what_is_no_adapter(checkpoints):
    with pytest.raises(UserError, match=r"no adapter.*--base"):
        load_checkpoint(str(checkpoints("separate")), base="x")


def test_what_cannot_generate(checkpoints, tmp_path):
    folder = checkpoints("separate")
    m.T5GemmaEncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="encoder alone"):
        load_checkpoint(str(tmp_path / "encoder"))
    spoilt = MAKE["layerwise"]()
    weights = spoilt.state_dict()
    del weights["model.decoder.layers.0.mlp.up_proj.weight"]
    spoilt.save_pretrained(tmp_path / "spoilt", state_dict=weights)
    make_tokenizer().save_pretrained(tmp_path / "spoilt")
    with pytest.raises(UserError, match=r"lacks 1 tensors such as model\.decoder\.layers\.0\.mlp"):
        load_checkpoint(str(tmp_path / "spoilt"))


@pytest.mark.parametrize("length", [100, 20_000])
def test_weights_cut_short(length, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("separate"), tmp_path / "short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(UserError, match="short"):
        load_checkpoint(str(folder))


def test_options_that_cannot_be(checkpoints, tmp_path):
    folder = str(checkpoints("separate"))
    with pytest.raises(UserError, match=r"--dtype float8 is none of auto, float32"):
        load_checkpoint(folder, dtype="float8")
    with pytest.raises(UserError, match=r"--device warp cannot be used.*cpu"):
        load_checkpoint(folder, device="warp")
    with pytest.raises(UserError, match="nothing-here"):
        load_checkpoint(str(tmp_path / "nothing-here"))


def test_without_a_network_a_hub_s_files_are_not_guessed():
    with pytest.raises(UserError, match=r"someone/model has a sentinels\.json.*downloaded to"):
        Checkpoint(torch.nn.Identity(), None, ("someone/model",)).file("sentinels.json")
    with pytest.raises(UserError, match="someone/model"):
        load_checkpoint("someone/model")
