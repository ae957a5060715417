"""``t5gemma export`` as its users run it: what is in the folder, whether its card's code runs, what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from modeling_t5gemma.commands.export import export_command
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.exporting import ctranslate2_model
from modeling_t5gemma.exporting.decoding import Decoding
from modeling_t5gemma.exporting.deviation import Behaviour, Deviation
from modeling_t5gemma.exporting.packages import Packages
from modeling_t5gemma.exporting.samples import Sample
from modeling_t5gemma.inference.loading import load_checkpoint
from tests import tiny
from tests.exporting.conftest import FULL, STACK, TEXT, save

ONE = {**STACK, "num_hidden_layers": 1, "layer_types": FULL[:1]}


@pytest.fixture(scope="module")
def separate(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save(tiny.t5gemma(ONE, ONE), tmp_path_factory.mktemp("checkpoints") / "prose-1b")


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(f"{TEXT}\n\n{TEXT[10:]}\n")
    return path


def command(*arguments: object) -> str:
    app = typer.Typer(add_completion=False)
    app.command()(export_command)
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def run_card(folder: Path) -> str:
    """What the code in an export's card prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "where/this/lies" in code
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("where/this/lies", str(folder)), {})
    return out.getvalue()


@pytest.mark.parametrize(
    ("format", "quantization", "files"),
    [
        ("ctranslate2", "int8", {"model.bin", "shared_vocabulary.json"}),
        ("torch", "float32", {"encoder.pt2", "decoder_step.pt2"}),
    ],
)
def test_an_export(separate, texts, tmp_path, format, quantization, files):
    out = tmp_path / "out"
    shown = command(separate, "--format", format, "--output", out, "--quantization", quantization, "--texts", texts)
    assert {path.name for path in out.iterdir()} == files | {
        "README.md", "MODEL_CARD.md", "NOTICE", "GEMMA_TERMS.md", "export.json", "config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("NOTICE", "GEMMA_TERMS.md"):
        assert (out / name).read_bytes() == (separate / name).read_bytes()
    assert (out / "MODEL_CARD.md").read_bytes() == (separate / "README.md").read_bytes()
    record = json.loads((out / "export.json").read_text())
    assert (record["format"], record["quantization"], record["checkpoint"]) == (format, quantization, "prose-1b")
    assert record["deviation"]["texts"] == 2 and record["versions"].keys() >= {"torch", "transformers"}
    card = (out / "README.md").read_text()
    for _, value in Deviation(**record["deviation"]).rows():
        assert value in shown and value in card
    assert all(limit in card for limit in record["limits"])
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("gemma", "google/gemma-2-2b") and quantization in data.tags
    assert str(tmp_path) not in card + json.dumps(record) + (out / "config.json").read_text()
    assert re.search(r"w\d+|<unk>", run_card(out))
    if format == "torch":
        assert record["deviation"]["greedy_equal"] == 2 and record["deviation"]["largest_difference"] < 1e-4
        assert Packages.load(out).decoding.start == 2
    else:
        assert record["deviation"]["mean_difference"] > 0
        with pytest.raises(UserError, match="runtime of its own"):
            Packages.load(out)


def test_what_is_in_the_way_stays(separate, texts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    arguments = [separate, "--format", "ctranslate2", "--output", out, "--texts", texts]
    with pytest.raises(UserError, match="exists"):
        command(*arguments)
    for name in ("config.json", "export.json"):  # a checkpoint is no export
        with pytest.raises(UserError, match="leaves it alone"):
            command(*arguments, "--overwrite")
        (out / name).write_text("{}")
    command(*arguments, "--overwrite")
    assert not (out / "mine").exists() and (out / "model.bin").is_file()


def test_the_checkpoint_itself_is_never_replaced(separate, texts, tmp_path):
    checkpoint = Path(shutil.copytree(separate, tmp_path / "run" / "checkpoint-10"))
    (checkpoint.parent / "config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for out in (checkpoint, checkpoint.parent):
        (out / "export.json").write_text("{}")
        with pytest.raises(UserError, match=r"is or holds .*checkpoint-10, which would be lost"):
            command(checkpoint, "--format", "ctranslate2", "--output", out, "--texts", texts, "--overwrite")
    (checkpoint / "export.json").unlink()
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_what_fails_half_way_leaves_nothing(separate, texts, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ctranslate2_model.CTranslate2, "load", stop)
    target = tmp_path / "new" / "out"
    app = typer.Typer(add_completion=False)
    app.command()(export_command)
    arguments = [separate, "--format", "ctranslate2", "--output", target, "--texts", texts]
    assert CliRunner().invoke(app, [str(each) for each in arguments]).exit_code != 0
    assert not target.parent.exists()


def test_terms_of_a_run_go_with_its_checkpoints(separate, texts, tmp_path):
    """They lie beside what the run began as, whose path is as it was typed, in whatever folder that was."""
    run = tmp_path / "run"
    shutil.copytree(separate, tmp_path / separate.name)
    checkpoint = save(tiny.t5gemma(ONE, ONE), run / "checkpoint-10")
    (checkpoint / "LICENSES").mkdir()
    for name in ("NOTICE", "GEMMA_TERMS.md", "README.md"):
        (checkpoint / name).unlink()
    (run / "run.json").write_text(json.dumps({"model": {"path": separate.name}}))
    out = tmp_path / "out"
    command(checkpoint, "--format", "ctranslate2", "--output", out, "--texts", texts)
    assert (out / "NOTICE").read_bytes() == (separate / "NOTICE").read_bytes()
    assert not (out / "MODEL_CARD.md").exists() and not (out / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"--format": "gguf"}, "none of ctranslate2, torch, onnx"),
        ({"--quantization": "int4"}, "has float32, bfloat16, int8"),
        ({"--format": "onnx", "--quantization": "int8"}, "has float32"),
        ({"--texts": "gone.txt"}, "a text a line"),
    ],
)
def test_options_that_cannot_be(separate, texts, tmp_path, options, pattern):
    given = {"--format": "ctranslate2", "--output": tmp_path / "out", "--texts": texts, **options}
    with pytest.raises(UserError, match=pattern):
        command(separate, *(part for option in given.items() for part in option))


def test_a_missing_package_names_the_extra(separate, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install modeling_t5gemma\[export\]"):
        command(separate, "--format", "onnx", "--output", tmp_path / "out")


def test_a_missing_runtime_names_the_extra(separate, tmp_path, monkeypatch):
    decoding = Decoding.of(load_checkpoint(str(separate)), "float32")
    record = {"format": "onnx", "decoding": vars(decoding)}
    (tmp_path / "export.json").write_text(json.dumps(record))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"ONNX Runtime: pip install modeling_t5gemma\[export\]"):
        Packages.load(tmp_path)
    with pytest.raises(UserError, match=r"missing or damaged.*t5gemma export"):
        Packages.load(separate)


def test_texts_that_cannot_be_cut(separate, tmp_path):
    (tmp_path / "short").write_text("w5 w6\n")
    (tmp_path / "empty").write_text("\n")
    for name, pattern in (("short", "has 2 tokens"), ("empty", "has no text")):
        with pytest.raises(UserError, match=pattern):
            command(separate, "--format", "torch", "--output", tmp_path / "out", "--texts", tmp_path / name)


def test_other_checkpoints_are_refused(separate, texts, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    decoder_only, diverged = tmp_path / "decoder-only", tmp_path / "diverged"
    save(tiny.gemma3(), decoder_only)
    model = tiny.t5gemma(ONE, ONE)
    model.model.decoder.norm.weight.data.fill_(float("nan"))
    save(model, diverged)
    for folder, pattern in (
        (tmp_path / "gone", "is no folder"),
        (adapter, "t5gemma merge"),
        (decoder_only, "gemma3_text.*t5gemma convert"),
        (save(tiny.layerwise(tiny.gemma3()), tmp_path / "layerwise"), "layerwise cross-attention"),
        (diverged, "not finite"),
    ):
        with pytest.raises(UserError, match=pattern):
            command(folder, "--format", "ctranslate2", "--output", tmp_path / "out", "--texts", texts)
    assert not (tmp_path / "out").exists()


def test_the_figures_of_a_deviation():
    samples = [Sample([2, 3], [4, 5]), Sample([2], [6])]
    own = Behaviour([[-1.0, -2.0], [-3.0]], [[7, 8, 1], [9, 9]])
    other = Behaviour([[-1.5, -2.0], [-2.0]], [[7, 8, 1], [9, 1]])
    found = Deviation.between(own, other, samples)
    assert found == Deviation(
        texts=2,
        longest_source=2,
        target_tokens=3,
        model_loss=2.0,
        export_loss=pytest.approx(5.5 / 3),
        mean_difference=0.5,
        largest_difference=1.0,
        greedy_equal=1,
        greedy_tokens=5,
        greedy_tokens_equal=4,
    )
