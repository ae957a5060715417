"""The official metrics (arXiv 1905.00537, section 3), all from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .tasks import Task

Classes = npt.NDArray[np.int64]


def measure(task: Task, keys: Sequence[tuple[int, ...]], labels: Classes, predicted: Classes) -> dict[str, float]:
    """What a task is judged by: ``accuracy`` (the measure of arXiv 2504.06225), its own metrics, ``score``.

    Args:
        keys: ``Case.key`` of each example.
        labels, predicted: classes, (N,).

    Returns:
        ``score`` is the mean of the task's official metrics: of CB accuracy and macro F1, of MultiRC the F1 over all
        answers (f1a) and the share of questions with all answers right (em), of the others accuracy.
    """
    right = labels == predicted
    found = {"accuracy": float(right.mean())}
    if "f1" in task.metrics:
        classes = np.union1d(labels, predicted)
        found["f1"] = float(np.mean([f1(labels == c, predicted == c) for c in classes]))
    if "f1a" in task.metrics:
        found["f1a"] = f1(labels == 1, predicted == 1)
        _, questions = np.unique([key[:2] for key in keys], axis=0, return_inverse=True)
        wrong = np.bincount(questions.ravel(), ~right)
        found["em"] = float((wrong == 0).mean())
    return {**found, "score": float(np.mean([found[name] for name in task.metrics]))}


def f1(labels: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is labelled or predicted."""
    total = int(labels.sum()) + int(predicted.sum())
    return 2 * int((labels & predicted).sum()) / total if total else 0.0
