"""What a training run is told: the sections of a config file, each a dataclass whose fields are its keys.

Nothing here imports torch or transformers, so that an option is explained or refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments as TrainingArguments

Part = Literal["embeddings", "encoder", "decoder", "cross_attention"]


@dataclass
class ModelSettings:
    """The checkpoints.

    Attributes:
        path: the converted encoder-decoder, a folder or a Hub repository.
        attention: an attention backend (docs/attention.md); the best legal one if left out.
        dtype: what the weights are kept in; matrix products follow ``training.bf16``.
        teacher: the decoder-only original to learn from; left out, the text itself is learnt.
        teacher_dtype: what the teacher's weights are loaded in.
        teacher_cache: a folder that ``t5gemma teacher-cache`` made of the first source, instead of a teacher.
    """

    path: str
    attention: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher: str | None = None
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    teacher_cache: str | None = None


@dataclass
class SourceSettings:
    """One part of the training text.

    Attributes:
        path: a folder that ``t5gemma tokenize`` wrote, a Hub dataset, or local .jsonl, .json, .parquet or .txt files.
        weight: how many of the examples come from it, relative to the others.
        name, split, column, revision: which part of a dataset, and where the text stands in a record.
        streaming: read a dataset record by record instead of tokenising it first.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    streaming: bool = False


@dataclass
class DataSettings:
    """The training text and how it is cut.

    Attributes:
        sources: what is read.
        window: tokens of text an example is made of; a longer document is cut into several.
        pack: tokens of a row in encoder and decoder, to fill with several short examples; left out, each example is a
            row of its own.
        held_out: how many windows are kept for measuring, evenly spread over the first source.
        workers: processes that prepare batches.
        seed: decides order and corruption.
        block: samples that are shuffled and packed together; stages change at its borders.
        max_bad: malformed or empty records that are skipped before the run is stopped.
        cache: where text is tokenised to; left out, a folder ``tokens`` in the output folder.
    """

    sources: list[SourceSettings]
    window: int = 8192
    pack: tuple[int, int] | None = None
    held_out: int = 64
    workers: int = 0
    seed: int = 0
    block: int = 1024
    max_bad: int = 100
    cache: str | None = None


@dataclass
class DistillationSettings:
    """How the teacher is followed.

    Attributes:
        divergence: forward_kl (the paper's), reverse_kl or jensen_shannon.
        temperature: of both sides' distributions.
        share: weight of the divergence against 1 - share of cross-entropy with the text.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: float = 1.0
    share: float = 1.0


@dataclass
class RecipeSettings:
    """What is trained when.

    Attributes:
        frozen: parts that stay as they are: embeddings, encoder, decoder, cross_attention.
        learning_rates: factors on the learning rate by part.
        alone: steps in which cross-attention is trained alone; left out, 1000 where the converter drew it at random,
            0 otherwise.
        joining: steps over which the rest then rises from a learning rate of 0.
        encoder_bos: whether sources begin with the beginning-of-sequence token, saved with the tokenizer; left out, as
            the tokenizer has it.
        sentinels: ids of the tokens that stand for masked spans; left out, the tokenizer's unused ones.
        mode_tokens: ids of the tokens that name a denoiser's kind, by the names the objective gives them.
    """

    frozen: list[Part] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    alone: int | None = None
    joining: int = 100
    encoder_bos: bool | None = None
    sentinels: list[int] | None = None
    mode_tokens: dict[str, int] | None = None


# An objective is a name, a mapping or a list of stages: see ``objectives.schedule_from``.
ObjectiveSettings = str | dict[str, Any] | list[dict[str, Any]]


@dataclass
class AdaptSettings:
    """All sections of a config file. ``training`` has the keys of transformers' ``Seq2SeqTrainingArguments``."""

    model: ModelSettings
    data: DataSettings
    training: TrainingArguments
    objective: ObjectiveSettings = field(default="prefix_lm", metadata={"help": "docs/training.md has the forms"})
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
