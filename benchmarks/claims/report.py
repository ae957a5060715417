"""The results as tables, JSON and curves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .arms import ARMS
from .claims import CLAIMS, Claim, Measure
from .jobs import LARGE, SMALL, Result, Settings
from .verdicts import Effect, Values, effect_of, verdict

# The results of each arm that is finished, a seed each.
Results = Mapping[str, Sequence[Result]]

_UNITS: Mapping[Measure, str] = {"loss": "bits a byte", "labels": "points", "use": "bits a byte"}
_TITLES = {LARGE: "decoder-only, pretrained: large", SMALL: "decoder-only, pretrained: small"}


def write_report(output: Path, settings: Settings, about: Mapping[str, int | str], results: Results) -> str:
    """Write ``claims.md``, ``claims.json`` and ``curves.png``; the Markdown. What is not finished is left out."""
    effects = {claim: effect(claim, results) for claim in CLAIMS if {claim.better, claim.worse} <= results.keys()}
    markdown = "\n".join(
        [
            "## Claims", "", *claim_rows(effects), "",
            "## Runs", "", *run_rows(results), "",
            "## Text", "", *(f"- {what}: {count}" for what, count in about.items()), "",
        ]
    )  # fmt: skip
    content = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "text": dict(about),
        "claims": [
            {**asdict(claim), **asdict(found), "unit": _UNITS[claim.measure], "verdict": told(claim, found)}
            for claim, found in effects.items()
        ],
        "runs": {name: [summary(each) for each in some] for name, some in results.items()},
    }
    _replace(output / "claims.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    _replace(output / "claims.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    _replace(output / "curves.png", lambda path: draw(path, settings, results))
    return markdown


def effect(claim: Claim, results: Results) -> Effect:
    """By how much the better arm is better, positive if it is."""
    better, worse = (values(results[name], claim.measure) for name in (claim.better, claim.worse))
    return effect_of(worse, better) if claim.measure == "loss" else effect_of(better, worse)


def values(some: Sequence[Result], measure: Measure) -> Values:
    """A measure by seed and by held-out window or test example, (S, N)."""
    if measure == "labels":
        return 100 * np.array([each["classified"] for each in some], float)
    right = np.array([each["right"] for each in some], float)
    return right if measure == "loss" else np.array([each["wrong"] for each in some], float) - right


def told(claim: Claim, found: Effect) -> str:
    return verdict(found) if claim.claimed else f"no claim: {verdict(found)}"


def claim_rows(effects: Mapping[Claim, Effect]) -> Iterator[str]:
    yield "| claim | the paper | measured by | ours, with its 95% interval | verdict |"
    yield "|---|---|---|---|---|"
    names = {"loss": "loss, bits a byte", "labels": "labels, points", "use": "use, bits a byte"}
    for claim, found in effects.items():
        digits = 1 if claim.measure == "labels" else 3
        ours = f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"
        yield f"| {claim.title} | {claim.paper} | {names[claim.measure]} | {ours} | {told(claim, found)} |"


def run_rows(results: Results) -> Iterator[str]:
    yield "| run | parameters | MFLOPs of a window | loss, bits a byte | prefix use | labels right, % | CPU, s |"
    yield "|---|---|---|---|---|---|---|"
    for name, some in results.items():
        title = _TITLES.get(name) or ARMS[name].title
        summaries = [summary(each) for each in some]
        columns = [
            _spread([each[key] for each in summaries], digits) if key in summaries[0] else ""
            for key, digits in (("loss", 3), ("use", 3), ("accuracy", 1))
        ]
        seconds = np.mean([each["cpu_seconds"] for each in summaries])
        size = f"{some[0]['parameters']:,} | {some[0]['flops'] / 1e6:.1f}"
        yield f"| {title} | {size} | {' | '.join(columns)} | {seconds:.0f} |"


def summary(result: Result) -> dict[str, Any]:
    """A run in a few numbers."""
    right, wrong = (float(np.mean(result[name])) for name in ("right", "wrong"))
    found: dict[str, Any] = {"loss": right, "use": wrong - right}
    if "classified" in result:
        found["accuracy"] = 100 * float(np.mean(result["classified"]))
    return found | {key: result[key] for key in ("parameters", "flops", "cpu_seconds", "curve") if key in result}


def _spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def draw(path: Path, settings: Settings, results: Results) -> None:
    """Loss and use of the encoder against the tokens adapted on, one line a start of cross-attention."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    tokens = settings.sizes.batch * settings.sizes.window
    drawn = {name: arm for name, arm in ARMS.items() if arm.curve and name in results}
    for axes, key, title in zip(panels, ("loss", "use"), ("held-out loss, bits a byte", "encoder use, bits a byte")):
        highest = 0.0
        for number, (name, arm) in enumerate(drawn.items()):
            points = np.array([[point[key] for point in each["curve"]] for each in results[name]])
            steps = [point["step"] * tokens / 1000 for point in results[name][0]["curve"]]
            means = points.mean(axis=0)
            highest = max(highest, *means[2:])
            axes.plot(
                steps, means, _STYLES[number % len(_STYLES)], color=f"C{number % 10}",
                markersize=3, linewidth=1.2, label=arm.title if name != "copy" else "copied",
            )  # fmt: skip
        if key == "loss" and highest:  # what some starts begin with would hide all the rest
            axes.set_ylim(top=highest)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("thousand tokens of text")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=90, format="png")


_STYLES = ("o-", "s--", "^:")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}")
    write(partial)
    os.replace(partial, path)
