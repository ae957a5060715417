"""What a SuperGLUE run is told: the sections of a config file, each a dataclass whose fields are its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HUB = "aps/super_glue"
How = Literal["grid", "optuna"]


@dataclass
class DataSettings:
    """The data.

    Attributes:
        path: a folder in the official JSONL format or a local copy of the Hub's parquet files, or a Hub data set.
        revision: of the data set on the Hub.
        max_length: tokens that an example is cut to; left out, as many as the model was made for.
        test: predict the test split too, for a submission.
    """

    path: str = HUB
    revision: str | None = None
    max_length: int | None = None
    test: bool = True


@dataclass
class HeadSettings:
    """How an encoder-decoder classifies; a decoder-only model reads its last token.

    Attributes:
        reads: the encoder alone (the paper's), or the decoder, which reads the input too.
        pooling: the last token (the paper's), or the mean over all.
        attention: an attention backend (docs/attention.md); the best legal one if left out.
        dtype: what the weights are kept in; matrix products follow ``training.bf16``.
    """

    reads: Literal["encoder", "encoder_decoder"] = "encoder"
    pooling: Literal["last", "mean"] = "last"
    attention: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class SpaceSettings:
    """What is searched; the first seed decides, and the chosen setting is then run with the others.

    The paper (arXiv 2504.06225) searched the same three and does not say among which values: these are ours.

    Attributes:
        learning_rates, batch_sizes, dropouts: the grid. Optuna draws learning rates (on a logarithmic scale) and
            dropouts between the smallest and the largest, and batch sizes from the list.
        seeds: of the classifier's first weights, the order of the data and dropout.
        trials: how many settings optuna tries for a task.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4])
    batch_sizes: list[int] = field(default_factory=lambda: [16, 32])
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.1])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    trials: int = 20
