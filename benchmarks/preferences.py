"""What preferences (DPO) and rewards (GRPO) teach a tiny model, over three seeds.

    python benchmarks/preferences.py --picture docs/preferences.png
    python benchmarks/preferences.py --compare     settings of GRPO beside each other, some minutes more

The models are random, of two layers and 97 words. The task is that of tests/post_training/first_word.py: an answer has
to begin with its question's first word, one of six. All numbers are of held-out questions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only costs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.training.curves import Curves, Panel, draw
from modeling_t5gemma.training.resumable import ResumableTrainer
from tests.post_training.first_word import dpo_that_learns, grpo_that_learns, likelier

SEEDS = (0, 1, 2)
EVERY = 10  # steps between two measurements
ACCURACY = "eval_rewards/accuracies"
# Settings of GRPO by what is told of them.
COMPARED: Mapping[str, dict[str, Any]] = {
    "as above: 32 answers, `scale_rewards: group`, `loss_type: dapo`, rate 1e-3": {},
    "16 answers": {"num_generations": 16},
    "16 answers, `scale_rewards: none`": {"num_generations": 16, "scale_rewards": "none"},
    "16 answers, rate 5e-4": {"num_generations": 16, "learning_rate": 5e-4},
    "16 answers, rate 2e-3": {"num_generations": 16, "learning_rate": 2e-3},
    "16 answers, `temperature: 1.5`": {"num_generations": 16, "temperature": 1.5},
    "16 answers, `beta: 0.02`": {"num_generations": 16, "beta": 0.02},
    "`scale_rewards: none`": {"scale_rewards": "none"},
    "`loss_type: grpo`": {"loss_type": "grpo"},
    "`loss_type: dr_grpo`": {"loss_type": "dr_grpo"},
    "`loss_type: dr_grpo`, `scale_rewards: none` (Dr. GRPO)": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "two steps on the same answers": {"num_iterations": 2},
}


@dataclass(frozen=True)
class Run:
    """Attributes:
    before, after: how often the model holds the better answer for the likelier one; of DPO alone.
    history: what was logged.
    seconds: of a core, for training and measuring.
    """

    before: float
    after: float
    history: Sequence[Mapping[str, Any]]
    seconds: float

    def measured(self, name: str) -> list[float]:
        return [entry[name] for entry in self.history if name in entry]


def trained(trainer: ResumableTrainer, measure: Any = lambda trainer: 0.0) -> Run:
    trainer.remove_callback(Curves)
    before, begin = measure(trainer), time.process_time()
    trainer.train()
    return Run(before, measure(trainer), trainer.state.log_history, time.process_time() - begin)


def runs_of(make: Any, folder: Path, measure: Any = lambda trainer: 0.0, **changes: Any) -> list[Run]:
    return [trained(make(folder, seed, EVERY, **changes), measure) for seed in SEEDS]


def listed(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def ends(runs: Sequence[Run], name: str, place: int, form: str) -> str:
    return listed([run.measured(name)[place] for run in runs], form)


def merged(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """The logs of all runs as one, whose keys say which run an entry is of."""
    return [
        {key if key == "step" else f"{kind}/{seed}/{key}": value for key, value in entry.items()}
        for kind, own in runs.items()
        for seed, run in zip(SEEDS, own)
        for entry in run.history
    ]


def panel(title: str, kind: str, name: str, levels: Mapping[str, float]) -> Panel:
    return Panel(title, {f"seed {seed}": f"{kind}/{seed}/{name}" for seed in SEEDS}, levels)


def seconds(runs: Sequence[Run]) -> str:
    return f"{statistics.median(run.seconds for run in runs):.1f}"


def compare(folder: Path) -> None:
    """GRPO with each of ``COMPARED``: the reward at the end, and how many groups of the last steps taught nothing."""
    print("| | reward of greedy answers | mean | groups all worth the same |\n|---|---|---|---|", flush=True)
    for name, changes in COMPARED.items():
        found = runs_of(grpo_that_learns, folder, **changes)
        mean = statistics.fmean(run.measured("eval_reward")[-1] for run in found)
        same = statistics.fmean(run.measured("frac_reward_zero_std")[-1] for run in found)
        print(f"| {name} | {ends(found, 'eval_reward', -1, '.2f')} | {mean:.2f} | {same:.0%} |", flush=True)


def learnt(folder: Path, picture: Path | None) -> None:
    """The table of both, and their curves."""
    # Each run of DPO has its folder: it keeps the reference's log-probabilities there.
    preferred = [trained(dpo_that_learns(folder / f"dpo-{seed}", seed, EVERY), likelier) for seed in SEEDS]
    rewarded = runs_of(grpo_that_learns, folder / "grpo")
    accuracy = ends(preferred, ACCURACY, -1, ".0%")
    before, after = (listed([getattr(run, when) for run in preferred], ".0%") for when in ("before", "after"))
    first, last = (ends(rewarded, "eval_reward", place, ".2f") for place in (0, -1))
    print("| | before | after | s a run |\n|---|---|---|---:|")
    print(f"| DPO: the better answer has the higher reward | (ties) | {accuracy} | {seconds(preferred)} |")
    print(f"| DPO: the better answer is the likelier one | {before} | {after} | |")
    print(f"| GRPO: reward of greedy answers | {first} | {last} | {seconds(rewarded)} |\n", flush=True)
    if picture is not None:
        panels = [
            panel("DPO: held-out loss", "dpo", "eval_loss", {}),
            panel("DPO: held-out accuracy", "dpo", ACCURACY, {"chance": 0.5}),
            panel("GRPO: reward of greedy answers", "grpo", "eval_reward", {"without reading": 1 / 6}),
        ]
        draw(picture, merged({"dpo": preferred, "grpo": rewarded}), panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="a file for the curves")
    parser.add_argument("--compare", action="store_true", help="settings of GRPO too")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory() as folder:
        learnt(Path(folder), given.picture)
        if given.compare:
            compare(Path(folder) / "compared")


if __name__ == "__main__":
    main()
