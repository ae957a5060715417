"""What an encoder-decoder learns to do with a window of text: PrefixLM, span corruption (T5, UL2), infilling (BART).

An objective turns a window of tokens into a source and a target. What it draws comes from a generator that is a
function of (seed, epoch, index) alone, so any worker on any rank makes the same example, in any order.
"""

from .combining import Mixture, Schedule
from .denoising import BartInfilling, Denoiser, SpanCorruption
from .example import Example, Objective, Tokens, example_rng
from .parsing import DENOISERS, PRESETS, objective_from, schedule_from
from .prefix_lm import PrefixLM
from .sentinels import SENTINELS_FILE, load_sentinels, save_sentinels, sentinels_of
from .windows import check_window, longest_window

__all__ = [
    "DENOISERS",
    "PRESETS",
    "SENTINELS_FILE",
    "BartInfilling",
    "Denoiser",
    "Example",
    "Mixture",
    "Objective",
    "PrefixLM",
    "Schedule",
    "SpanCorruption",
    "Tokens",
    "check_window",
    "example_rng",
    "load_sentinels",
    "longest_window",
    "objective_from",
    "save_sentinels",
    "schedule_from",
    "sentinels_of",
]
