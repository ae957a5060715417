"""examples/adapt.py as its users run it: config files, the command line, kills."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.checkpoints import find
from modeling_t5gemma.training.run import make_trainer
from tests import tiny
from tests.ranks import free_port
from tests.warm import WARM_PYTHON

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("adapt_*.yaml"))


@pytest.fixture(scope="module")
def adapt():
    spec = importlib.util.spec_from_file_location("adapt", ROOT / "examples" / "adapt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["adapt"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path) -> Path:
    """A tiny student and its original, a text, and a config file for them."""
    source = tiny.gemma3()
    student, tokenizer = tiny.layerwise(source, bidirectional_layers="all"), tiny.word_tokenizer()
    for model, name in ((student, "student"), (source, "original")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "student" / "NOTICE").write_text("made of something")
    words = random.Random(0)
    lines = [
        {"text": " ".join(f"w{words.randrange(4, tiny.VOCAB)}" for _ in range(words.randrange(8, 40)))}
        for _ in range(60)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    settings = {
        "model": {"path": str(tmp_path / "student"), "teacher": str(tmp_path / "original")},
        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}], "window": 16, "held_out": 4, "block": 16},
        "recipe": {"frozen": ["embeddings"]},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": 3,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "report_to": "none",
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(config: Path, *arguments: str, python: Sequence[str] = (WARM_PYTHON,)) -> subprocess.Popen:
    command = [*python, "examples/adapt.py", "--config", str(config), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-4000:]
    return output


def steps_of(folder: Path) -> dict[int, float]:
    log = json.loads((folder / "summary.json").read_text())["log"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(config, tmp_path):
    whole = finish(start(config, "--training.output_dir", str(tmp_path / "whole"), python=[sys.executable]))
    assert "skipped" in whole and "text.jsonl" in whole
    out, moments = tmp_path / "out", random.Random(int(time.time()))
    for after in (2, 5):
        process = start(config)
        # A checkpoint a step: wherever the kill falls, one is being written or has just been.
        while process.poll() is None and not list(out.glob(f"checkpoint-{after}")):
            time.sleep(0.005)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert find(out).last is not None
    process = start(config)
    while process.poll() is None and not list(out.glob("checkpoint-8")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, code=128 + signal.SIGTERM)
    assert "Stopped by SIGTERM" in stopped and "Traceback" not in stopped
    assert "Going on from" in finish(start(config))
    assert steps_of(out) == steps_of(tmp_path / "whole")
    assert (out / "NOTICE").exists() and (find(out).last / "sentinels.json").exists()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert type(AutoModelForSeq2SeqLM.from_pretrained(out)).__module__ == "modeling_t5gemma.modeling_t5gemma"


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--main_process_port",
        ],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launchers_give_the_losses_of_one_process(launcher, config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHON_EXEC", WARM_PYTHON)  # for the ranks
    few = ["--training.max_steps", "3", "--training.save_steps", "3", "--data.max_bad", "1"]
    few += ["--model.teacher_dtype", "float32"]  # bfloat16 rounds a batch of one otherwise than one of two
    finish(start(config, *few, "--training.output_dir", str(tmp_path / "one")))
    halved = ["--training.output_dir", str(tmp_path / "two"), "--training.per_device_train_batch_size", "1"]
    finish(start(config, *few, *halved, python=[WARM_PYTHON, "-m", *launcher, str(free_port())]))
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert sorted(two) == [1, 2, 3] and two == pytest.approx(one, abs=1e-5)


def parse(adapt, *arguments: str):
    return adapt.settings_of(list(arguments))[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, adapt, tmp_path):
    settings = parse(adapt, "--config", str(path), "--training.output_dir", str(tmp_path), "--training.bf16", "false")
    assert settings.training.max_steps > 0 and settings.model.teacher
    assert CONFIGS and settings.data.window in (256, 8192)


def test_shipped_sharding_configs_load():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    configs = ROOT / "examples" / "configs"
    loaded = load_config_from_file(str(configs / "fsdp2.yaml"))
    assert loaded.fsdp_config["fsdp_version"] == 2
    from modeling_t5gemma.stacks import T5GemmaPreTrainedModel

    wrapped = set(loaded.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","))
    assert wrapped == set(T5GemmaPreTrainedModel._no_split_modules)
    assert HfDeepSpeedConfig(str(configs / "zero3.json")).is_zero3()


def test_any_key_is_overridden_and_an_unknown_one_refused(config, adapt, capsys):
    settings = parse(
        adapt,
        "--config",
        str(config),
        "--training.learning_rate",
        "0.5",
        "--objective",
        "{name: prefix_lm, cut: random}",
    )
    assert settings.training.learning_rate == 0.5 and settings.objective == {"name": "prefix_lm", "cut": "random"}
    with pytest.raises(SystemExit) as stopped:
        parse(adapt, "--config", str(config), "--training.learning_rat", "0.5")
    assert stopped.value.code == 2 and "learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model.teacher", "{tmp}/nowhere"], "There is no folder .*nowhere"),
        (["--model.path", "{tmp}/original"], "no encoder-decoder. Convert it first"),
        (["--data.window", "100000"], "was made for 256"),
        (["--data.pack", "[8, 8]"], "raise data.pack or lower data.window"),
        (["--objective", "ul2", "--recipe.sentinels", "[80, 81, 82, 83, 84, 85, 86]"], "cannot teach corrupted text"),
        (["--objective", "ul2"], "sentinels"),
        (["--objective", "ul3"], "ul3"),
        (["--data.sources", "[{{path: {tmp}/none.jsonl}}]"], "does not exist"),
        (["--data.held_out", "100000"], "cannot be held out"),
        (["--data.max_bad", "0"], "no json|JSON|bad records"),
        (["--data.sources", "[]"], "data.sources is empty"),
        (["--data.sources", "[{{path: {tmp}/text.jsonl, column: words}}]"], "no record with a text in 'words'"),
        (["--distillation.share", "1.5"], "distillation.share .1.5. between 0 and 1"),
        (["--distillation.temperature", "0"], "temperature .0.0. is above 0"),
        (["--recipe.alone", "-1"], "are not negative"),
        (["--recipe.learning_rates", "{{heads: 2}}"], "No part is called heads"),
        (["--model.teacher", "{tmp}/student"], "is an encoder-decoder .adapted_seq2seq., and a teacher is"),
        (
            ["--model.teacher", "null", "--model.teacher_cache", "x", "--distillation.temperature", "2"],
            "Samples .* forward KL at temperature 1 alone",
        ),
        (["--training.output_dir", "{tmp}/student"], "begins as and would overwrite"),
        (["--training.output_dir", "{tmp}/text.jsonl"], "cannot be made: File exists"),
    ],
)
def test_bad_settings_are_told_in_one_line(arguments, words, config, adapt, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        make_trainer(parse(adapt, "--config", str(config), *(each.format(tmp=tmp_path) for each in arguments)))
    assert "\n" not in str(error.value)


def test_a_folder_with_another_run_is_refused(config, adapt, tmp_path):
    trainer = make_trainer(
        parse(adapt, "--config", str(config), "--training.max_steps", "1", "--training.eval_strategy", "no")
    )
    trainer.train()
    with pytest.raises(UserError, match=r"another data.seed"):
        make_trainer(parse(adapt, "--config", str(config), "--training.max_steps", "1", "--data.seed", "1"))


def test_a_student_that_is_not_whole_is_refused(config, adapt, tmp_path):
    """What transformers would fill with random tensors, or end with a traceback for."""
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    weights = student.state_dict()
    del weights["model.decoder.layers.0.mlp.up_proj.weight"]
    student.save_pretrained(tmp_path / "spoilt", state_dict=weights)
    short = shutil.copytree(tmp_path / "student", tmp_path / "short") / "model.safetensors"
    short.write_bytes(short.read_bytes()[:20_000])
    other = T5Config(vocab_size=tiny.VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(other).save_pretrained(tmp_path / "t5")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for name, words in {
        "spoilt": r"spoilt lacks 1 tensors such as model\.decoder\.layers\.0\.mlp",
        "short": "short/model.safetensors is damaged or cut short",
        "t5": "t5 is a t5. Of encoder-decoders, only T5Gemma's kind",
        "lora": "lora is an adapter. Merge it into its base first: t5gemma merge",
    }.items():
        tiny.word_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=words):
            make_trainer(parse(adapt, "--config", str(config), "--model.path", str(tmp_path / name)))


def test_text_that_was_changed_after_it_was_tokenised_is_refused(config, adapt, tmp_path):
    settings = ["--config", str(config)]
    with pytest.raises(UserError, match="cannot be held out"):
        make_trainer(parse(adapt, *settings, "--data.held_out", "100000"))
    text = tmp_path / "text.jsonl"
    text.write_text(text.read_text() * 2)
    with pytest.raises(UserError, match=r"text.jsonl has changed since it was tokenised .*Remove (\S+) to") as error:
        make_trainer(parse(adapt, *settings))
    shutil.rmtree(re.search(r"Remove (\S+) to", str(error.value))[1])
    make_trainer(parse(adapt, *settings))
    text.unlink()  # it is not needed any more
    make_trainer(parse(adapt, *settings))


def test_it_is_refused_before_its_text_is_read(config, adapt, tmp_path, monkeypatch):
    make_trainer(parse(adapt, "--config", str(config), "--training.max_steps", "1")).train()
    monkeypatch.setattr("modeling_t5gemma.training.run.samples_of", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"another data.window"):
        make_trainer(parse(adapt, "--config", str(config), "--training.max_steps", "1", "--data.window", "12"))


def test_ul2_then_prefix_lm_packed_with_workers(config, adapt):
    stages = [
        {"objective": {"denoisers": [{"mean_span": 3, "rate": 0.3}]}, "share": 0.5},
        {"objective": "prefix_lm", "share": 0.5},
    ]
    changes = {
        "model.teacher": "null",
        "data.pack": "[40, 40]",
        "data.workers": "1",
        "training.max_steps": "3",
        "recipe.sentinels": "[80, 81, 82, 83, 84, 85]",
        "objective": json.dumps(stages),
    }
    arguments = [word for key, value in changes.items() for word in (f"--{key}", value)]
    trainer = make_trainer(parse(adapt, "--config", str(config), *arguments))
    trainer.train()
    assert trainer.state.global_step == 3
