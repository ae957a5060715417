"""Convert Gemma 3 checkpoints: python convert/from_gemma3.py --enc 270m --dec 270m --output DIR

The same as ``t5gemma convert`` with the aliases of Gemma 3.
"""

import sys
from pathlib import Path

# Runs from a clone that is not installed as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.cli import run_convert_script

if __name__ == "__main__":
    run_convert_script("gemma3")
