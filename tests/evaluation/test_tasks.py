"""The suites against the installed harness, local data, and what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.evaluation import wmt23
from modeling_t5gemma.evaluation.plan import SUITES, plan
from modeling_t5gemma.evaluation.tasks import Tasks, own_tasks
from tests.evaluation.conftest import DATA
from tests.evaluation.twins import write_twins

PT = (
    "BoolQ, SIQA, PIQA, ARC-c, ARC-e, MMLU, MMLU-Pro, HellaSwag, Winogrande, TruthfulQA, AGIEval, BBH, DROP, GPQA, "
    "GSM8K, HumanEval, Lambada, MATH-500, MBPP, NQ, TriviaQA, WMT23"
)
IT = "GSM8K, MMLU, MMLU-Pro, MBPP, HumanEval, MATH-500, BBH, GPQA Diamond, WMT23, MGSM"


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks()


@pytest.mark.parametrize(("suite", "names"), [("pt", PT), ("it", IT)])
def test_a_suite_has_the_papers_benchmarks_by_installed_tasks(tasks, suite, names):
    found = plan(tasks, suite, allow_code=True)
    wanted = names.split(", ")
    assert sorted(benchmark.name for benchmark in found.benchmarks) == sorted(wanted)
    assert (found.size, found.left_out) == (len(wanted), ())
    for benchmark in found.benchmarks:
        metric, _, how = benchmark.metric.partition(",")
        for leaf in benchmark.leaves:
            assert leaf.config["dataset_path"], leaf.name
            filters = {each["name"] for each in leaf.config.get("filter_list") or [{"name": "none"}]}
            metrics = {str(each["metric"]) for each in leaf.config["metric_list"]}
            assert how in filters, (leaf.name, filters)
            # Those that run code are functions, "pass_at_k" for "pass@1" of humaneval.
            assert metric in metrics or any("pass_at" in each for each in metrics), (leaf.name, metrics)
        if benchmark.means is not None:
            assert {mean["metric"] for mean in benchmark.means} == {metric}
            assert all(how in (mean.get("filter_list") or how) for mean in benchmark.means)
        else:
            assert len(benchmark.leaves) == 1, "a number for the average"
        assert benchmark.shots_of in ("harness", "Gemma 2 report", "Gemma 3 report")


def test_groups_are_whole(tasks):
    counts = {b.name: len(b.leaves) for b in plan(tasks, "pt").benchmarks if len(b.leaves) > 1}
    assert counts == {"MMLU": 57, "MMLU-Pro": 14, "AGIEval": 10, "BBH": 27, "WMT23": 14}
    (mmlu,) = plan(tasks, "mmlu").benchmarks
    assert len({leaf.name for leaf in mmlu.leaves}) == 57 and mmlu.means[0]["metric"] == "acc"
    shown = [benchmark.leaves for benchmark in plan(tasks, "truthfulqa,mmlu_stem").benchmarks]
    assert [leaf.name for leaf in shown[0]] == ["truthfulqa_gen", "truthfulqa_mc1", "truthfulqa_mc2"], "a tag"
    assert "mmlu_anatomy" in {leaf.name for leaf in shown[1]}


def test_few_shot_counts_reach_the_tasks(tasks):
    found = {benchmark.name: benchmark for benchmark in plan(tasks, "pt").benchmarks}
    assert {leaf.changes["num_fewshot"] for leaf in found["MMLU"].leaves} == {5}
    assert found["ARC-c"].leaves[0].changes == {"num_fewshot": 25}
    assert found["TruthfulQA"].leaves[0].changes == {}
    given = {benchmark.name: benchmark for benchmark in plan(tasks, "pt", shots=2).benchmarks}
    assert {leaf.changes["num_fewshot"] for leaf in given["MMLU"].leaves} == {2}
    assert given["TruthfulQA"].leaves[0].changes == {}, "whose own file says 0"


def test_code_runs_only_where_it_is_allowed(tasks):
    assert plan(tasks, "t5gemma_pt").left_out == ("HumanEval", "MBPP") and len(plan(tasks, "pt").benchmarks) == 20
    assert set(plan(tasks, "it").left_out) == {"HumanEval", "MBPP"}
    with pytest.raises(UserError, match=r"mbpp would run code.*--allow-code"):
        plan(tasks, "mbpp")


def test_an_unknown_task_is_told_with_those_close_to_it(tasks):
    with pytest.raises(UserError, match=r"no task bolq\..*boolq"):
        plan(tasks, "bolq")
    with pytest.raises(UserError, match=r"no task zzzzzzzz\. Give pt, it"):
        plan(tasks, "boolq, zzzzzzzz")


def test_missing_local_data_is_named(tasks, tmp_path):
    with pytest.raises(
        UserError, match=r"openai/gsm8k/main/test\.jsonl is missing: gsm8k reads openai/gsm8k \(main\)"
    ):
        plan(tasks, "gsm8k", data=tmp_path)
    plan(tasks, "gsm8k,boolq", data=DATA)


def test_data_that_cannot_be_reached_are_named(tasks):
    (benchmark,) = plan(tasks, "piqa").benchmarks
    with pytest.raises(UserError, match=r"data set baber/piqa of piqa cannot be read.*--data FOLDER"):
        tasks.make(benchmark.leaves[0], None)


def test_questions_are_asked_and_marked_in_one_order(tasks, tmp_path):
    """GPQA's choices are shuffled whenever the harness looks at them, by a generator that goes on."""
    wanted = plan(tasks, "gpqa_main_n_shot")
    write_twins(wanted, tmp_path)
    seen = []
    for _ in range(2):
        task = tasks.make(wanted.benchmarks[0].leaves[0], tmp_path)
        seen += [[row["answer"] for row in rows] for rows in (task.eval_docs, task.fewshot_docs(), task.eval_docs)]
    assert all(answers == seen[0] for answers in seen) and len(set(seen[0])) > 1


def test_local_data_with_other_columns_are_told(tasks, tmp_path):
    for split in ("train", "validation"):
        path = tmp_path / "aps" / "super_glue" / "boolq" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    (benchmark,) = plan(tasks, "boolq", data=tmp_path).benchmarks
    with pytest.raises(UserError, match=r"boolq cannot read its local data.*aps/super_glue \(boolq\)"):
        tasks.make(benchmark.leaves[0], tmp_path)
    path.write_text('{"passage": 3')
    with pytest.raises(UserError, match=r"boolq cannot read its local data.*JSON parse error"):
        tasks.make(benchmark.leaves[0], tmp_path)


def test_own_names_need_none_of_the_harness(monkeypatch):
    """Its thousands of files take seconds to read."""
    import modeling_t5gemma.evaluation.tasks as module

    monkeypatch.setattr(module, "_all_tasks", lambda folders: pytest.fail("not needed"))
    assert len(plan(Tasks(), "wmt23").benchmarks[0].leaves) == 14


def test_folders_of_the_users_own_tasks(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: owner/mine\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: q\n"
        "doc_to_choice: [a, b]\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    (benchmark,) = plan(Tasks([tmp_path]), "mine").benchmarks
    assert benchmark.leaves[0].dataset == "owner/mine"
    with pytest.raises(UserError, match=r"--include .* is no folder"):
        Tasks([tmp_path / "nowhere"])


def test_the_groups_are_the_stock_harness_too():
    """``lm_eval --include_path`` finds them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(own_tasks()), include_defaults=False)
    assert set(SUITES.values()) <= set(manager.all_groups)


# WMT23


def test_wmt23_has_all_pairs_and_reads_what_sacrebleu_has(tasks, tmp_path, monkeypatch):
    from sacrebleu.dataset import DATASETS

    official = DATASETS["wmt23"]
    leaves = plan(tasks, "wmt23").benchmarks[0].leaves
    assert {leaf.config["dataset_name"] for leaf in leaves} == set(official.langpairs)
    assert all(leaf.name == f"wmt23-{leaf.config['dataset_kwargs']['pair']}" for leaf in leaves)
    monkeypatch.setattr(official, "_outdir", str(tmp_path))
    monkeypatch.setattr(official, "_rawdir", str(tmp_path / "raw"))
    monkeypatch.setattr(official, "maybe_download", lambda: None)
    raw = tmp_path / "raw" / official.langpairs["en-de"][0]
    raw.parent.mkdir(parents=True)
    raw.write_text(
        '<dataset id="x"><doc id="d" origlang="en"><src lang="en"><p><seg id="1">A bridge.</seg><seg id="2">Two &amp; '
        'three.</seg></p></src><ref lang="de" translator="refA"><p><seg id="1">Eine Brücke.</seg><seg id="2">Zwei '
        "&amp; drei.</seg></p></ref></doc></dataset>",
        encoding="utf-8",
    )
    rows = wmt23.load(pair="en-de", version=1.0)["test"].to_list()
    assert rows == [
        {"source": "A bridge.", "target": "Eine Brücke."},
        {"source": "Two & three.", "target": "Zwei & drei."},
    ]
    (leaf,) = (leaf for leaf in leaves if leaf.name == "wmt23-en-de")
    task = tasks.make(leaf, None)
    assert task.doc_to_text(task.eval_docs[0]) == "English: A bridge.\nGerman:"
    assert task.config.description == "Translate from English to German.\n\n"


def test_wmt23_without_a_network_is_told(tasks, tmp_path, monkeypatch):
    from sacrebleu.dataset import DATASETS

    monkeypatch.setattr(DATASETS["wmt23"], "_outdir", str(tmp_path))
    monkeypatch.setattr(DATASETS["wmt23"], "_rawdir", str(tmp_path / "raw"))
    leaf = plan(tasks, "wmt23").benchmarks[0].leaves[0]
    with pytest.raises(UserError, match=r"data set wmt23 \(cs-uk\) of wmt23-cs-uk cannot be read"):
        tasks.make(leaf, None)


def test_fixtures_are_small_and_said_to_be_made_up():
    assert sum(path.stat().st_size for path in Path(DATA).rglob("*.jsonl")) < 20_000
