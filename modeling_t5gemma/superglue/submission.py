"""Predictions as the benchmark's server takes them: a line of JSON for each record of the test split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .tasks import Task


def submission(task: Task, keys: Sequence[tuple[int, ...]], classes: Sequence[int]) -> str:
    """The content of ``TASK.jsonl``.

    Args:
        keys: ``Case.key`` of each example.
        classes: what is predicted for each.
    """
    labels = [task.labels[number] for number in classes]
    if task.name != "multirc":
        records: list[dict[str, Any]] = [{"idx": key[0], "label": label} for key, label in zip(keys, labels)]
        return _lines(records)
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for (passage, question, answer), label in zip(keys, labels):
        answers = passages.setdefault(passage, {}).setdefault(question, [])
        answers.append({"idx": answer, "label": label})
    return _lines(
        [
            {"idx": passage, "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]}}
            for passage, questions in passages.items()
        ]
    )


def _lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
