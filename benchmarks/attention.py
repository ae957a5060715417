"""The encoder's time and memory by attention backend, beside stock transformers' T5Gemma encoder.

    python benchmarks/attention.py --repeats 5
    python benchmarks/attention.py --threads 1 --clock cpu     on a machine that does other work

One forward and backward pass of the encoder stack: batch 1, random weights, gradients of all weights. Times are
medians of interleaved runs in one process. Memory is the peak of anonymous memory (RssAnon) above what there was
before the pass, each in a process of its own. The floor is the time of the matrix products alone (those of visible
keys, scores computed once) at the rate of a product of the MLP's size, measured between the runs. Stock T5Gemma has
no backend but eager; the rows without a softcap are there to compare with torch's fused kernel, which cannot cap.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A thread that waits for another one spins for a microsecond, then sleeps. With GNU OpenMP's default, which spins for
# longer, every case is several times slower as soon as the machine does anything else, and most of all those with many
# small products.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes

VOCABULARY = 4096
MEMORY_TARGET, TIME_TARGET, BFLOAT16_TIME_TARGET = 0.25, 0.8, 1.0


@dataclass(frozen=True)
class Case:
    """One way to run the encoder."""

    package: str
    backend: str
    softcap: bool

    def __str__(self) -> str:
        return f"{self.package} {self.backend}" + ("" if self.softcap else ", no softcap")


STOCK, OURS = Case("stock", "eager", True), Case("ours", "blocked", True)
UNCAPPED, FUSED = Case("ours", "blocked", False), Case("ours", "sdpa", False)
CASES = (STOCK, Case("ours", "eager", True), OURS, FUSED, UNCAPPED)


@dataclass(frozen=True)
class Setup:
    """What all cases share."""

    preset: str
    window: int
    threads: int
    dtype: torch.dtype

    def config(self, softcap: bool) -> Any:
        from modeling_t5gemma import T5GemmaConfig

        config = T5GemmaConfig.from_preset(f"{self.preset}-{self.preset}", vocab_size=VOCABULARY)
        config.encoder.sliding_window = self.window
        if not softcap:
            config.encoder.attn_logit_softcapping = config.decoder.attn_logit_softcapping = None
        return config

    def encoder(self, case: Case) -> torch.nn.Module:
        """An encoder in training mode; both packages' have the same weights' shapes."""
        config = self.config(case.softcap)
        if case.package == "ours":
            from modeling_t5gemma import T5GemmaModel
        else:
            from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig
            from transformers.models.t5gemma.modeling_t5gemma import T5GemmaModel

            config = T5GemmaConfig(encoder=config.encoder.to_dict(), decoder=config.decoder.to_dict())
        torch.manual_seed(0)
        model = T5GemmaModel._from_config(config, attn_implementation=case.backend)
        return model.encoder.to(self.dtype).train()


def step(encoder: torch.nn.Module, tokens: int) -> None:
    """One forward and backward pass."""
    encoder.zero_grad(set_to_none=True)
    ids = torch.arange(tokens)[None] % (VOCABULARY - 3) + 3
    hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    hidden.backward(torch.ones_like(hidden))


def available_bytes() -> int:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def memory_here(setup: Setup, case: Case, tokens: int) -> int:
    torch.set_num_threads(setup.threads)
    encoder = setup.encoder(case)
    step(encoder, 16)  # what the first pass loads is no part of the answer
    encoder.zero_grad(set_to_none=True)
    return peak_bytes(lambda: step(encoder, tokens))


def product_rate(setup: Setup, tokens: int, clock: Callable[[], float]) -> float:
    """Floating-point operations a second of the MLP's first product."""
    config = setup.config(True).encoder
    x = torch.randn(tokens, config.hidden_size).to(setup.dtype)
    weight = torch.randn(config.hidden_size, config.intermediate_size).to(setup.dtype)
    start = clock()
    for _ in range(5):
        x @ weight
    return 5 * 2 * x.numel() * weight.shape[1] / (clock() - start)


def operations(setup: Setup, tokens: int) -> float:
    """Floating-point operations of the matrix products that a forward and backward pass cannot do without."""
    config = setup.config(True).encoder
    attention_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * attention_width + 2 * kv_width + 3 * config.intermediate_size)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = {"full_attention": tokens * tokens, "sliding_attention": int((distance.abs() < setup.window).sum())}
    products = sum(weights * tokens + 2 * attention_width * seen[kind] for kind in config.layer_types)
    return 3 * 2 * products


def times(setup: Setup, cases: tuple[Case, ...], tokens: int, repeats: int, clock: Callable[[], float]) -> dict:
    """Median seconds of each case, and of the floor under the key None."""
    encoders = {case: setup.encoder(case) for case in cases}
    measured: dict[Case | None, list[float]] = {case: [] for case in (None, *cases)}
    for repeat in range(repeats + 1):
        for case, encoder in encoders.items():
            start = clock()
            step(encoder, tokens)
            if repeat > 0:
                measured[case].append(clock() - start)
        measured[None].append(operations(setup, tokens) / product_rate(setup, tokens, clock))
    return {case: statistics.median(values) for case, values in measured.items()}


def table(
    setup: Setup, cases: tuple[Case, ...], tokens: int, repeats: int, clock: Callable[[], float]
) -> tuple[dict, dict]:
    """Prints and returns seconds and bytes by case."""
    seconds = times(setup, cases, tokens, repeats, clock)
    peaks = {case: in_own_process(memory_here, setup, case, tokens, for_memory=True) for case in cases}
    print(f"\n{tokens} tokens, {str(setup.dtype).removeprefix('torch.')}, load {os.getloadavg()[0]:.1f}")
    print(f"  {'':28}{'seconds':>9}{'of stock':>10}{'of floor':>10}{'extra MiB':>11}{'of stock':>10}{'KiB/token':>11}")
    for case in cases:
        stock_time = f"{seconds[case] / seconds[STOCK]:.2f}" if STOCK in seconds else ""
        stock_peak = f"{peaks[case] / peaks[STOCK]:.3f}" if STOCK in peaks else ""
        print(
            f"  {case!s:28}{seconds[case]:9.3f}{stock_time:>10}{seconds[case] / seconds[None]:10.2f}"
            f"{peaks[case] / 2**20:11.0f}{stock_peak:>10}{peaks[case] / tokens / 2**10:11.0f}"
        )
    print(f"  {'floor: matrix products':28}{seconds[None]:9.3f}", flush=True)
    return seconds, peaks


def verdict(name: str, value: float, target: float) -> None:
    print(f"  {name:64}{value:7.3f}   target at most {target:g}: {'met' if value <= target else 'MISSED'}")


def stock_cases(peak: int, tokens: int, longer: int) -> tuple[Case, ...]:
    """Stock's eager encoder if its memory, which grows with the square of the length, will do."""
    need = peak * (longer / tokens) ** 2
    if need < 0.9 * available_bytes():
        return (STOCK,)
    print(f"\nstock eager at {longer} tokens would need {need / 2**30:.0f} GiB and is left out")
    return ()


def run(setup: Setup, arguments: argparse.Namespace, clock: Callable[[], float]) -> None:
    tokens, longer = arguments.tokens, arguments.longer
    seconds, peaks = table(setup, CASES, tokens, arguments.repeats, clock)
    stock = stock_cases(peaks[STOCK], tokens, longer)
    _, longer_peaks = table(setup, (*stock, OURS), longer, 1, clock)
    print()
    is_float32 = setup.dtype == torch.float32
    if is_float32:
        verdict("blocked / stock eager, extra memory", peaks[OURS] / peaks[STOCK], MEMORY_TARGET)
    verdict(
        "blocked / stock eager, time",
        seconds[OURS] / seconds[STOCK],
        TIME_TARGET if is_float32 else BFLOAT16_TIME_TARGET,
    )
    per_token = (longer_peaks[OURS] / longer) / (peaks[OURS] / tokens)
    verdict(f"blocked, memory per token at {longer} / at {tokens}", per_token, 1.0)
    print(f"  {'blocked / sdpa without softcap, time':64}{seconds[UNCAPPED] / seconds[FUSED]:7.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="s", help="a released stack")
    parser.add_argument("--window", type=int, default=512, help="of every other layer")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--longer", type=int, default=8192, help="another length, for the memory per token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the sum over all threads")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    for name in arguments.dtypes:
        run(Setup(arguments.preset, arguments.window, arguments.threads, getattr(torch, name)), arguments, clock)


if __name__ == "__main__":
    main()
