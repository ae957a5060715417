"""How cross-attention begins, and what an encoder-decoder makes of its encoder after minutes of training.

    python benchmarks/starts/handbook.py handbook.txt --whole
    python benchmarks/starts/compare.py --source gemma-3-270m --text handbook.txt --output starts
    python benchmarks/starts/compare.py --source gemma-3-270m --text handbook.txt --output starts --only layerwise copy

Each start is converted by ``t5gemma convert`` and adapted by ``examples/adapt.py`` on the same windows of 128 + 128
tokens: PrefixLM, distilled from the original, 46 steps of 8 windows. The table has held-out losses in nats a target
token, and the encoder's use: what another window's prefix costs; OUTPUT/curves.png has the curves. A start that is
finished is not run again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, BATCH, WINDOW, HELD_OUT = 46, 8, 256, 32


@dataclass(frozen=True)
class Start:
    """One row of the table.

    Attributes:
        title: what it is called there.
        cross_attention: the converter's option.
        learning_rate: of all parts, where ``overrides`` say nothing else.
        encoder_attention: the converter's option.
        overrides: further keys of ``examples/adapt.py``.
    """

    title: str
    cross_attention: str
    learning_rate: float = 1e-4
    encoder_attention: str = "bidirectional"
    overrides: tuple[str, ...] = ()


STARTS = {
    "layerwise": Start("layerwise, LR 3e-5", "layerwise", 3e-5),
    "layerwise-1e-4": Start("layerwise, LR 1e-4", "layerwise", 1e-4),
    "layerwise-encoder": Start(
        "layerwise, LR 3e-5, the encoder's three times that",
        "layerwise",
        3e-5,
        overrides=("--recipe.learning_rates", '{"encoder": 3}'),
    ),
    "layerwise-part": Start("layerwise, bidirectional in layers 11 to 16 alone, LR 3e-5", "layerwise", 3e-5, "11-16"),
    "copy": Start("separate, copied from self-attention (the paper, balanced)", "copy"),
    "random": Start(
        "separate, random, alone for a quarter of the steps (the paper, unbalanced)",
        "random",
        overrides=("--recipe.alone", str(STEPS // 4), "--recipe.joining", "4"),
    ),
    "copy-decoder-frozen": Start(
        "separate, copied, decoder frozen, cross-attention at 10 times the learning rate",
        "copy",
        overrides=(
            "--recipe.frozen",
            '["embeddings", "decoder"]',
            "--recipe.learning_rates",
            '{"cross_attention": 10}',
        ),
    ),
    "copy-ul2-first": Start(
        "separate, copied, UL2 on the text itself",
        "copy",
        overrides=("--objective", "ul2", "--model.teacher", "null"),
    ),
}


def convert(start: Start, source: Path, output: Path) -> Path:
    """The converted checkpoint, made where there is none."""
    made = output / f"converted-{start.cross_attention}-{start.encoder_attention}"
    if not made.exists():
        options = ["--enc", str(source), "--dec", str(source), "--output", str(made), "--dtype", "bfloat16"]
        command = [str(Path(sys.executable).with_name("t5gemma")), "convert", *options]
        run([*command, "--cross-attention", start.cross_attention, "--encoder-attention", start.encoder_attention])
    return made


def adapt(name: str, start: Start, given: argparse.Namespace) -> dict[str, Any]:
    """The run's summary."""
    folder = given.output / name
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["step"] < given.steps:
        settings = {
            "model.path": convert(start, given.source, given.output),
            "model.teacher": given.source,
            "data.sources": json.dumps([{"path": str(given.text)}]),
            "data.window": WINDOW,
            "data.held_out": HELD_OUT,
            "data.cache": given.output / "tokens",
            "training.output_dir": folder,
            "training.max_steps": given.steps,
            "training.per_device_train_batch_size": BATCH,
            "training.learning_rate": start.learning_rate,
            "training.warmup_steps": 4,
            "training.eval_steps": 23,
            "training.save_steps": 23,
            "training.save_total_limit": 1,
        }
        options = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        config = ROOT / "examples/configs/adapt_laptop.yaml"
        run([sys.executable, str(ROOT / "examples/adapt.py"), "--config", str(config), *options, *start.overrides])
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def run(command: list[str]) -> None:
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def row(start: Start, summary: dict[str, Any]) -> str:
    measured = [entry for entry in summary["log"] if "eval_loss" in entry]
    first, last = measured[0], measured[-1]
    use, error = last["eval_encoder_use"], last["eval_encoder_use_error"]
    return (
        f"| {start.title} | {first['eval_loss']:.3f} | {last['eval_loss']:.3f} | {first['eval_encoder_use']:.3f} | "
        f"{use:.3f} ± {error:.3f} |"
    )


def draw_all(path: Path, summaries: dict[str, dict[str, Any]], teacher: dict[str, Any] | None) -> None:
    """The curves of all starts in one picture."""
    from modeling_t5gemma.training.curves import Panel, draw

    history = [
        {key if key == "step" else f"{name}/{key}": value for key, value in entry.items()}
        for name, summary in summaries.items()
        for entry in summary["log"]
        # What separate cross-attention begins with would hide all the rest.
        if entry.get("eval_loss", 0) < 5
    ]
    losses = {} if teacher is None else {"the original": teacher["right"], "the same, no prefix": teacher["without"]}
    use = {} if teacher is None else {"the original": teacher["use"]}
    panels = [
        Panel(title, {name: f"{name}/{key}" for name in summaries}, {name: x["mean"] for name, x in levels.items()})
        for title, key, levels in (
            ("training loss: distance to the original, nats", "loss", {}),
            ("held-out loss below 5, nats a token", "eval_loss", losses),
            ("encoder use, nats a token", "eval_encoder_use", use),
        )
    ]
    draw(path, history, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the decoder-only model, a folder")
    parser.add_argument("--text", type=Path, required=True, help="a text file or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("starts"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS))
    given = parser.parse_args()
    for path in ("source", "text", "output"):
        setattr(given, path, getattr(given, path).resolve())
    given.output.mkdir(parents=True, exist_ok=True)
    summaries = {name: adapt(name, STARTS[name], given) for name in given.only}
    print("\n| start | loss at step 0 | after | encoder use at step 0 | after |\n|---|---|---|---|---|")
    for name, summary in summaries.items():
        print(row(STARTS[name], summary))
    teacher = next((summary["teacher"] for summary in summaries.values() if summary["teacher"]), None)
    draw_all(given.output / "curves.png", summaries, teacher)
    if teacher is not None:
        right, without, use = (teacher[name] for name in ("right", "without", "use"))
        print(
            f"\nThe original: {right['mean']:.3f} with the prefix, {without['mean']:.3f} without; use "
            f"{use['mean']:.3f} ± {use['standard_error']:.3f}."
        )


if __name__ == "__main__":
    main()
