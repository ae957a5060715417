"""What post-training is told: the sections of a config file, each a dataclass whose fields are its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..training.parts import Part


@dataclass
class RecordsSettings:
    """Where records come from.

    Attributes:
        path: a .jsonl, .json or .parquet file, a folder of them, or a Hub data set.
        name, split, revision: which part of a data set.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass
class ColumnsSettings:
    """What the columns are called; those of ``messages`` are looked for first, then both of the others.

    Attributes:
        messages: lists of messages, each with ``role`` and ``content``; null to leave such a column alone.
        prompt, completion: strings, or lists of messages; any two columns of texts can be named.
        tools: JSON schemas of the functions that may be called, where there are any.
    """

    messages: str | None = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    tools: str | None = "tools"


@dataclass
class AnswerDataSettings:
    """Questions and answers.

    Attributes:
        train: records to learn from.
        eval: records to measure on.
        held_out: instead of those, so many records of ``train``, evenly spread; they are not trained on.
        columns: what the columns are called.
        turns: of a conversation, "all" answers of the assistant (an example each) or the "last" alone.
        max_source: tokens of a question.
        max_target: tokens of an answer with its end.
        longer: "cut" what is longer, or "skip" the example; both are counted.
        chat_template: a file with a template, for a tokenizer that has none or another.
        pack: tokens of a row in encoder and decoder, to fill with several examples; left out, each is a row of its
            own. A decoder-only model's rows have their sum.
        processes: that tokenise.
        workers: processes that prepare batches.
        seed: decides the order.
        block: examples that are shuffled and packed together.
        max_bad: unusable records that are skipped before the run is stopped.
    """

    train: RecordsSettings
    eval: RecordsSettings | None = None
    held_out: int = 0
    columns: ColumnsSettings = field(default_factory=ColumnsSettings)
    turns: Literal["all", "last"] = "all"
    max_source: int = 1024
    max_target: int = 512
    longer: Literal["cut", "skip"] = "cut"
    chat_template: str | None = None
    pack: tuple[int, int] | None = None
    processes: int = 1
    workers: int = 0
    seed: int = 0
    block: int = 1024
    max_bad: int = 100


@dataclass
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685) in place of full fine-tuning.

    Attributes:
        rank: of the products that are learnt.
        alpha: they are multiplied with alpha / rank.
        dropout: of their inputs.
        targets: a regular expression for whole names of modules; left out, every projection of attention and FFN.
        four_bit: keep the frozen weights in 4-bit NormalFloat (arXiv 2305.14314); needs bitsandbytes.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | None = None
    four_bit: bool = False


@dataclass
class TuningSettings:
    """What is trained, beside ``training``.

    Attributes:
        frozen: parts that stay as they are: embeddings, encoder, decoder, cross_attention.
        learning_rates: factors on the learning rate by part.
        encoder_bos: whether sources begin with the beginning-of-sequence token; left out, where cross-attention is
            layerwise.
    """

    frozen: list[Part] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    encoder_bos: bool | None = None


@dataclass
class EvaluationSettings:
    """What is measured at every evaluation beside the losses.

    Attributes:
        generate: for how many held-out examples answers are generated and compared with the right ones.
        samples: how many of them are printed.
        max_new_tokens: of an answer; left out, ``data.max_target``.
        num_beams: 1 is greedy.
    """

    generate: int = 0
    samples: int = 2
    max_new_tokens: int | None = None
    num_beams: int = 1
