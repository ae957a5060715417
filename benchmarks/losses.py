"""Time and memory of the losses from hidden states, beside dense logits and the matrix products alone.

    python benchmarks/losses.py --repeats 3

Forward and backward pass of cross-entropy and of distillation (forward KL) for 1024 targets over 256,000 words, with
gradients of hidden states and head, logits softcapped. Dense: what transformers' models compute, softcapped logits
upcast to float32, and for distillation those of the teacher beside them. Times are medians of interleaved runs in one
process. Memory is the peak of anonymous memory (RssAnon) above what was there before, less the gradients that remain,
each in a process of its own. The floor is 3 products of (targets, width, words) for cross-entropy and 4 for
distillation, measured between the runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes

SOFTCAP = 30.0
PRODUCTS = {"cross-entropy": 3, "distillation": 4}
# Most of dense: memory, then time by type.
TARGETS = {
    "cross-entropy": (1 / 6, {torch.float32: 1.05, torch.bfloat16: 0.9}),
    "distillation": (1 / 5, {torch.float32: 0.85, torch.bfloat16: 0.65}),
}


class Case:
    """The tensors of one loss."""

    def __init__(self, loss: str, words: int, width: int, targets: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        make = lambda rows, scale: (torch.randn(rows, width) * scale).to(dtype)  # noqa: E731
        self.loss = loss
        self.hidden = make(targets, 1.0).requires_grad_()
        self.weight = make(words, 3 / width**0.5).requires_grad_()
        self.labels = torch.randint(words, (targets,))
        if loss == "distillation":
            self.taught, self.teacher = make(targets, 1.0), make(words, 3 / width**0.5)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        return sum(x.grad.nbytes for x in (self.hidden, self.weight))

    def ours(self) -> None:
        from modeling_t5gemma.losses import TeacherTarget, linear_loss

        target = None
        if self.loss == "distillation":
            target = TeacherTarget(self.taught, self.teacher, SOFTCAP)
        linear_loss(self.hidden, self.weight, self.labels, softcap=SOFTCAP, target=target).total.backward()

    def dense(self) -> None:
        logits = capped(self.hidden @ self.weight.T).float()
        if self.loss == "cross-entropy":
            F.cross_entropy(logits, self.labels).backward()
            return
        with torch.no_grad():
            taught = capped(self.taught @ self.teacher.T).float()
        F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean").backward()

    @torch.no_grad()
    def floor(self) -> None:
        """One product of each kind."""
        logits = self.hidden @ self.weight.T
        if self.loss == "distillation":
            self.taught @ self.teacher.T
        logits @ self.weight
        logits.T @ self.hidden


def capped(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / SOFTCAP) * SOFTCAP


def extra_memory_here(arguments: tuple, way: str, threads: int) -> int:
    torch.set_num_threads(threads)
    small = Case(arguments[0], 64, 32, 8, arguments[4])
    getattr(small, way)()  # what the first pass loads is no part of the answer
    case = Case(*arguments)
    return peak_bytes(getattr(case, way)) - case.gradient_bytes()


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def times(case: Case, repeats: int) -> dict[str, float]:
    measured: dict[str, list[float]] = {"dense": [], "ours": [], "floor": []}
    for repeat in range(repeats + 1):
        for way, values in measured.items():
            case.clear()
            took = seconds(getattr(case, way))
            if repeat > 0:
                values.append(took)
    return {way: statistics.median(values) for way, values in measured.items()}


def verdict(value: float, target: float) -> str:
    return f"{value:6.3f} (at most {target:.3f}: {'met' if value <= target else 'MISSED'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=256_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2304])
    parser.add_argument("--targets", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for width in given.widths:
        for name in given.dtypes:
            dtype = getattr(torch, name)
            for loss in given.losses:
                arguments = (loss, given.words, width, given.targets, dtype)
                took = times(Case(*arguments), given.repeats)
                memory = {
                    way: in_own_process(extra_memory_here, arguments, way, given.threads, for_memory=True)
                    for way in ("dense", "ours")
                }
                print(f"\n{loss}, width {width}, {name}: floor ({PRODUCTS[loss]} products) {took['floor']:.2f} s")
                for way in ("dense", "ours"):
                    print(
                        f"  {way:6}{took[way]:7.2f} s, {took[way] / took['floor']:.2f} of the floor"
                        f"{memory[way] / 2**20:8.0f} MiB extra"
                    )
                most_memory, most_time = TARGETS[loss]
                print(f"  extra memory of dense {verdict(memory['ours'] / memory['dense'], most_memory)}")
                print(f"  time of dense         {verdict(took['ours'] / took['dense'], most_time[dtype])}", flush=True)


if __name__ == "__main__":
    main()
