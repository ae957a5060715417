"""A checkpoint that is not what it says is refused before anybody else gets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.publishing.validation import validate


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], holding: str) -> None:
    (path,) = [p for p in folder.glob("*.safetensors") if holding in load_file(p)]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("kind", "needs_code"), [("t5gemma", False), ("adapted_seq2seq", True)])
def test_a_sound_checkpoint(made, kind, needs_code):
    found = validate(made[kind])
    assert found.needs_code is needs_code and found.dtypes == ("float32",) and len(found.weights) > 1
    stored = [tensor for path in made[kind].glob("*.safetensors") for tensor in load_file(path).values()]
    assert found.parameters == sum(tensor.numel() for tensor in stored)
    assert {path.name for path in found.weights} == {path.name for path in made[kind].glob("*.safetensors")}


NORM = "model.decoder.norm.weight"
CONFIG_EDITS = {
    "is of model type 'llama'": lambda c: c.update(model_type="llama"),
    "T5GemmaEncoderModel. Only those that generate": lambda c: c.update(architectures=["T5GemmaEncoderModel"]),
    "holds a A and B. Only those": lambda c: c.update(architectures=["A", "B"]),
    "config.json cannot be loaded": lambda c: c.update(encoder=3),
    "quantised weights": lambda c: c.update(quantization_config={"quant_method": "gguf"}),
    "has the shape": lambda c: c["encoder"].update(intermediate_size=80),
    "has besides .* such as model.decoder.layers.1": lambda c: c["decoder"].update(
        num_hidden_layers=1, layer_types=["sliding_attention"]
    ),
}


@pytest.mark.parametrize("pattern", CONFIG_EDITS)
def test_configs_that_are_refused(checkpoint, pattern):
    folder = checkpoint("t5gemma")
    edit(folder / "config.json", CONFIG_EDITS[pattern])
    with pytest.raises(UserError, match=pattern):
        validate(folder)


def test_files_that_are_refused(checkpoint):
    folder = checkpoint("t5gemma")
    edit(folder / "tokenizer_config.json", lambda c: c.pop("tokenizer_class"))
    with pytest.raises(UserError, match="names no tokenizer_class"):
        validate(folder)
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="GemmaTokenizer", auto_map={}))
    with pytest.raises(UserError, match="code of its own"):
        validate(folder)
    edit(folder / "tokenizer_config.json", lambda c: c.pop("auto_map"))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        validate(folder)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json or tokenizer\.model, so its tokenizer has no words"):
        validate(folder)
    edit(folder / "model.safetensors.index.json", lambda c: c["weight_map"].update({NORM: "../other.safetensors"}))
    with pytest.raises(UserError, match="no file of its own folder"):
        validate(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="t5gemma merge"):
        validate(folder)


def test_a_diverged_model_is_refused(checkpoint):
    folder = checkpoint("adapted_seq2seq")
    edit_weights(folder, lambda tensors: tensors[NORM].fill_(float("nan")), NORM)
    with pytest.raises(UserError, match="not finite"):
        validate(folder)


def test_what_stock_transformers_would_read_otherwise_is_refused(made, monkeypatch):
    stock = transformers.T5GemmaForConditionalGeneration

    class Other:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            model, found = stock.from_pretrained(*args, **kwargs)
            with torch.no_grad():
                model.model.decoder.norm.weight.add_(0.5)
            return model, found

    monkeypatch.setattr(transformers, "T5GemmaForConditionalGeneration", Other)
    with pytest.raises(UserError, match=r"gives logits .* another model in silence"):
        validate(made["t5gemma"])
