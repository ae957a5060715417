"""Convert Gemma 2 checkpoints: python convert/from_gemma2.py --enc 9b --dec 2b --output DIR

The same as ``t5gemma convert`` with the aliases of Gemma 2.
"""

import sys
from pathlib import Path

# Runs from a clone that is not installed as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.cli import run_convert_script

if __name__ == "__main__":
    run_convert_script("gemma2")
