"""What post-training is told: the sections of a config file, each a dataclass whose fields are its keys.

Nothing here imports torch or transformers, so that an option is explained or refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UserError
from ..training.settings import DistillationSettings, ModelSettings, Part

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments as TrainingArguments


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
        encoder_bos: whether sources begin with the beginning-of-sequence token, saved with the tokenizer; left out, as
            the tokenizer has it.
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


PreferenceLoss = Literal["sigmoid", "ipo"]
ReferenceKind = Literal["precomputed", "adapter_off", "loaded"]


@dataclass
class DpoSettings:
    """What is optimised; names as TRL's.

    Attributes:
        loss_type: "sigmoid" is DPO's; "ipo" asks for a margin of 1 / (2 beta) (Azar et al., arXiv 2310.12036,
            equation 17), here between mean log-ratios a token, as TRL does, so that length alone wins nothing.
        beta: how much it costs to leave the reference; ipo's tau.
        label_smoothing: the share of preferences taken to be wrong way round, below 0.5 (Mitchell, "A note on DPO with
            noisy preferences", 2023); of sigmoid alone.
        reference: "adapter_off", the model without its adapter (LoRA); "precomputed", log-probabilities of all pairs
            under the model before its first step, kept in the output folder; "loaded", a second model. Left out,
            adapter_off with LoRA and precomputed without.
        reference_model: the checkpoint of a loaded one; left out, that which the run begins as.
    """

    loss_type: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: ReferenceKind | None = None
    reference_model: str | None = None

    def check(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            UserError: names the setting.
        """
        if self.loss_type not in get_args(PreferenceLoss):
            raise UserError(f"loss_type is {self.loss_type!r}: take one of {', '.join(get_args(PreferenceLoss))}.")
        if self.beta <= 0:
            raise UserError(f"beta is {self.beta}: it is above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}: it is at least 0 and below 0.5.")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(f"label_smoothing has no meaning with loss_type {self.loss_type}: leave it at 0.")
        if self.reference_model is not None and self.reference != "loaded":
            raise UserError(
                f"reference_model is {self.reference_model}, and reference {self.reference or 'left out'}: only one "
                "that is loaded is asked. Set reference to loaded, or leave reference_model out."
            )


@dataclass
class RewardSettings:
    """One reward.

    Attributes:
        function: "module:function", "file.py:function", or the name of one of this module.
        weight: what it counts in the sum.
        arguments: further keywords that it is called with.
    """

    function: str
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


ScaleRewards = Literal["group", "batch", "none"]
PolicyLossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclass
class GrpoSettings:
    """What is optimised; names and, but for ``rewards``, defaults as TRL's.

    Attributes:
        rewards: the functions, "module:function", "file.py:function" or a name of ``rewards.py``, or mappings of
            function, weight and arguments.
        num_generations: answers to a prompt, at least 2. (``training.per_device_train_batch_size`` counts prompts.)
        max_completion_length: tokens at which an answer is cut off.
        temperature, top_p: of sampling; the loss is of the model at this temperature.
        loss_type: how tokens are weighted; see ``token_weights``.
        scale_rewards: what advantages are divided by; see ``advantages``.
        epsilon, epsilon_high: how far the ratio of probabilities may move below and above 1; epsilon_high is epsilon
            if left out. Matters with num_iterations above 1 alone.
        beta: weight of the divergence from the model that the run began as; 0 loads none, and an adapter is switched
            off for it.
        reference_model: a checkpoint to diverge from instead; without an adapter, left out, that which the run begins
            as.
        num_iterations: steps on the same answers.
        mask_truncated_completions: learn nothing from answers that were cut off (arXiv 2503.14476, section 3.4).
    """

    rewards: list[str | RewardSettings] = field(default_factory=list)
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    loss_type: PolicyLossType = "dapo"
    scale_rewards: ScaleRewards = "group"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    reference_model: str | None = None
    num_iterations: int = 1
    mask_truncated_completions: bool = False

    def check(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            UserError: names the setting.
        """
        if self.num_generations < 2:
            raise UserError(f"num_generations is {self.num_generations}: a group has at least 2 answers to compare.")
        for name, kind in (("loss_type", PolicyLossType), ("scale_rewards", ScaleRewards)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise UserError(f"{name} is {value!r}: take one of {', '.join(get_args(kind))}.")
        if self.max_completion_length < 1 or self.num_iterations < 1:
            raise UserError(
                f"max_completion_length ({self.max_completion_length}) and num_iterations ({self.num_iterations}) "
                "begin at 1."
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature ({self.temperature}) is above 0, top_p ({self.top_p}) above 0 and up to 1.")
        if not 0 < self.epsilon < 1 or (self.epsilon_high or self.epsilon) < 0 or self.beta < 0:
            raise UserError(
                f"epsilon ({self.epsilon}) is above 0 and below 1, epsilon_high ({self.epsilon_high}) and beta "
                f"({self.beta}) are not negative."
            )
        if self.reference_model is not None and not self.beta:
            raise UserError(
                f"reference_model is {self.reference_model}, and with beta 0 no reference is asked: set beta above 0, "
                "or leave reference_model out."
            )


@dataclass
class PromptDataSettings:
    """Questions.

    Attributes:
        train: records to learn from, with the column prompt and those that reward functions ask for.
        eval: records to measure on.
        held_out: instead of those, so many examples of ``train``, evenly spread; they are not trained on.
        columns: what columns are called in the records, such as {prompt: question}.
        chat: make messages of plain questions (and answers), for a model that was tuned with a chat template.
        max_source: tokens of a question.
        chat_template: a file with a template, for a tokenizer that has none or another.
        seed: decides the order, and what is sampled.
        max_bad: unusable records that are skipped before the run is stopped.
    """

    train: RecordsSettings
    eval: RecordsSettings | None = None
    held_out: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    max_source: int = 512
    chat_template: str | None = None
    seed: int = 0
    max_bad: int = 100


@dataclass
class PairDataSettings(PromptDataSettings):
    """Questions with two answers: the columns prompt, chosen and rejected, or chosen and rejected conversations.

    Attributes:
        max_target: tokens of an answer with its end.
        others: as of ``PromptDataSettings``.
    """

    max_target: int = 512


@dataclass
class PolicySettings:
    """How the model is trained, beside ``training``.

    Attributes:
        frozen: parts that stay as they are: embeddings, encoder, decoder, cross_attention.
        encoder_bos: whether sources begin with the beginning-of-sequence token, saved with the tokenizer; left out, as
            the tokenizer has it.
    """

    frozen: list[Part] = field(default_factory=list)
    encoder_bos: bool | None = None


@dataclass
class SftSettings:
    """All sections of a config file. ``training`` has the keys of transformers' ``Seq2SeqTrainingArguments``; without
    ``lora`` every weight is trained."""

    model: ModelSettings
    data: AnswerDataSettings
    training: TrainingArguments
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    lora: LoraSettings | None = None


@dataclass
class DpoRun:
    """All sections of a config file of examples/dpo.py; without ``lora`` every weight is trained."""

    model: ModelSettings
    data: PairDataSettings
    training: TrainingArguments
    dpo: DpoSettings = field(default_factory=DpoSettings)
    tuning: PolicySettings = field(default_factory=PolicySettings)
    lora: LoraSettings | None = None


@dataclass
class GrpoRun:
    """All sections of a config file of examples/grpo.py; without ``lora`` every weight is trained."""

    model: ModelSettings
    data: PromptDataSettings
    training: TrainingArguments
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    tuning: PolicySettings = field(default_factory=PolicySettings)
    lora: LoraSettings | None = None
