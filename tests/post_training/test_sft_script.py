"""examples/sft.py as its users run it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.sft_run import make_trainer
from tests import tiny
from tests.post_training.chat import SIZE, TEMPLATE, chat_tokenizer, words, write

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("sft_*.yaml"))


@pytest.fixture(scope="module")
def sft():
    spec = importlib.util.spec_from_file_location("sft", ROOT / "examples" / "sft.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path) -> list[str]:
    """The arguments of a run with an adapter, on a tokenizer without a template."""
    tiny.t5gemma({**tiny.BALANCED, "vocab_size": SIZE}, {**tiny.BALANCED, "vocab_size": SIZE}).save_pretrained(
        tmp_path / "model"
    )
    chat_tokenizer(template=None).save_pretrained(tmp_path / "model")
    (tmp_path / "turns.jinja").write_text(TEMPLATE)
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "train": {"path": write(tmp_path / "train.jsonl", [*words(20), {"prompt": [], "completion": []}])},
            "eval": {"path": write(tmp_path / "eval.jsonl", words(4, seed=1))},
            "chat_template": str(tmp_path / "turns.jinja"),
            "max_source": 40,
            "max_target": 12,
        },
        "lora": {"rank": 2},
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "report_to": "none",
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(tmp_path / "config.yaml")]


def test_a_run_and_the_same_command_again(config, sft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", *config])
    sft.main()
    told = capsys.readouterr()
    assert "train.jsonl (train): 20 examples of 21 records; skipped 1 for: no messages" in told.out
    assert "train.jsonl:21" in told.out and "question: <start_of_turn>user" in told.out + told.err
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").exists() and (out / "base.json").exists()
    # A separate encoder's texts have no <bos>, and the template that is saved writes none.
    assert (out / "chat_template.jinja").read_text() == "{%- set bos_token = '' -%}" + TEMPLATE
    sft.main()
    assert "Going on from" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"another lora.rank"):
        make_trainer(sft.settings_of([*config, "--lora.rank", "3"])[0])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, sft, tmp_path):
    arguments = ["--config", str(path), "--training.output_dir", str(tmp_path), "--training.bf16", "false"]
    settings, resume = sft.settings_of(arguments)
    assert CONFIGS and settings.lora is None and settings.evaluation.generate and resume == "auto"
    changed, _ = sft.settings_of(
        [*arguments, "--lora.rank", "4", "--data.columns.prompt", "article", "--data.pack", "[9, 9]"]
    )
    assert changed.lora.rank == 4 and changed.lora.alpha == 32 and changed.data.pack == (9, 9)
    assert changed.data.columns.prompt == "article" and changed.data.columns.completion == "completion"


def test_an_unknown_key_is_refused(config, sft, capsys):
    with pytest.raises(SystemExit) as stopped:
        sft.settings_of([*config, "--data.max_sauce", "3"])
    assert stopped.value.code == 2 and "max_sauce" in capsys.readouterr().err
