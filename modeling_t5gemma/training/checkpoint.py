"""The state of a training run on disk, complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_state(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> None:
    """Write the trainable weights, the optimizer, the random state and ``step``, the number of finished steps.

    A kill at any moment leaves the previous file or the new one.

    Args:
        run: what identifies the run; ``load_state`` refuses the file of another.
    """
    state = {
        "step": step,
        "run": run,
        "weights": {name: weight for name, weight in model.named_parameters() if weight.requires_grad},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> int:
    """Restore what ``save_state`` wrote.

    Returns:
        The number of finished steps; 0 when there is no file.

    Raises:
        ValueError: the file belongs to a run with other settings.
    """
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["run"] != run:
        changed = sorted(key for key in run.keys() | state["run"].keys() if run.get(key) != state["run"].get(key))
        raise ValueError(
            f"{path} belongs to a run with other settings ({', '.join(changed)}): delete it to begin anew, or give "
            "the settings it had."
        )
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert weights.keys() == state["weights"].keys(), "the settings fix which weights are trained"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["cuda_random"]:
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return int(state["step"])
