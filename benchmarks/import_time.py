"""What `import modeling_t5gemma` costs beside transformers' own T5Gemma: fresh interpreters, interleaved."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "transformers": "from transformers import T5GemmaForConditionalGeneration",
    "modeling_t5gemma": "import modeling_t5gemma",
}
# An installed package has its bytecode on disk; this one shall too, whatever the shell says.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats

    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats + 1):  # the first round fills the file cache and the bytecode
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(measured[1:]) for name, measured in times.items()}
    for name, measured in times.items():
        fastest, slowest = min(measured[1:]), max(measured[1:])
        print(f"{name:<17} {medians[name]:.3f} s  (median of {repeats}; {fastest:.3f} to {slowest:.3f})")
    print(f"{'ratio':<17} {medians['modeling_t5gemma'] / medians['transformers']:.3f}")


if __name__ == "__main__":
    main()
