"""``t5gemma evaluate`` on twins of benchmarks, from the command line to what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lm_eval
import peft
import pytest
from transformers import AutoModelForSeq2SeqLM

from modeling_t5gemma.commands.evaluate import evaluate
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.evaluation.plan import plan
from modeling_t5gemma.evaluation.report import average, report
from modeling_t5gemma.evaluation.tasks import Tasks
from modeling_t5gemma.publishing.results import read_results
from tests.evaluation.conftest import DATA, KINDS
from tests.evaluation.twins import write_twins

LONG = {"max_position_embeddings": 2048}
SMALL = ("--data", DATA, "--shots", 1)


@pytest.fixture
def run(invoke):
    def call(*arguments: object) -> str:
        result = invoke(evaluate, *arguments)
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return call


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_both_kinds_of_models_by_one_tool(checkpoints, run, tmp_path):
    """Every kind of request: choices, contexts that are chosen, a last word, free text, whole texts."""
    suite = "boolq,arc_easy,winogrande,lambada_openai,gsm8k,wikitext"
    folders = [checkpoints(kind, **LONG) for kind in KINDS]
    shown = run(*folders, "--suite", suite, *SMALL, "--limit", 2, "--output", tmp_path)
    table = (tmp_path / "results.md").read_text()
    for name in (*suite.split(","), "of local files", "the first 2 examples", *(folder.name for folder in folders)):
        assert name in table and name in shown
    separate, layerwise, decoder_only = (folder.name for folder in folders)
    assert f"{separate}, {layerwise}: each block of 128 tokens" in table and f"{decoder_only}: each token" in table
    found = [results(tmp_path / folder.name) for folder in folders]
    assert [each["config"]["backend"] for each in found] == ["seq2seq", "seq2seq", "causal"]
    assert {each["config"]["max_length"] for each in found} == {2048}
    for each in found:
        assert list(each["results"]) == suite.split(",")
        assert each["n-shot"]["gsm8k"] == 1 and each["n-shot"]["wikitext"] == 0
        assert each["how"]["boolq"] == {
            "local": True,
            "cut": True,
            "notes": ["of local files", "the first 2 examples"],
        }
        assert each["how"]["wikitext"]["cut"] is False, "there are no more"
        assert each["configs"]["boolq"]["dataset_path"] == "aps/super_glue", "not where the files lie"
        assert str(DATA) not in json.dumps(each) and str(Path.home()) not in json.dumps(each)
    perplexities = [each["results"]["wikitext"]["word_perplexity,none"] for each in found]
    assert len(set(perplexities)) == 3


def test_the_example_of_a_task_of_ones_own(checkpoints, run, tmp_path):
    """The titles of Debian's packages, each with its own place among the choices."""
    rows = [
        {"prompt": f"About {word}s.\n\nThe title:\n", "completion": f"{word} {i}"} for i, word in enumerate("ab" * 6)
    ]
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tasks = Path(__file__).parents[2] / "examples" / "tasks"
    folder = checkpoints("layerwise", **LONG)
    own = ("--suite", "package_titles", "--include", tasks, "--data", tmp_path)
    assert "package_titles" in run(folder, *own, "--output", tmp_path / "results")
    samples = Tasks([tasks]).make(*Tasks([tasks]).leaves("package_titles"), tmp_path).test_docs()
    assert all(row["choices"][row["own"]] == row["completion"] for row in samples)
    assert [row["own"] for row in samples] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert all(len(set(row["choices"])) == 10 for row in samples)


def test_what_is_finished_is_kept_and_not_run_again(checkpoints, run, tmp_path, monkeypatch):
    folder = checkpoints("layerwise", **LONG)
    asked = []
    plainly = lm_eval.evaluate

    def interrupted(model, tasks, **kwargs):
        asked.extend(tasks["tasks"])
        if asked[-1] == "winogrande" and len(asked) == 2:
            raise KeyboardInterrupt
        return plainly(model, tasks, **kwargs)

    monkeypatch.setattr(lm_eval, "evaluate", interrupted, raising=False)
    command = (folder, "--suite", "boolq,winogrande", *SMALL, "--output", tmp_path)
    with pytest.raises(SystemExit):
        run(*command)
    written = [path.relative_to(tmp_path / folder.name).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert written == ["benchmarks/boolq.json"]
    run(*command)
    assert asked == ["boolq", "winogrande", "winogrande"]
    first = (tmp_path / folder.name / "results.json").read_text()
    assert "is finished" in run(*command)
    assert asked == ["boolq", "winogrande", "winogrande"]
    again, before = results(tmp_path / folder.name), json.loads(first)
    assert again["results"] == before["results"]
    with pytest.raises(UserError, match=r"boolq\.json is of another limit\. Give another --output"):
        run(*command, "--limit", 1)
    other = checkpoints("separate", **LONG)
    (tmp_path / other.name).symlink_to(tmp_path / folder.name)
    with pytest.raises(UserError, match=r"boolq\.json is of another weights"):
        run(other, *command[1:])
    (tmp_path / folder.name / "benchmarks" / "boolq.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run(*command)


def test_an_adapter_is_scored_with_its_base(checkpoints, run, tmp_path):
    base = checkpoints("layerwise", **LONG)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False, r=4))
    model.save_pretrained(tmp_path / "adapter")
    run(base, tmp_path / "adapter", "--suite", "lambada_openai", "--data", DATA, "--output", tmp_path / "out")
    with_, without = (
        results(tmp_path / "out" / name)["results"]["lambada_openai"]["perplexity,none"]
        for name in ("adapter", base.name)
    )
    assert with_ != pytest.approx(without, rel=1e-3)


def test_results_are_what_publishing_reads(checkpoints, run, tmp_path):
    folder = checkpoints("separate", **LONG)
    run(folder, "--suite", "boolq", *SMALL, "--output", tmp_path)
    path = tmp_path / folder.name / "results.json"
    (local,) = read_results(path)
    assert (local.dataset, local.name, local.metric, local.split) == (None, "boolq", "acc", "validation")
    assert local.notes == "1-shot, of local files" and not local.benchmark
    content = json.loads(path.read_text())
    content["how"]["boolq"] = {"local": False, "cut": False, "notes": []}
    path.write_text(json.dumps(content))
    (official,) = read_results(path)
    assert (official.dataset, official.task, official.benchmark) == ("aps/super_glue", "boolq", True)
    assert official.value == content["results"]["boolq"]["acc,none"]


def test_conversations(checkpoints, run, tmp_path):
    """A task of the user's own, whose description becomes a system message, which the template refuses."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: wmt23\ndataset_name: en-de\ntest_split: test\nfewshot_split: test\n"
        "output_type: generate_until\ndescription: Translate.\ndoc_to_text: source\ndoc_to_target: target\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: chrf}]\n"
    )
    folder = checkpoints("layerwise", **LONG)
    command = ("--suite", "mine", "--include", tmp_path / "tasks", *SMALL, "--limit", 1, "--chat")
    run(folder, *command, "--output", tmp_path / "out")
    how = results(tmp_path / "out" / folder.name)["how"]["mine"]
    assert how["notes"] == ["of local files", "the first 1 examples", "with the chat template"]


def test_a_task_that_cannot_show_examples(checkpoints, run, tmp_path):
    """Its answers are lists of numbers, which the harness cannot write out."""
    write_twins(plan(Tasks(), "agieval_sat_math"), tmp_path)
    with pytest.raises(UserError, match=r"agieval_sat_math cannot show examples.*Leave --shots out"):
        run(checkpoints("separate", **LONG), "--suite", "agieval_sat_math", "--data", tmp_path, "--shots", 1)


def test_short_models_say_what_they_cut(checkpoints, run, tmp_path):
    folder = checkpoints("decoder_only", max_position_embeddings=64)
    run(folder, "--suite", "boolq", *SMALL, "--output", tmp_path)
    assert "8 of 8 contexts cut at their beginning to 64 tokens or less" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--suite", "boolq", "--data", "nowhere"), "--data nowhere is no folder"),
        (("--suite", "bolq",), "Close to it are"),
        (("--suite", "boolq", "--dtype", "float8"), "--dtype float8"),
        (("--suite", "mbpp", *SMALL), "--allow-code"),
        (("--suite", "gsm8k", "--data", DATA, "--shots", 9), "shows 9 examples before each question and has 2"),
        (("--suite", "boolq", *SMALL, "--output", Path(__file__)), "is a file"),
    ],
)  # fmt: skip
def test_bad_arguments(checkpoints, run, arguments, told):
    with pytest.raises(UserError, match=told):
        run(checkpoints("separate", **LONG), *arguments)


def test_what_cannot_be_done_is_told_before_the_first_checkpoint_is_scored(checkpoints, run, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_t5gemma.commands.evaluate.load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    folder, suite = checkpoints("separate", **LONG), ("--suite", "boolq", *SMALL)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="nowhere"):
        run(folder, "nowhere", *suite)
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        run(folder, bare, *suite)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*cannot be written"):
        run(folder, *suite, "--output", tmp_path / "file" / "results")


def test_a_checkpoint_without_a_tokenizer(checkpoints, run, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(checkpoints("separate", **LONG) / name, folder)
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        run(folder, "--suite", "boolq", *SMALL)


def test_the_harness_is_optional(run, monkeypatch, tmp_path):
    import builtins

    plainly = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return plainly(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install modeling_t5gemma\[evaluate\]"):
        run(tmp_path, "--suite", "boolq")


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["pt", "it"])
def test_whole_suites_on_twins_of_all_their_data_sets(checkpoints, run, tmp_path, suite):
    """Every task but those that run code, with its own prompts, filters and metrics. The models stop at once."""
    folder = tmp_path / "layerwise"
    shutil.copytree(checkpoints("layerwise", max_position_embeddings=4096), folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(7, 320))}))
    wanted = plan(Tasks(), suite)
    write_twins(wanted, tmp_path / "data")
    shown = run(folder, "--suite", suite, "--data", tmp_path / "data", "--limit", 2, "--output", tmp_path / "out")
    found = results(tmp_path / "out" / "layerwise")
    assert shown.startswith("Left out") and found["average"]["benchmarks"] == len(wanted.benchmarks)
    for benchmark in wanted.benchmarks:
        assert isinstance(found["results"][benchmark.task][benchmark.metric], float), benchmark.name
        assert benchmark.name in shown


# The table


def made_up(suite, path: str, value: float = 0.5) -> dict:
    """Results in which every benchmark has the same score."""
    names = {benchmark.task: benchmark for benchmark in suite.benchmarks}
    scores = {
        task: {benchmark.metric: 50 * value * 2 if "chrf" in benchmark.metric else value, "sample_len": 9}
        for task, benchmark in names.items()
    }
    how = {task: {"local": False, "cut": False, "notes": []} for task in names}
    return {"results": scores, "how": how, "n-shot": {}, "higher_is_better": {}, "config": {"model": path}}


@pytest.fixture(scope="module")
def suites():
    return {name: plan(Tasks(), name, allow_code=True) for name in ("pt", "it")}


def test_averages_stand_beside_the_papers(suites):
    models = {
        "t5gemma-2b-2b-ul2": made_up(suites["pt"], "folder/t5gemma-2b-2b-ul2", 0.25),
        "mine": made_up(suites["pt"], "mine", 0.5),
    }
    made = report(suites["pt"], models)
    assert made.rows[-2] == ["average of all 22", "", "", "25.0", "50.0"]
    assert made.rows[-1] == ["the paper's average [1]", "", "", "50.1", ""]
    assert made.remarks == ["[1] arXiv 2504.06225, of all benchmarks, with its own prompts and metrics"]
    assert "| WMT23 | chrf |" in made.markdown() and "25.0 | 50.0 |" in made.markdown()
    tuned = made_up(suites["it"], "google/t5gemma-9b-9b-prefixlm-it")
    assert average(suites["it"], tuned)["paper"] == {"SFT": 62.9, "RLHF": 64.5}
    assert report(suites["it"], {"x": tuned}).rows[-1][-1] == "62.9 (SFT), 64.5 (RLHF)"


def test_an_average_says_of_what_it_is(suites):
    some = plan(Tasks(), "pt")
    found = made_up(some, "mine")
    found["how"]["boolq"] = {"local": True, "cut": True, "notes": ["of local files", "the first 3 examples", "other"]}
    made = report(some, {"mine": found})
    assert made.rows[-1] == ["average of 20 of 22 [1] [2]", "", "", "50.0"]
    assert made.rows[1][0] == "BoolQ [1] [2] [3]"
    assert average(some, found)["benchmarks"] == 20
