"""Verification passes what the converter writes and fails what is wrong, however small."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling_t5gemma as m
from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from modeling_t5gemma.conversion.verification import Verification, measure, verify_checkpoint
from modeling_t5gemma.errors import UserError
from tests.conversion.tiny import write_gguf
from tests.selections import pairwise
from tests.warm import WARM_PYTHON

FAMILIES = ["gemma", "gemma2", "gemma3"]
ENCODER, COPIED, DECODER = (
    "causal encoder: states",
    "copied cross-attention",
    "silenced decoder: logits",
)
WHOLE, TEXT = "causal whole: logits", "causal whole: greedy"


def verdicts(verification: Verification) -> dict[str, bool | None]:
    """By check: passed, failed, or None if skipped."""
    return {check.name: None if check.skipped else check.passed for check in verification.checks}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cross_attention", ["copy", "partial", "random", "layerwise"])
def test_what_the_converter_writes_passes(family, cross_attention, sources, convert):
    source = sources(family)
    verification = verify_checkpoint(source, convert(source, cross_attention=cross_attention))
    if cross_attention == "layerwise":
        expected = {ENCODER: True, WHOLE: True, TEXT: True, DECODER: True}
    else:
        expected = {ENCODER: True, COPIED: None if cross_attention == "random" else True, DECODER: True}
    assert verdicts(verification) == expected
    if family != "gemma":
        assert all("(window 8)" in check.note for check in verification.checks if check.name == ENCODER)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"encoder_kv": "mha"},
        {"share_embeddings": True},
        {"encoder_attention": "1-2"},
        {"encoder_attention": "causal", "cross_attention": "layerwise"},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_of_the_converter_pass(options, sources, convert):
    source = sources("gemma2")
    assert False not in verdicts(verify_checkpoint(source, convert(source, **options))).values()


def test_a_gguf_source_and_a_multimodal_one_pass(sources, convert, tmp_path):
    from tests.conversion.tiny import tiny_model

    (tmp_path / "quantised").mkdir()
    gguf = tmp_path / "quantised" / "tiny.gguf"
    write_gguf(tiny_model("gemma3"), gguf)
    for source, name in ((gguf, "of_gguf"), (sources("multimodal"), "of_multimodal")):
        converted = convert(source, cross_attention="layerwise", output=name)
        assert set(verdicts(verify_checkpoint(source, converted)).values()) == {True}, name


# Subsets and pairs


def test_the_same_subset_of_layers_is_compared_whole(sources, convert):
    source = sources("gemma3")
    converted = convert(source, cross_attention="layerwise", enc_layers="0,2,3", dec_layers="0,2")
    assert set(verdicts(verify_checkpoint(source, converted)).values()) == {True}


def test_other_subsets_are_compared_stack_by_stack(sources, convert):
    source = sources("gemma3")
    converted = convert(source, cross_attention="layerwise", enc_layers="0-3", dec_layers="0,2")
    verification = verify_checkpoint(source, converted)
    assert verdicts(verification) == {ENCODER: True, WHOLE: None, TEXT: None, DECODER: True}
    assert any("do not keep the same layers" in check.note for check in verification.checks)


def test_of_a_pair_each_source_proves_its_own_stack(sources, convert):
    wide, narrow = sources("gemma2"), sources("gemma2", hidden_size=32, seed=1)
    converted = convert(wide, narrow)
    by_source = {source: verdicts(verify_checkpoint(source, converted)) for source in (wide, narrow)}
    assert by_source[wide] == {ENCODER: True, COPIED: None, DECODER: None}
    assert by_source[narrow] == {ENCODER: None, COPIED: None, DECODER: True}


def test_a_pair_of_one_size_is_told_apart_by_name(sources, convert):
    first, second = sources("gemma2"), sources("gemma2", seed=1)
    converted = convert(first, second)
    assert verdicts(verify_checkpoint(first, converted)) == {ENCODER: True, COPIED: True, DECODER: None}
    assert verdicts(verify_checkpoint(second, converted)) == {ENCODER: None, COPIED: True, DECODER: True}


def test_convert_verify_leaves_nothing_behind_when_it_fails(sources, tmp_path, monkeypatch):
    from modeling_t5gemma.conversion import convert as module

    prepared = prepare(ConversionOptions(*[str(sources("gemma3"))] * 2, tmp_path / "converted", verify=True))
    monkeypatch.setattr(module, "repeated_chunks", None)
    write = module._write_weights

    def write_wrongly(folder, prepared, on_bytes):
        write(folder, prepared, on_bytes)
        spoil_weights(folder, scale("model.encoder.norm.weight"))

    monkeypatch.setattr(module, "_write_weights", write_wrongly)
    with pytest.raises(UserError, match="does not compute what"):
        carry_out(prepared)
    assert not list(tmp_path.iterdir())


# Wrong conversions

Tensors = dict[str, torch.Tensor]


def spoil_weights(folder: Path, change: Callable[[Tensors], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def scale(name: str, factor: float = 1.01) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] * factor

    return change


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    """Exchange all tensors whose names hold ``first`` and ``second``."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if first in name]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


WRONG = {
    "encoder layers": (swap("encoder.layers.0.", "encoder.layers.1."), ENCODER),
    "decoder layers": (swap("decoder.layers.2.", "decoder.layers.3."), DECODER),
    "final norm": (scale("model.encoder.norm.weight"), ENCODER),
    "one norm": (scale("model.decoder.layers.1.pre_feedforward_layernorm.weight"), DECODER),
    "embedding": (scale("model.decoder.embed_tokens.weight"), DECODER),
    "gate and up": (swap("encoder.layers.0.mlp.gate_proj", "encoder.layers.0.mlp.up_proj"), ENCODER),
}
CROSS_ATTENTION = {"gemma": "layerwise", "gemma2": "copy", "gemma3": "layerwise"}


@pytest.mark.parametrize(("wrong", "family"), pairwise(WRONG, CROSS_ATTENTION, together=1))
def test_wrong_weights_fail(wrong, family, sources, convert):
    change, failing = WRONG[wrong]
    source = sources(family)
    converted = convert(source, cross_attention=CROSS_ATTENTION[family])
    spoil_weights(converted, change)
    assert verdicts(measure(source, converted))[failing] is False
    with pytest.raises(UserError, match="differs by"):
        verify_checkpoint(source, converted)


def test_one_bit_of_copied_cross_attention_fails(sources, convert):
    source = sources("gemma3")
    converted = convert(source, cross_attention="copy")

    def flip(tensors: Tensors) -> None:
        tensors["model.decoder.layers.1.cross_attn.k_norm.weight"].view(torch.int32)[0] ^= 1

    spoil_weights(converted, flip)
    assert verdicts(measure(source, converted)) == {ENCODER: True, COPIED: False, DECODER: True}


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("gemma", "rope_parameters", {"rope_type": "default", "rope_theta": 10500.0}),
        ("gemma", "rms_norm_eps", 1e-2),
        ("gemma2", "rope_parameters", {"rope_type": "default", "rope_theta": 10500.0}),
        ("gemma2", "sliding_window", 9),
        ("gemma2", "query_pre_attn_scalar", 33),
        ("gemma2", "attn_logit_softcapping", 49.0),
        ("gemma2", "final_logit_softcapping", 29.0),
        ("gemma3", "layer_types", ["full_attention", "sliding_attention"] * 2),
        ("gemma3", "hidden_activation", "gelu"),
    ],
)
def test_a_wrong_config_fails(family, field, value, sources, convert):
    source = sources(family)
    converted = convert(source)
    config = json.loads((converted / "config.json").read_text())
    for stack in ("encoder", "decoder"):
        assert config[stack][field] != value
        config[stack][field] = value
    (converted / "config.json").write_text(json.dumps(config))
    failed = {name for name, passed in verdicts(measure(source, converted)).items() if passed is False}
    assert failed == ({DECODER} if field == "final_logit_softcapping" else {ENCODER, DECODER})


def test_a_layerwise_map_that_is_wrong_is_not_passed_over(sources, convert):
    source = sources("gemma3")
    converted = convert(source, cross_attention="layerwise")
    config = json.loads((converted / "config.json").read_text())
    config["cross_attention_map"] = config["decoder"]["cross_attention_map"] = [2, 1, 0, 3]
    (converted / "config.json").write_text(json.dumps(config))
    found = verdicts(measure(source, converted))
    assert found[WHOLE] is False


def test_a_missing_tensor_is_an_error(sources, convert):
    source = sources("gemma3")
    converted = convert(source)
    spoil_weights(converted, lambda tensors: tensors.pop("model.encoder.norm.weight"))
    with pytest.raises(UserError, match=r"missing keys such as model\.encoder\.norm\.weight"):
        measure(source, converted)


def test_another_source_is_an_error(sources, convert):
    with pytest.raises(UserError, match=r"Nothing in .* can be compared"):
        measure(sources("gemma2", hidden_size=32), convert(sources("gemma2")))
    with pytest.raises(UserError, match="model type 'gemma2'"):
        measure(sources("gemma2"), sources("gemma2"))


def test_the_callers_checkpoint_is_not_changed(sources, convert):
    source = sources("gemma2")
    converted = convert(source)
    before = {file.name: file.read_bytes() for file in converted.iterdir()}
    measure(source, converted)
    assert {file.name: file.read_bytes() for file in converted.iterdir()} == before
    assert isinstance(m.T5GemmaForConditionalGeneration.from_pretrained(converted).config, m.T5GemmaConfig)


def test_the_commands_exit_codes(sources, convert):
    source = sources("gemma3")
    converted = convert(source)

    def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [WARM_PYTHON, "-c", "from modeling_t5gemma.cli import main; main()", "verify"]
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)

    good = verify(source, converted)
    assert good.returncode == 0 and good.stdout.count("pass") == 3, good
    spoil_weights(converted, scale("model.encoder.norm.weight"))
    bad = verify(source, converted)
    assert bad.returncode == 1 and "FAIL" in bad.stdout, bad
    missing = verify(source, converted / "nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("error:") and missing.stderr.count("\n") == 1, missing
