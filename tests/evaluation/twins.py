"""Made-up rows for every data set of the suites, with the columns that the harness's tasks read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_t5gemma.evaluation.plan import Plan

ROWS = 27  # ARC-c shows 25 examples
CATEGORIES = (
    "biology, business, chemistry, computer science, economics, engineering, health, history, law, math, other, "
    "philosophy, physics, psychology"
)


def _mmlu_pro(n: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which of them is {n}?",
            "options": ["one", "two", "three"],
            "answer": "B",
            "answer_index": 1,
            "cot_content": "A: Let's think step by step. It is two. The answer is (B).",
            "category": category,
        }
        for category in CATEGORIES.split(", ")
    ]


def _drop(n: int) -> dict[str, Any]:
    answer = {"number": str(n), "date": {"day": "", "month": "", "year": ""}, "spans": []}
    validated = {name: [value] for name, value in answer.items()}
    return {"query_id": f"q{n}", "passage": f"They had {n} boats.", "question": "How many?", "answer": answer} | {
        "validated_answers": validated
    }


def _gpqa(n: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {k}": f"{n + k}" for k in (1, 2, 3)}
    return {"Question": f"What is {n}?", "Correct Answer": str(n), **wrong}


def _truthful(n: int) -> dict[str, Any]:
    targets = {"choices": ["It is so.", "It is not.", "Nobody knows."], "labels": [1, 0, 0]}
    return {"question": f"Is it {n}?", "mc1_targets": targets, "mc2_targets": targets}


def _arc(n: int) -> dict[str, Any]:
    choices = {"text": ["one", "two", "three", "four"], "label": list("ABCD")}
    return {"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]}


def _agieval(n: int) -> dict[str, Any]:
    return {"query": f"Q: Which is {n}?\nA:", "choices": ["(A)one", "(B)two"], "gold": [n % 2], "answer": str(n)}


MAKERS: dict[str, Callable[[int], dict[str, Any] | list[dict[str, Any]]]] = {
    "aps/super_glue": lambda n: {"passage": f"It is {n}.", "question": f"is it {n}", "label": n % 2, "idx": n},
    "lighteval/siqa": lambda n: (
        {"context": f"Kim saw {n}.", "question": "Why?"}
        | {"answerA": "a", "answerB": "b", "answerC": "c", "label": str(1 + n % 3)}
    ),
    "baber/piqa": lambda n: {"goal": f"Open {n}", "sol1": "Pull it.", "sol2": "Eat it.", "label": n % 2},
    "allenai/ai2_arc": _arc,
    "cais/mmlu": lambda n: {"question": f"What is {n}?", "choices": ["1", "2", "3", "4"], "answer": n % 4},
    "TIGER-Lab/MMLU-Pro": _mmlu_pro,
    "Rowan/hellaswag": lambda n: (
        {"ctx_a": f"A man takes {n} eggs.", "ctx_b": "he", "activity_label": "Cooking"}
        | {"endings": ["fries them.", "flies.", "is an egg.", "reads."], "label": str(n % 4)}
    ),
    "allenai/winogrande": lambda n: (
        {"sentence": f"The cup hit the {n} because the _ fell.", "option1": "cup"}
        | {"option2": "box", "answer": str(1 + n % 2)}
    ),
    "truthfulqa/truthful_qa": _truthful,
    "hails/agieval": _agieval,
    "SaylorTwift/bbh": lambda n: {"input": f"Which is {n}? Options:\n(A) one\n(B) two\nList: b a", "target": "(A)"},
    "EleutherAI/drop": _drop,
    "Idavidrein/gpqa": _gpqa,
    "openai/gsm8k": lambda n: {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"},
    "EleutherAI/lambada_openai": lambda n: {"text": f"He counted {n} stones and threw the last stone"},
    "HuggingFaceH4/MATH-500": lambda n: (
        {"problem": f"What is ${n}^2$?", "answer": str(n * n)} | {"solution": f"It is $\\boxed{{{n * n}}}$."}
    ),
    "google-research-datasets/nq_open": lambda n: {"question": f"what is {n}", "answer": [str(n)]},
    "mandarjoshi/trivia_qa": lambda n: {"question": f"What is {n}", "answer": {"aliases": [str(n), "it"]}},
    "wmt23": lambda n: {"source": f"There are {n}.", "target": f"Es sind {n}."},
    "juletxara/mgsm": lambda n: (
        {"question": f"Question: What is {n} + 1?", "answer_number": n + 1}
        | {"answer": f"Step-by-Step Answer: It is {n + 1}. The answer is {n + 1}."}
    ),
}


def write_twins(plan: Plan, folder: Path) -> None:
    """The files that a plan's tasks read."""
    for leaf in (leaf for benchmark in plan.benchmarks for leaf in benchmark.leaves):
        dataset = leaf.config["dataset_path"]
        make = MAKERS["hails/agieval" if dataset.startswith("hails/agieval") else dataset]
        rows = [make(number) for number in range(ROWS)]
        lines = [row for each in rows for row in (each if isinstance(each, list) else [each])]
        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if leaf.config.get(split):
                path = folder / dataset / (leaf.config.get("dataset_name") or "") / f"{leaf.config[split]}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
