"""Times, memory, plots, the report and the command, on tiny checkpoints."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from modeling_t5gemma.commands.efficiency import efficiency
from modeling_t5gemma.efficiency import memory, plots, timing
from modeling_t5gemma.efficiency.accounting import parameters
from modeling_t5gemma.efficiency.plots import Point, pareto_front
from modeling_t5gemma.efficiency.timing import Measured, Request, Run, Spread, generate_once
from modeling_t5gemma.errors import UserError
from tests import tiny

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("efficiency")
    source = tiny.gemma3()
    for name, model in {"decoder-only": source, "layerwise": tiny.layerwise(source)}.items():
        model.save_pretrained(folder / name)
    return folder


def command(*arguments: object):
    app = typer.Typer(add_completion=False)
    app.command()(efficiency)
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "250"})
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


# Times


@pytest.mark.parametrize("make", [tiny.gemma3, tiny.t5gemma, lambda: tiny.layerwise(tiny.gemma3())])
def test_first_and_last_token_are_told_apart(make, monkeypatch):
    """A slow model's time stands where it was spent: what happens once before the first token, the rest after it."""
    model = make()
    calls = []
    forward = model.forward

    def slow(*args, **kwargs):
        calls.append(kwargs)
        time.sleep(0.2 if len(calls) == 1 else 0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    run = generate_once(model, Request(3, 11, 5))
    assert len(calls) == 5
    assert run.first >= 0.2
    assert run.total - run.first >= 4 * 0.02
    assert all(call["past_key_values"] is not None and call["use_cache"] for call in calls)


def test_the_end_of_a_text_does_not_stop():
    model = tiny.gemma3()
    model.generation_config.eos_token_id = list(range(tiny.VOCAB - 1))
    generate_once(model, Request(1, 3, 6))


def test_medians_and_rates():
    runs = [Run(first, first + 2.0) for first in (1.0, 2.0, 3.0, 4.0, 10.0)]
    measured = Measured.of(Request(3, 7, 5), runs)
    assert measured.first_token == Spread(3.0, 2.0, 4.0)
    assert measured.tokens_per_second.median == pytest.approx(3 * 4 / 2.0)
    assert measured.end_to_end.median == 5.0
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_a_rate_needs_two_tokens(tmp_path):
    with pytest.raises(UserError, match="2 or more"):
        timing.measure(str(tmp_path), [Request(1, 1, 1)], timing.Setup())


def test_unknown_devices_are_refused():
    for name in ("meta", "nonsense", "cuda:99"):
        with pytest.raises(UserError, match="--device"):
            timing.check_device(name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("room", [False, True])
def test_peak_memory_is_seen_though_it_is_freed(room, monkeypatch):
    """Also where the C library has room for it, which it keeps of what the process freed before."""
    read, reads = memory._anonymous_bytes, []

    def counted() -> int:
        reads.append(read())
        return reads[-1]

    def work() -> None:
        held = torch.ones(2**24)  # 64 MiB
        enough, patience = len(reads) + 2, time.monotonic() + 60  # the first of two may have begun before
        while len(reads) < enough and time.monotonic() < patience:
            time.sleep(0.001)
        del held

    if room:
        np.ones(31 * 2**17)  # once one of 31 MiB is freed, such pieces come from the heap
        pieces = [np.ones(20 * 2**17) for _ in range(8)]
        above = [np.ones(5000) for _ in range(2000)]  # so that the heap does not end with the pieces
        del pieces
    monkeypatch.setattr(memory, "_anonymous_bytes", counted)
    assert 60 * 2**20 < memory.peak_bytes(work) < 100 * 2**20
    if room:
        del above


def test_a_process_that_the_system_ends_is_told():
    with pytest.raises(UserError, match="ended the process that was measured"):
        memory.in_own_process(os._exit, 9)


def test_an_interruption_does_not_wait_for_the_process(monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        memory.in_own_process(time.sleep, 600)
    assert time.monotonic() - began < 300


FULL = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", FULL)
def test_what_does_not_fit_is_told(folder, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(timing, "generate_once", full)
    with pytest.raises(UserError, match=r"does not fit into memory with 2 rows of 8 \+ 4 tokens"):
        timing.times(str(folder / "layerwise"), [Request(2, 8, 4)], timing.Setup("float32", "cpu", 1, False, None))


def test_other_failures_are_not_taken_for_full_memory(folder, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(timing, "generate_once", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        timing.times(str(folder / "layerwise"), [Request(2, 8, 4)], timing.Setup("float32", "cpu", 1, False, None))


# Plots


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@given(POINTS)
def test_the_pareto_front_is_what_nothing_beats(pairs):
    points = [Point(str(number), cost, quality, True) for number, (cost, quality) in enumerate(pairs)]
    unbeaten = {
        (p.cost, p.quality)
        for p in points
        if not any(
            q.cost <= p.cost and q.quality >= p.quality and (q.cost, q.quality) != (p.cost, p.quality) for q in points
        )
    }
    front = pareto_front(points)
    assert {(p.cost, p.quality) for p in front} == unbeaten and len(front) == len(unbeaten)
    assert front == sorted(front, key=lambda p: p.cost)


# The command


@pytest.mark.needs("matplotlib")
def test_measured_beside_each_other(folder, tmp_path):
    """One run of everything: the two kinds, two lengths and batches, memory, and a report that needs nothing else."""
    out = tmp_path / "<report>"
    arguments = ["--input", "8,24", "--output", 4, "--batch", "1,2", "--repeats", 2, "--dtype", "float32"]
    quality = ["--quality", "decoder-only=1.5", "--quality", "layerwise=2"]
    shown = command(
        folder / "decoder-only", folder / "layerwise", *arguments, *quality, "--threads", 1, "--report", out
    )
    assert "Measured" in shown
    report = json.loads((out / "efficiency.json").read_text())
    for model, kind in zip(report["models"], (False, True), strict=True):
        assert model["encoder_decoder"] is kind
        assert [m["request"] for m in model["measured"]] == [c["request"] for c in model["calculated"]]
        assert len(model["measured"]) == 4
        for each in model["measured"]:
            assert 0 < each["first_token"]["low"] <= each["first_token"]["median"] < each["end_to_end"]["median"]
            assert each["peak_bytes"] >= 0 and each["tokens_per_second"]["median"] > 0
        one, two = (model["calculated"][number]["flops"] for number in (0, 2))  # batch 1 and 2, the same length
        assert two == {name: 2 * count for name, count in one.items()}
    page = (out / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    names = ["quality_flops.png", "quality_latency.png", "latency.png"]
    assert [base64.b64decode(image) for image in images] == [(out / name).read_bytes() for name in names]
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.needs("matplotlib")
def test_calculated_for_what_nobody_can_load(tmp_path):
    presets = ("gemma2-2b", "2b-2b", "9b-2b")
    shown = command(
        *presets, "--calculated", "--input", "4096", "--output", 4096, "--quality", "paper-pretrained",
        "--report", tmp_path,
    )  # fmt: skip
    assert "12,292,375,296" in shown and "Measured" not in shown
    assert "9b-2b: 1.047e14 FLOPs as arXiv 2504.06225 counts, which says 1.047e14." in shown
    assert {path.name for path in tmp_path.glob("*.png")} == {"quality_flops.png", "quality_latency_reported.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2b-2b"], "is a preset, without weights"),
        (["2b-2b", "2b-2b", "--calculated"], "given twice"),
        (["2b-2b", "--calculated", "--input", "8,x"], "--input '8,x'"),
        (["2b-2b", "--calculated", "--batch", "2,2"], "--batch '2,2'"),
        (["2b-2b", "--calculated", "--dtype", "int8"], "--dtype int8"),
        (["2b-2b", "--calculated", "--quality", "2b=3"], "--quality 2b=3"),
        (["2b-2b", "--calculated", "--quality", "2b-2b=nan"], "--quality 2b-2b=nan"),
        (["s-s", "--calculated", "--quality", "paper-pretrained"], "the paper has no s-s"),
        (["nowhere", "--calculated"], "no folder nowhere"),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command(*arguments)


def test_a_report_has_its_place_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_t5gemma.commands.efficiency.measure", lambda *_: pytest.fail("measured"))
    file = tmp_path / "file"
    file.touch()
    for place, words in [(file, "is a file. Give a folder"), (file / "x", "cannot be written")]:
        with pytest.raises(UserError, match=f"--report .*{words}"):
            command(folder / "layerwise", "--input", "8", "--output", 4, "--report", place)


@pytest.mark.needs("matplotlib")
def test_names_of_points_stay_inside_the_plot(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    corners = [Point(f"a name of {x} and {y}", x, y, x == y) for x in (1.0, 50.0) for y in (0.0, 9.0)]
    plots.quality_plot(corners, "FLOPs", "quality")
    (figure,) = drawn
    figure.canvas.draw()
    (axes,) = figure.axes
    assert len(axes.texts) == 4
    for text in axes.texts:
        box = text.get_window_extent()
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1), text.get_text()


# benchmarks/splits.py


def test_splits_have_equal_parameters():
    spec = importlib.util.spec_from_file_location("splits", ROOT / "benchmarks" / "splits.py")
    splits = importlib.util.module_from_spec(spec)
    sys.modules["splits"] = splits
    spec.loader.exec_module(splits)
    chosen = splits.configs(12, 256)
    counts = {name: parameters(config).total for name, config in chosen.items()}
    assert list(chosen) == ["decoder-only", "4:8", "6:6", "8:4"]
    assert max(counts.values()) - min(counts.values()) <= 12 * 3 * 256
    assert [(c.encoder.num_hidden_layers, c.decoder.num_hidden_layers) for c in list(chosen.values())[1:]] == [
        (4, 8), (6, 6), (8, 4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="multiple of 6"):
        splits.configs(8, 256)
