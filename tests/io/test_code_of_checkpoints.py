"""No code of a checkpoint is run, and nobody is asked whether it may be: not by any command or trainer."""

from __future__ import annotations

import builtins
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import modeling_t5gemma
from modeling_t5gemma import cli
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.checkpoints import load_config, load_model, load_tokenizer
from tests.io.conftest import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch, tmp_path):
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked on standard input")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


def with_code(folder: Path, *names: str) -> Path:
    """Code beside a checkpoint that leaves a file where it runs."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"open({str(folder.parent / 'ran')!r}, 'w')\n"
            "from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
            "class Config(PreTrainedConfig):\n    model_type = 'evil'\n"
            "class Model(PreTrainedModel):\n    config_class = Config\n"
            "class Tokenizer(PreTrainedTokenizerFast): pass\n"
            "def generate(*args, **kwargs): pass\n"
        )
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "a the", "prompt": "a", "completion": "the", "description": "a the"}) + "\n")
    return file


def run(monkeypatch, program: str, arguments: list[str]) -> None:
    """A command of ``t5gemma``, or a script of examples/."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if (script := ROOT / "examples" / f"{program}.py").exists():
        spec = importlib.util.spec_from_file_location(f"example_{program}", script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main()
    else:
        monkeypatch.setattr(sys, "argv", ["t5gemma", program, *arguments])
        cli.app(standalone_mode=False)


TRAIN = "--training.output_dir out --training.use_cpu true --training.report_to none"
COMMANDS = {
    "generate": "EVIL --input TEXTS",
    "chat": "EVIL",
    "fill": "EVIL <mask>",
    "tokenize": "TEXTS --tokenizer EVIL --output out --processes 1",
    "export": "EVIL --format torch --output out",
    "efficiency": "EVIL --calculated",
    "evaluate": f"EVIL --suite boolq --data {ROOT / 'tests' / 'evaluation' / 'fixtures'}",
    "convert": "--enc EVIL --dec EVIL --output out",
    "verify": "EVIL GOOD",
    "inspect": "EVIL",
    "average": "EVIL EVIL --output out",
    "publish": "EVIL owner/name --base owner/base --dry-run",
    "teacher-cache": "TEXTS --teacher EVIL --output out",
    "merge": "ADAPTER --output out",
    "adapt": '--model.path EVIL --data.sources [{"path":"TEXTS"}] ' + TRAIN,
    "sft": f"--model.path EVIL --data.train.path TEXTS {TRAIN}",
    "dpo": f"--model.path EVIL --data.train.path TEXTS {TRAIN}",
    "grpo": '--model.path EVIL --data.train.path TEXTS --grpo.rewards ["exact_match"] ' + TRAIN,
    "embed": f"--model.path EVIL --data.train TEXTS --data.test TEXTS {TRAIN}",
    "superglue": "--model EVIL --task boolq --output out --training.output_dir x --training.report_to none",
}
OF_DECODER_ONLY = ("convert", "verify", "teacher-cache")


def refusal(monkeypatch, command: str, evil: Path, texts: Path) -> str:
    adapter = evil.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(evil)}))
    names = {"EVIL": evil, "TEXTS": texts, "GOOD": checkpoint("layerwise"), "ADAPTER": adapter}
    arguments = COMMANDS[command]
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    with pytest.raises(UserError) as error:
        run(monkeypatch, command, arguments.split())
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_the_code_of_a_config(command, spoilt, texts, monkeypatch):
    kind = "decoder_only" if command in OF_DECODER_ONLY else "layerwise"
    evil = with_code(spoilt(kind, model_type="evil", auto_map={"AutoConfig": "evil.Config"}), "evil.py")
    assert "evil" in refusal(monkeypatch, command, evil, texts)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_the_code_of_a_tokenizer(command, spoilt, texts, monkeypatch):
    kind = "decoder_only" if command in OF_DECODER_ONLY else "layerwise"
    named = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    evil = with_code(spoilt(kind, "tokenizer_config.json", **named), "evil.py")
    assert "tokenizer_config.json asks for code of its own" in refusal(monkeypatch, command, evil, texts)


class TestDoors:
    @pytest.mark.parametrize(
        "fields",
        [
            {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}},
            {"auto_map": {"AutoModel": "owner/repo--evil.Model"}},
            {"auto_map": "evil.Config"},
            {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
            {"attn_implementation": "owner/kernels"},
            {"_attn_implementation": "owner/kernels:forward"},
        ],
    )
    @pytest.mark.parametrize("kind", ["separate", "layerwise", "decoder_only"])
    def test_a_config(self, kind, fields, spoilt):
        folder = with_code(spoilt(kind, **fields), "evil.py")
        for load in (load_config, load_tokenizer, lambda folder: load_model(AutoModelForSeq2SeqLM, folder)):
            with pytest.raises(UserError, match=r"config\.json asks for .*never run"):
                load(folder)

    @pytest.mark.parametrize("name", ["custom_generate", "dola_layers", "penalty_alpha", "force_words_ids"])
    def test_generate_s_own(self, name, spoilt):
        folder = spoilt("layerwise", "generation_config.json", **{name: "high" if name == "dola_layers" else 0.5})
        with pytest.raises(UserError, match=rf"generation_config\.json asks for code of its own \({name}\)"):
            load_model(AutoModelForSeq2SeqLM, folder)

    def test_a_folder_of_generate_s_own(self, spoilt):
        folder = with_code(spoilt("layerwise"), "custom_generate/generate.py")
        with pytest.raises(UserError, match="custom_generate is code"):
            load_model(AutoModelForSeq2SeqLM, folder)

    def test_our_own_checkpoints_are_read_by_the_installed_package(self, spoilt):
        folder = with_code(spoilt("layerwise"), "modeling_t5gemma.py", "configuration_t5gemma.py", "stacks.py")
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoConfig"] == "configuration_t5gemma.AdaptedSeq2SeqConfig"
        model, _ = load_model(AutoModelForSeq2SeqLM, folder)
        assert type(model) is modeling_t5gemma.AdaptedSeq2SeqForConditionalGeneration
        config["auto_map"]["AutoModelForSeq2SeqLM"] = "modeling_t5gemma.Other"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="code of its own"):
            load_model(AutoModelForSeq2SeqLM, folder)

    @pytest.mark.parametrize("honest", [True, False])
    def test_pickles(self, honest, spoilt):
        folder = spoilt("layerwise")
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        content = weights if honest else _Runs(str(folder.parent / "ran"))
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
            load_model(AutoModelForSeq2SeqLM, folder)


class _Runs:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")
