"""The paper's claims at a scale that fits a laptop: small models, real text, three seeds.

    python -m benchmarks.claims --output claims              # from the repository's folder
    python -m benchmarks.claims --output smoke --smoke       # that it works: everything tiny, its figures mean nothing

A decoder-only model in Gemma 2's shape is pretrained on the descriptions of Debian's packages with a BPE of its own,
then adapted in many ways (``arms.py``) on the same windows, measured (``measures.py``) and compared (``claims.py``,
``verdicts.py``). OUTPUT/claims.md has a row a claim, OUTPUT/claims.json the same and every run, OUTPUT/curves.png loss
and use of the encoder for each start of cross-attention. A finished run is not run again, and a stopped benchmark goes
on where it was. ``apt-get`` fetches the descriptions; where there is none, see ``examples/package_descriptions.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Two processes of one thread each are faster here than one of two. Read by torch when it is first imported.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.training.precision import faster_precision

from .arms import ARMS
from .jobs import LARGE, SMALL, Job, Settings, result_of, run_all
from .report import write_report
from .runs import run
from .sizes import FULL, SMOKE
from .text import load, prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("claims"))
    parser.add_argument("--lists", type=Path, help="a folder with Packages and Translation-en files")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    parser.add_argument("--report", action="store_true", help="tell what is finished, and run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    given = parser.parse_args()
    sizes = SMOKE if given.smoke else FULL
    output = given.output.resolve()
    prepare(output / "text", sizes, given.lists)
    settings = Settings(sizes, precision_of(output))
    seeds = range(sizes.seeds)
    # The longest first; the means need what they are of.
    stages = (
        [LARGE, SMALL],
        [name for name, arm in ARMS.items() if arm.kind != "merged"],
        [name for name, arm in ARMS.items() if arm.kind == "merged"],
    )
    for names in [] if given.report else stages:
        run_all([Job(name, seed) for name in names for seed in seeds], run, output, settings, given.workers)
    found = {name: [result_of(Job(name, seed), output, settings) for seed in seeds] for name in (LARGE, SMALL, *ARMS)}
    finished = {name: [each for each in some if each is not None] for name, some in found.items() if None not in some}
    print(write_report(output, settings, load(output / "text").about, finished))


def precision_of(output: Path) -> str:
    """The faster precision of this machine, found once for an output folder, so that all its runs have the same."""
    path = output / "precision"
    if not path.exists():
        path.write_text(str(faster_precision(torch.device("cpu")).dtype).removeprefix("torch.") + "\n")
    return path.read_text().strip()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
