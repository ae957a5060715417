"""Everything about some models beside each other: tables, plots, JSON, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..training.shards import write_atomically
from .accounting import Flops, Parameters, cache_bytes, flops, parameters
from .paper import PAPER
from .plots import Line, Point, latency_plot, quality_plot
from .timing import Measured, Request, Spread

Table = list[list[str]]
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Calculated:
    """What follows from the config, for all rows of a request."""

    request: Request
    flops: Flops
    cache_bytes: int


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        quality: a score, higher is better; None where none was given.
    """

    label: str
    encoder_decoder: bool
    parameters: Parameters
    calculated: Sequence[Calculated]
    measured: Sequence[Measured] = ()
    quality: float | None = None

    @classmethod
    def of(
        cls,
        label: str,
        config: Any,
        requests: Sequence[Request],
        bytes_per_value: int,
        measured: Sequence[Measured] = (),
        quality: float | None = None,
    ) -> Entry:
        calculated = [
            Calculated(
                each,
                _times(flops(config, each.input_tokens, each.output_tokens), each.batch),
                each.batch * cache_bytes(config, each.input_tokens, each.output_tokens, bytes_per_value),
            )
            for each in requests
        ]
        return cls(label, config.is_encoder_decoder, parameters(config), calculated, measured, quality)


def tables(entries: Sequence[Entry]) -> dict[str, Table]:
    """Rows of cells by title, the heading first. What was not measured has no table."""
    found = {
        "Parameters": [["model", "kind", "all", "without embeddings"]]
        + [
            [
                entry.label,
                "encoder-decoder" if entry.encoder_decoder else "decoder-only",
                f"{entry.parameters.total:,}",
                f"{entry.parameters.without_embeddings:,}",
            ]
            for entry in entries
        ],
        "Calculated": [["model", *_REQUEST, "TFLOPs", "encoder", "decoder", "cross-attention", "head", "cache MB"]]
        + [_calculated_row(entry, each) for entry in entries for each in entry.calculated],
    }
    if any(entry.measured for entry in entries):
        head = ["first token ms", "tokens/s", "end to end s", "peak memory MB"]
        found["Measured (median, quartiles)"] = [["model", *_REQUEST, *head]] + [
            _measured_row(entry, each) for entry in entries for each in entry.measured
        ]
    return found


def plots(entries: Sequence[Entry], quality: str) -> dict[str, bytes]:
    """PNGs by file name: those for which there is something to draw.

    Quality is set against the longest input with the first batch that was asked for.

    Args:
        quality: what the scores are, for the axis.

    Raises:
        UserError: matplotlib is not installed.
    """
    found = {}
    scored = [entry for entry in entries if entry.quality is not None]
    if scored:
        asked = _representative([each.request for each in scored[0].calculated])
        what = f"{asked.input_tokens} + {asked.output_tokens} tokens, batch {asked.batch}"
        points = [_point(e, c.flops.total) for e in scored for c in e.calculated if c.request == asked]
        found["quality_flops.png"] = quality_plot(points, f"FLOPs, {what}", quality)
        points = [_point(e, m.end_to_end) for e in scored for m in e.measured if m.request == asked]
        if points:
            found["quality_latency.png"] = quality_plot(points, f"seconds, {what}", quality)
        reported = [_point(entry, PAPER[entry.label].latency) for entry in scored if entry.label in PAPER]
        if len(reported) > 1 and not points:
            found["quality_latency_reported.png"] = quality_plot(
                reported, "seconds a question of GSM8K, as reported in arXiv 2504.06225", quality
            )
    if any(entry.measured for entry in entries):
        batch = next(each.request.batch for entry in entries for each in entry.measured)
        found["latency.png"] = latency_plot(
            {
                f"first token, batch {batch}": _lines(entries, batch, "first_token"),
                f"end to end, batch {batch}": _lines(entries, batch, "end_to_end"),
            }
        )
    return found


def html(facts: Mapping[str, str], found: Mapping[str, Table], images: Mapping[str, bytes]) -> str:
    """One page, the images in it.

    Args:
        facts: what was asked and on which machine.
        found: ``tables``.
        images: ``plots``.
    """
    parts = ["<!doctype html>", '<meta charset="utf-8">', "<title>Efficiency</title>", f"<style>{_STYLE}</style>"]
    parts += ["<h1>Efficiency</h1>", _html_table([[name, value] for name, value in facts.items()], heading=False)]
    for name, png in images.items():
        title = escape(name.removesuffix(".png").replace("_", " "))
        data = base64.b64encode(png).decode()
        parts.append(f'<p><img alt="{title}" src="data:image/png;base64,{data}"></p>')
    for title, rows in found.items():
        parts += [f"<h2>{escape(title)}</h2>", _html_table(rows)]
    parts.append(
        "<p>FLOPs are those of matrix products, for all rows. A first token is timed from the call of generate. "
        "Peak memory is working memory above the loaded model.</p>"
    )
    return "\n".join(parts) + "\n"


def write_report(folder: Path, facts: Mapping[str, str], entries: Sequence[Entry], quality: str) -> list[Path]:
    """Write ``efficiency.json``, the plots and ``report.html``; the files, the report last.

    Raises:
        UserError: the disk is full, or matplotlib is not installed.
    """
    images = plots(entries, quality)
    content = {"facts": dict(facts), "models": [asdict(entry) for entry in entries]}
    files = {
        "efficiency.json": (json.dumps(content, indent=1) + "\n").encode(),
        **images,
        "report.html": html(facts, tables(entries), images).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, [data])
    return [folder / name for name in files]


_REQUEST = ("batch", "input", "output")


def _request(request: Request) -> list[str]:
    return [str(request.batch), str(request.input_tokens), str(request.output_tokens)]


def _calculated_row(entry: Entry, each: Calculated) -> list[str]:
    counts = (each.flops.total, *asdict(each.flops).values())
    return [
        entry.label,
        *_request(each.request),
        *(f"{n / 1e12:,.4g}" for n in counts),
        f"{each.cache_bytes / 1e6:,.1f}",
    ]


def _measured_row(entry: Entry, each: Measured) -> list[str]:
    return [
        entry.label,
        *_request(each.request),
        _spread(each.first_token, 1000, 1),
        _spread(each.tokens_per_second, 1, 2),
        _spread(each.end_to_end, 1, 3),
        "" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.0f}",
    ]


def _spread(spread: Spread, factor: float, digits: int) -> str:
    median, low, high = (f"{factor * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low} to {high})"


def _times(one: Flops, batch: int) -> Flops:
    return Flops(*(batch * count for count in asdict(one).values()))


def _representative(requests: Sequence[Request]) -> Request:
    return max(requests, key=lambda each: (each.batch == requests[0].batch, each.input_tokens))


def _point(entry: Entry, cost: float | Spread) -> Point:
    assert entry.quality is not None
    if isinstance(cost, Spread):
        return Point(entry.label, cost.median, entry.quality, entry.encoder_decoder, (cost.low, cost.high))
    return Point(entry.label, cost, entry.quality, entry.encoder_decoder)


def _lines(entries: Sequence[Entry], batch: int, name: str) -> list[Line]:
    return [
        Line(
            entry.label,
            entry.encoder_decoder,
            {m.request.input_tokens: getattr(m, name) for m in entry.measured if m.request.batch == batch},
        )
        for entry in entries
        if entry.measured
    ]


def _html_table(rows: Table, *, heading: bool = True) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if heading and number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"
