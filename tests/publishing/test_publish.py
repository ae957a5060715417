"""``t5gemma publish`` as its users run it, against a Hub on this machine: cards, uploads, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_t5gemma.conversion.convert import hub_code_files
from modeling_t5gemma.conversion.families.gemma import GEMMA_TERMS
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.publishing.repository import prepared
from modeling_t5gemma.publishing.results import read_results
from modeling_t5gemma.publishing.settings import Publication
from modeling_t5gemma.publishing.validation import validate
from tests.publishing.conftest import TERMS, write_run
from tests.publishing.hub import Hub, Stored

TOKEN = "hf_thistokenmustneverbeprinted"
ROOT = Path(__file__).parents[2]
# Each case is a run of the command in one process; a line of JSON for each. Nobody waits between two attempts.
RUN_CASES = """
import contextlib, io, json, sys, time
import typer
from modeling_t5gemma.cli import run
from modeling_t5gemma.commands.publish import publish
time.sleep = lambda seconds: None
script = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
script.command()(publish)
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["publish", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(script)
        except SystemExit as exit_:
            code = exit_.code
    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
"""


def superglue(path: Path) -> Path:
    figure = {"mean": 0.75, "deviation": 0.01}
    tasks = {
        "cb": {"metrics": {"accuracy": figure, "f1": {**figure, "mean": 0.5}, "score": figure}, "seeds": {"0": {}}}
    }
    path.write_text(json.dumps({"model": "x", "mean_accuracy": figure, "tasks": tasks}))
    return path


def lm_eval(path: Path) -> Path:
    results = {"arc_easy": {"alias": " - arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "sample_len": 9}}
    configs = {
        "arc_easy": {
            "dataset_path": "allenai/ai2_arc",
            "dataset_name": "ARC-Easy",
            "num_fewshot": 0,
            "test_split": "test",
        }
    }
    path.write_text(json.dumps({"results": results, "configs": configs}))
    return path


def test_a_trained_checkpoints_card_says_what_its_run_did(made, checkpoint, tmp_path, terms):
    run = write_run(checkpoint("adapted_seq2seq", "run"), str(made["adapted_seq2seq"]), "google/gemma-3-1b-pt")
    (run / "optimizer.pt").write_text("")
    (run / "strange.py").write_text("raise SystemExit")
    config = json.loads((run / "config.json").read_text())
    config["_name_or_path"] = "/secret/place"
    (run / "config.json").write_text(json.dumps(config))
    given = Publication(
        run,
        "owner/name",
        bases=("google/gemma-3-270m",),
        terms=terms,
        languages=("en",),
        evaluations=(superglue(tmp_path / "results.json"), lm_eval(tmp_path / "lm.json")),
        hardware="2 cores",
    )
    with prepared(given) as ready:
        files = ready.files()
        texts = {name: (ready.folder / name).read_text() for name in files if not name.endswith(".safetensors")}
    data = ModelCard(texts["README.md"]).data
    assert (data.base_model, data.base_model_relation) == (["google/gemma-3-270m"], "finetune")
    assert (data.license, data.language, data.datasets) == ("gemma", ["en"], ["owner/prose"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"adapted_seq2seq", "distillation", "text2text-generation"} <= set(data.tags)
    values = {(r.dataset_type, r.dataset_config, r.metric_type): r.metric_value for r in data.eval_results}
    assert values == {
        ("aps/super_glue", "cb", "accuracy"): 0.75,
        ("aps/super_glue", "cb", "f1"): 0.5,
        ("allenai/ai2_arc", "ARC-Easy", "acc"): 0.5,
        ("owner/prose", "held-out", "loss"): 2.25,
        ("owner/prose", "held-out", "encoder_use"): 0.5,
    }
    (entry,) = yaml.safe_load(texts[".eval_results/aps_super_glue.yaml"])
    assert (entry["dataset"], entry["value"]) == ({"id": "aps/super_glue", "task_id": "cb"}, 0.75)
    assert yaml.safe_load(texts[".eval_results/allenai_ai2_arc.yaml"])[0]["value"] == 0.5
    card = texts["README.md"]
    for said in (
        "| learning rate | 0.0001 |",
        "| trained for | 20 steps |",
        "| rows a step | 8 |",
        "| processes | 4 |",
        "| teacher | google/gemma-3-1b-pt |",
        "| text | owner/prose, notes.jsonl |",
        "| time of the last session | 2.00 h |",
        "| real tokens a second | 200 |",
        "| peak memory of a process | 2.5 GiB |",
        "| hardware | 2 cores |",
        "(`auto_map`)",
        "(`GEMMA_TERMS.md`)",
        "prohibited_use_policy",
        "journal = {arXiv:2504.06225}",
        'text = "The text that the encoder reads"',
    ):
        assert said in card, said
    assert "not yet trained" not in card and "{{" not in card and "{%" not in card
    assert texts["GEMMA_TERMS.md"] == TERMS and "the output of google/gemma-3-1b-pt" in texts["NOTICE"]
    # Nothing of the run or the disk goes with it, and no code but the package's.
    assert not {"optimizer.pt", "strange.py", "run.json", "summary.json"} & files.keys()
    assert not any("/secret" in text or "strange" in text for text in texts.values())
    assert json.loads(texts["config.json"])["auto_map"]["AutoConfig"] == "configuration_t5gemma.AdaptedSeq2SeqConfig"
    assert texts["modeling_t5gemma.py"] == (ROOT / "modeling_t5gemma" / "modeling_t5gemma.py").read_text()


def test_a_checkpoint_in_the_midst_of_a_run_is_told_as_such(made, checkpoint, tmp_path, terms):
    run = write_run(tmp_path / "run", str(made["t5gemma"]))
    folder = checkpoint("t5gemma", "run/checkpoint-10")
    (folder / "conversion.json").unlink()
    with prepared(Publication(folder, "owner/name", bases=("google/gemma-2-2b",), terms=terms)) as ready:
        data = ModelCard(ready.card).data
        assert "| trained for | 10 steps |" in ready.card and "last session" not in ready.card
        assert not any(name.endswith(".py") for name in ready.files())
        # The record of the conversion lies where the run began.
        record = json.loads((ready.folder / "conversion.json").read_text())
        assert record["cross_attention"] == "copy" and "`conversion.json` says" in ready.card
        assert "distillation" not in ready.card
    assert {r.metric_value for r in data.eval_results} == {2.5, 0.25}
    assert run == folder.parent


def test_a_checkpoint_that_nobody_measured_is_not_said_to_be_untrained(made, checkpoint, terms):
    """And one that chats is shown to."""
    run = write_run(checkpoint("adapted_seq2seq", "run"), str(made["adapted_seq2seq"]))
    folder = Path(shutil.copytree(made["adapted_seq2seq"], run / "checkpoint-5"))
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    with prepared(Publication(folder, "owner/name", bases=("google/gemma-3-270m",), terms=terms)) as ready:
        assert "## Evaluation\n\nNot evaluated.\n" in ready.card and "conversion does not train" not in ready.card
        assert "chat_template.jinja" in ready.files()
        (code,) = re.findall(r"```python\n(.*?)```", ready.card, re.DOTALL)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code.replace("owner/name", str(ready.folder)) + "print(inputs.input_ids.tolist())", {})
    ids = json.loads(out.getvalue().splitlines()[-1])
    assert ids[0].count(2) == 1 and ids[0][0] == 2, "one <bos>, the encoder's"


def test_a_licence_that_the_terms_forbid(made, terms):
    with (
        pytest.raises(UserError, match="stays under its terms"),
        prepared(Publication(made["t5gemma"], "a/b", bases=("google/gemma-2-2b",), terms=terms, license="apache-2.0")),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, r"--evaluation .* is no file"),
        ('{"results": 1}', "no results that are known here"),
        ('{"results": 1, "configs": 2}', "no results that are known here"),
        ('{"results": {}, "configs": {}}', "no results that are known here"),
        ('{"mean_accuracy": 1, "tasks": {"cb": {}}}', "no results that are known here"),
        ('{"results": {"x": {"acc,none": NaN}}, "configs": {}}', "has nan as acc of x"),
    ],
)
def test_an_unknown_file_of_results_is_refused(tmp_path, content, pattern):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=pattern):
        read_results(tmp_path / "x.json")


@pytest.mark.loopback
def test_uploads_and_what_goes_wrong_with_them(made, tmp_path, terms):
    hub = Hub()
    hub.repositories["visible/model"] = Stored(private=False)
    before = ("model-00009-of-00009.safetensors", "model.safetensors", "sentinels.json", ".eval_results/a_b.yaml")
    owners = ("notes.md", "adapter_model.safetensors", "int8/model.safetensors")
    stale = {name: name.encode() for name in (*before, *owners)}
    hub.repositories["owner/again"] = Stored(private=True, files=dict(stale))

    def command(repository: str, *options: str, kind: str = "t5gemma") -> list[str]:
        with_terms = ["--base", "google/gemma-2-2b", "--terms", str(terms)]
        return [str(made[kind]), repository, *with_terms, *options]

    cases = [
        [str(made["t5gemma"]), "owner/new", "--base", "google/gemma-2-2b"],
        command("owner/new", "--dry-run"),
        command("refused/model"),
        command("full/model"),
        command("visible/model"),
        command("dropping/model", "--quiet"),
        command("dropping/model", "--quiet"),
        command("owner/again", "--quiet"),
        command("owner/odd", "--language", "qqq"),
        command("owner/coded", "--public", kind="adapted_seq2seq"),
    ]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_CASES, json.dumps(cases)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    without, shown, refused, full, visible, dropped, resumed, again, odd, coded = map(
        json.loads, done.stdout.splitlines()
    )
    for (code, out, err), words in (
        (without, ("derivative of Gemma", "--terms FILE")),
        (refused, ("401", "hf auth login")),
        (full, ("storage of full on the Hub is full", "goes on where this one stopped")),
        (visible, ("is public", "give --public")),
        (odd, ("the card's metadata", '"language" must be one of the known')),
        (dropped, ("connection to the Hub was lost", "goes on where this one stopped")),
    ):
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    assert shown[0] == 0 and "(private); nothing was sent" in shown[1] and "NOTICE" in shown[1], shown
    assert "owner/new" not in hub.repositories and hub.repositories["visible/model"].files == {}

    # What the dropped upload had sent was not sent again; the terms were there before any weights, the config last.
    assert resumed == [0, "", ""] and again == [0, "", ""] and hub.dropped > 0
    assert len(hub.puts) == len(set(hub.puts)) == len(hub.blobs)
    uploaded = hub.repositories["dropping/model"]
    papers, weights, rest = uploaded.commits
    assert {"NOTICE", GEMMA_TERMS.terms_file, "README.md"} == set(papers) and uploaded.private
    assert set(weights) == {path.name for path in made["t5gemma"].glob("*.safetensors")}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(rest)
    for name in weights:
        assert uploaded.files[name] == (made["t5gemma"] / name).read_bytes()
    # Weights of another version go, what the owner added stays.
    changed = hub.repositories["owner/again"].files
    assert changed.keys() - uploaded.files.keys() == set(owners)

    assert coded[0] == 0 and coded[1].strip() == f"{hub.endpoint}/owner/coded", coded
    public = hub.repositories["owner/coded"]
    assert not public.private
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, data in public.files.items():
        (fetched / name).write_bytes(data)
    found = validate(fetched)
    carried = {module.split(".")[0] + ".py" for module in found.config.auto_map.values()}
    code = {path.name: path.read_bytes() for path in hub_code_files()}
    assert carried <= code.keys() and code == {name: public.files[name] for name in public.files if name[-3:] == ".py"}
