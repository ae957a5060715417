"""Latency and memory of generating a given number of tokens from random ones.

Both kinds of model generate greedily with their caches, and do not stop at the end of a text. What the tokens are does
not matter to the time, but for a model that chooses its parts by them, which none here does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError
from ..io.tensors import check_finite_model
from ..training.loading import load_model
from ..training.settings import ModelSettings
from .memory import in_own_process, peak_bytes


@dataclass(frozen=True)
class Request:
    """What is asked of a model: ``batch`` rows of ``input_tokens``, ``output_tokens`` new ones for each."""

    batch: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Run:
    """Seconds from the call of ``generate`` to the first token and to the last, for all rows together."""

    first: float
    total: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measured:
    """Times of one request.

    Attributes:
        first_token, end_to_end: seconds.
        tokens_per_second: after the first token, of all rows together.
        peak_bytes: working memory above the loaded model; None where it was not measured.
    """

    request: Request
    first_token: Spread
    tokens_per_second: Spread
    end_to_end: Spread
    peak_bytes: int | None = None

    @classmethod
    def of(cls, request: Request, runs: Sequence[Run], peak: int | None = None) -> Measured:
        further = request.batch * (request.output_tokens - 1)
        return cls(
            request,
            Spread.of([run.first for run in runs]),
            Spread.of([further / (run.total - run.first) for run in runs]),
            Spread.of([run.total for run in runs]),
            peak,
        )


@dataclass(frozen=True)
class Setup:
    """How checkpoints are measured.

    Attributes:
        dtype: of the weights, "float32" or "bfloat16".
        device: "cpu", "cuda", "cuda:1".
        repeats: timed runs of each request, after one that is not timed.
        memory: whether peak memory is measured too, in another process.
        threads: of torch on a CPU; None leaves them as they are.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    repeats: int = 5
    memory: bool = True
    threads: int | None = None


class _Stopwatch(BaseStreamer):
    """The time at which each token came. ``generate`` hands over tokens when they are on the CPU, so they are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def generate_once(model: Any, request: Request, seed: int = 0) -> Run:
    """Generate from random tokens, and take the time.

    Args:
        model: an encoder-decoder or a decoder-only model in evaluation mode, on a CPU or a CUDA GPU.
    """
    ids, special = _random_ids(model, request, seed)
    watch = _Stopwatch()
    begin = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=request.output_tokens,
        max_new_tokens=request.output_tokens,
        streamer=watch,
        **special,
    )
    _, *tokens = watch.times  # the first is the prompt
    assert len(tokens) == request.output_tokens, "the length was forced"
    return Run(tokens[0] - begin, tokens[-1] - begin)


def measure(path: str, requests: Sequence[Request], setup: Setup) -> list[Measured]:
    """Measure a checkpoint, in processes of its own: one for the times, one for the memory.

    Raises:
        UserError: it cannot be loaded, there is no such device, or a request cannot be measured or needs more memory
            than there is.
    """
    for request in requests:
        if min(request.batch, request.input_tokens) < 1 or request.output_tokens < 2:
            raise UserError(f"{request}: batch and input have to be 1 or more, the output 2 or more, to have a rate.")
    runs = in_own_process(times, path, requests, setup)
    peaks: list[int | None] = [None] * len(requests)
    if setup.memory:
        peaks = list(in_own_process(peaks_of, path, requests, setup, for_memory=True))
    return [Measured.of(*each) for each in zip(requests, runs, peaks, strict=True)]


def times(path: str, requests: Sequence[Request], setup: Setup) -> list[list[Run]]:
    """The repeats of each request; the requests take turns, so that a disturbance hits all of them."""
    model = _load(path, setup)
    for request in requests:
        _fitting(path, model, request)
    rounds = [[_fitting(path, model, request, seed) for request in requests] for seed in range(setup.repeats)]
    return [list(runs) for runs in zip(*rounds)]


def peaks_of(path: str, requests: Sequence[Request], setup: Setup) -> list[int]:
    """The working memory of each request, in bytes."""
    model = _load(path, setup)
    generate_once(model, Request(1, 1, 2))  # what the first call makes and keeps
    return [peak_bytes(lambda each=request: _fitting(path, model, each), model.device) for request in requests]  # type: ignore[misc]


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: there is none, or it hands over its tokens a step late, so that the first cannot be timed.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used on this machine. Give cpu, or a GPU as cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: times are taken on cpu and cuda.")
    return device


def _load(path: str, setup: Setup) -> Any:
    device = check_device(setup.device)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    model = load_model(ModelSettings(path, dtype=setup.dtype))  # type: ignore[arg-type]
    check_finite_model(model, path)
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path} does not fit on {device}. Give --dtype bfloat16 or --device cpu.") from error


def _fitting(path: str, model: Any, request: Request, seed: int = 0) -> Run:
    """``generate_once``, told in one line where the memory is full."""
    try:
        return generate_once(model, request, seed)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise UserError(
            f"{path} does not fit into memory with {request.batch} rows of {request.input_tokens} + "
            f"{request.output_tokens} tokens. Leave that out of --input or --batch, or give --dtype bfloat16."
        ) from error


def _random_ids(model: Any, request: Request, seed: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Ids of ordinary tokens, int64 (batch, S), and the special ones that ``generate`` has to be told."""
    config = model.config.get_text_config() if not model.config.is_encoder_decoder else model.config.encoder
    generator = torch.Generator().manual_seed(seed)
    low = min(10, config.vocab_size // 2)  # past the special tokens, which may be padding
    ids = torch.randint(low, config.vocab_size, (request.batch, request.input_tokens), generator=generator)
    special = {"pad_token_id": 0 if config.pad_token_id is None else config.pad_token_id}
    if model.config.is_encoder_decoder:
        special["decoder_start_token_id"] = model.decoder_start_token_id()
    return ids.to(model.device), special
