"""examples/dpo.py and examples/grpo.py as their users run them: config files, the command line, records."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSeq2SeqLM

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.preference_run import make_dpo_trainer, make_grpo_trainer
from tests import tiny
from tests.post_training import first_word
from tests.post_training.test_dpo import TEMPLATE

ROOT = Path(__file__).parents[2]
CONFIGS = {kind: sorted((ROOT / "examples" / "configs").glob(f"{kind}_*.yaml")) for kind in ("dpo", "grpo")}
MAKE = {"dpo": make_dpo_trainer, "grpo": make_grpo_trainer}


@pytest.fixture(scope="module")
def scripts():
    found = {}
    for name in MAKE:
        spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found[name]
        spec.loader.exec_module(found[name])
    return found


@pytest.fixture
def config(tmp_path):
    """Config files for a tiny model and records of each kind."""
    model, tokenizer = first_word.model(), tiny.word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "NOTICE").write_text("made of something")
    rng = random.Random(0)
    rows = []
    for _ in range(24):
        words = [f"w{rng.randrange(20, 30)}" for _ in range(3)]
        rows.append({"prompt": " ".join(words), "chosen": words[0], "rejected": "w90", "answer": words[0]})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": {"path": str(tmp_path / "records.jsonl")}, "held_out": 4, "max_source": 16},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "report_to": "none",
        },
    }
    rewards = [
        "exact_match",
        {"function": "length_penalty", "weight": 0.5, "arguments": {"max_length": 4, "buffer": 2}},
    ]
    kinds = {"dpo": {"beta": 0.2}, "grpo": {"rewards": rewards, "num_generations": 2, "max_completion_length": 4}}
    for name, section in kinds.items():
        data = common["data"] | ({"max_target": 8} if name == "dpo" else {})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**common, "data": data, name: section}))
    return lambda name: str(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("path", [path for each in CONFIGS.values() for path in each], ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, scripts, tmp_path):
    name = path.stem.partition("_")[0]
    settings, resume = scripts[name].settings_of(
        ["--config", str(path), "--training.output_dir", str(tmp_path), "--training.bf16", "false"]
    )
    getattr(settings, name).check()
    assert resume == "auto" and settings.model.path.startswith("tuned")
    if name == "grpo":
        from modeling_t5gemma.post_training.rewards import load_rewards

        assert load_rewards(settings.grpo.rewards)


def test_configs_of_the_pipeline_are_there():
    assert {path.stem for each in CONFIGS.values() for path in each} >= {
        "dpo_laptop",
        "dpo_2b-2b",
        "grpo_laptop",
        "grpo_2b-2b",
        "grpo_9b-2b",
    }


@pytest.mark.curves
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_from_a_config_file(name, lora, scripts, config, tmp_path, monkeypatch, capsys):
    arguments = [f"{name}.py", "--config", config(name), *(["--lora", "{rank: 2}"] if lora else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    scripts[name].main()
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["step"] == 2 and summary["settings"]["model"]["path"] == str(tmp_path / "model")
    assert (out / "NOTICE").exists() and (out / "curves.png").exists()
    assert (out / "base.json").exists() == lora and (out / "adapter_config.json").exists() == lora
    assert bool(list(out.glob("reference-*.npy"))) == (name == "dpo" and not lora)
    if not lora:
        assert type(AutoModelForSeq2SeqLM.from_pretrained(out)).__module__ == "modeling_t5gemma.modeling_t5gemma"
    scripts[name].main()
    assert "Going on from" in capsys.readouterr().err


def test_epochs_become_steps_and_columns_and_chat_are_as_asked(scripts, config, tmp_path):
    arguments = {
        "--training.max_steps": "-1",
        "--training.num_train_epochs": "2",
        "--data.columns": "{prompt: answer}",
        "--data.chat": "true",
        "--grpo.num_iterations": "2",
        "--grpo.rewards": "[{function: matches, arguments: {pattern: w}}]",
    }
    settings, _ = scripts["grpo"].settings_of(
        ["--config", config("grpo"), *(w for pair in arguments.items() for w in pair)]
    )
    trainer = make_grpo_trainer(settings)
    assert trainer.args.max_steps == 40  # 20 prompts, 2 a step, 2 epochs, 2 steps on each batch
    batch = next(iter(trainer.get_train_dataloader()))
    prompt = batch["prompts"][0]
    assert prompt.prompt == [{"role": "user", "content": prompt.prompt[0]["content"]}]
    assert prompt.source.tolist()[0] == 10 and prompt.source.tolist()[-1] == 11 and len(prompt.source) == 4
    assert set(prompt.columns) == {"chosen", "rejected"}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_reference_is_loaded_where_it_is_needed(loaded, scripts, config):
    lora = [] if loaded else ["--lora", "{rank: 2}"]
    settings, _ = scripts["grpo"].settings_of(["--config", config("grpo"), "--grpo.beta", "0.1", *lora])
    trainer = make_grpo_trainer(settings)
    assert (trainer.reference.loaded is not None) == loaded
    settings, _ = scripts["dpo"].settings_of(["--config", config("dpo"), "--dpo.reference", "loaded"])
    assert make_dpo_trainer(settings).reference.loaded is not None


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("dpo", ["--data.columns", "{chosen: better}"], r"no column 'better'. It has 'prompt', 'chosen'"),
        ("dpo", ["--model.teacher", "x"], "no teacher here"),
        ("dpo", ["--data.max_source", "1000"], "was made for 256"),
        ("dpo", ["--dpo.beta", "-1"], "beta is -1"),
        ("dpo", ["--dpo.reference", "adapter_off"], "no adapter to switch off"),
        ("dpo", ["--data.held_out", "24"], "cannot be held out"),
        ("dpo", ["--data.train.path", "none.jsonl"], "does not exist"),
        ("dpo", ["--lora", "{four_bit: true}"], "four_bit"),
        ("dpo", ["--dpo", "{reference: loaded, reference_model: ORIGINAL}"], "is a gemma3_text, no encoder-decoder"),
        ("grpo", ["--grpo.reference_model", "x"], "with beta 0 no reference is asked"),
        ("grpo", ["--grpo.rewards", "[]"], "There is no reward"),
        ("grpo", ["--grpo.rewards", "[nothing]"], "is no function: take exact_match"),
        ("grpo", ["--grpo.max_completion_length", "1000"], "was made for 256"),
        ("grpo", ["--data.held_out", "0"], "needs held-out prompts"),
    ],
)
def test_bad_settings_are_told_in_one_line(name, arguments, words, scripts, config, tmp_path):
    tiny.gemma3().save_pretrained(tmp_path / "original")
    tiny.word_tokenizer().save_pretrained(tmp_path / "original")
    arguments = [word.replace("ORIGINAL", str(tmp_path / "original")) for word in arguments]
    with pytest.raises(UserError, match=words) as error:
        MAKE[name](scripts[name].settings_of(["--config", config(name), *arguments])[0])
    assert "\n" not in str(error.value)


def test_a_folder_with_another_run_is_refused(scripts, config):
    first, _ = scripts["dpo"].settings_of(["--config", config("dpo"), "--training.max_steps", "1"])
    make_dpo_trainer(first).train()
    changed = ["--training.max_steps", "1", "--dpo.beta", "0.3"]
    other, _ = scripts["dpo"].settings_of(["--config", config("dpo"), *changed])
    with pytest.raises(UserError, match=r"another dpo\.beta"):
        make_dpo_trainer(other)
