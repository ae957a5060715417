"""Quality against cost, and latency against the length of the input, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from ..errors import UserError
from .timing import Spread

LOGARITHMIC = 4  # where the dearest costs so many times the cheapest; on less, a logarithmic axis has no round numbers


@dataclass(frozen=True)
class Point:
    """A model's quality and what it costs; ``spread`` are the quartiles of the cost, where it was measured."""

    label: str
    cost: float
    quality: float
    encoder_decoder: bool
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A model's latency in seconds by input tokens."""

    label: str
    encoder_decoder: bool
    latencies: Mapping[int, Spread]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: of those at least as good, none costs less, and of those as cheap, none is
    better. In the order of their costs; of equal points the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, -each.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def quality_plot(points: Sequence[Point], cost: str, quality: str) -> bytes:
    """Quality over a cost, with the Pareto front (Figures 3 and 4 of arXiv 2504.06225). PNG.

    Args:
        cost, quality: the names of the axes, with units.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, (axes,) = _figure(1)
    front = pareto_front(points)
    axes.plot([p.cost for p in front], [p.quality for p in front], color="0.6", linewidth=1, label="Pareto front")
    for of_pairs, label in ((True, "encoder-decoder"), (False, "decoder-only")):
        chosen = [point for point in points if point.encoder_decoder == of_pairs]
        if not chosen:
            continue
        _scatter(axes, chosen, label, of_pairs)
    costs = [point.cost for point in points]
    if max(costs) > LOGARITHMIC * min(costs):
        axes.set_xscale("log")
    axes.margins(0.12)
    _annotate(axes, points, front)
    axes.set_xlabel(cost)
    axes.set_ylabel(quality)
    figure.legend(fontsize="small", loc="outside upper center", ncols=3)
    return _png(figure)


def latency_plot(panels: Mapping[str, Sequence[Line]]) -> bytes:
    """Latency over the length of the input, a panel each title (Figure 1 of arXiv 2501.16273). PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, all_axes = _figure(len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items()):
        for line in lines:
            lengths = sorted(line.latencies)
            spreads = [line.latencies[length] for length in lengths]
            style = "o-" if line.encoder_decoder else "s--"
            (drawn,) = axes.plot(lengths, [each.median for each in spreads], style, markersize=4, label=line.label)
            axes.fill_between(
                lengths,
                [each.low for each in spreads],
                [each.high for each in spreads],
                alpha=0.2,
                color=drawn.get_color(),
            )
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("input tokens")
        axes.set_ylabel("seconds (median, quartiles)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return _png(figure)


def _scatter(axes: Any, points: Sequence[Point], label: str, encoder_decoder: bool) -> None:
    costs, qualities = [p.cost for p in points], [p.quality for p in points]
    spreads = [p.spread or (p.cost, p.cost) for p in points]
    errors = [[c - s[0] for c, s in zip(costs, spreads)], [s[1] - c for c, s in zip(costs, spreads)]]
    axes.errorbar(costs, qualities, xerr=errors, fmt="o" if encoder_decoder else "s", capsize=2, label=label)


def _annotate(axes: Any, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Names towards the middle, so that they stay inside: above the front's points, below those that it beats."""
    axes.autoscale_view()  # else it is done when drawn, and nobody knows yet what is left
    to_share = axes.transData + axes.transAxes.inverted()
    for point in points:
        on_the_left = to_share.transform((point.cost, point.quality))[0] < 0.5
        above = point in front
        axes.annotate(
            point.label,
            (point.cost, point.quality),
            (5 if on_the_left else -5, 4 if above else -4),
            textcoords="offset points",
            horizontalalignment="left" if on_the_left else "right",
            verticalalignment="bottom" if above else "top",
            fontsize="small",
        )


def check_matplotlib() -> None:
    """Make sure that there can be plots.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("Plots need matplotlib: pip install modeling_t5gemma[train].") from error


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
