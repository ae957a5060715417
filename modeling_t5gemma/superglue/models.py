"""A classifier from a checkpoint: an encoder-decoder of ours, or the decoder-only baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from ..configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from ..errors import UserError
from ..io.checkpoints import load_model, locate
from ..text.rules import source_begin
from ..training.loading import load_config
from ..training.parts import freeze
from ..training.tokenizing import load_tokenizer
from .data import InputForm
from .settings import DataSettings, HeadSettings
from .tasks import Task

Reads = Literal["encoder", "encoder_decoder", "decoder"]


@dataclass(frozen=True)
class Checkpoint:
    """What is to be tuned.

    Attributes:
        path: a folder or Hub repository.
        reads: which stacks read the text; "decoder" for a decoder-only model.
        form: how it reads a text.
    """

    path: str
    head: HeadSettings
    reads: Reads
    form: InputForm

    @classmethod
    def of(cls, path: str, head: HeadSettings, data: DataSettings) -> Checkpoint:
        """Look at a checkpoint without loading its weights.

        Raises:
            UserError: it cannot be loaded, or what is asked of its head does not fit.
        """
        config, tokenizer = _config(path), load_tokenizer(path)
        reads: Reads = head.reads if _is_ours(config) else "decoder"
        if reads == "decoder" and (head.pooling, head.reads) != ("last", "encoder"):
            raise UserError(f"{path} is decoder-only and reads its last token: leave head.reads and head.pooling out.")
        stack = config.encoder if _is_ours(config) else config.get_text_config()
        pad = stack.pad_token_id if stack.pad_token_id is not None else tokenizer.pad_token_id
        if pad is None:
            raise UserError(f"{path} has no padding token: set pad_token_id in its config or tokenizer.")
        longest = stack.max_position_embeddings
        if data.max_length is not None and not 1 <= data.max_length <= longest:
            raise UserError(f"data.max_length is {data.max_length}, and {path} was made for 1 to {longest} tokens.")
        bos = source_begin(tokenizer, config) if _is_ours(config) else None
        form = InputForm(tokenizer, bos, reads == "decoder", data.max_length or longest, pad)
        return cls(path, head, reads, form)

    def load(self, task: Task, dropout: float, seed: int) -> PreTrainedModel:
        """The model with a new head, whose weights are a function of the seed.

        Args:
            dropout: of the head, and of an encoder-decoder's stacks. Gemma's own classes have none in their layers.

        Raises:
            UserError: the weights cannot be loaded.
        """
        config = _config(self.path)
        kwargs: dict[str, Any] = {"dtype": getattr(torch, self.head.dtype)}
        if self.head.attention is not None:
            kwargs["attn_implementation"] = self.head.attention
        classes = 1 if task.choices else len(task.labels)
        torch.manual_seed(seed)
        if self.reads == "decoder":
            text = config.get_text_config()
            # Gemma's classes find the last token by the padding token's id.
            config.num_labels, text.use_cache, text.pad_token_id = classes, False, self.form.pad
            model = _with_new_head(AutoModelForSequenceClassification, self.path, config, kwargs)
            model.score.register_forward_pre_hook(_Dropout(dropout))
            return model
        config.num_labels, config.is_encoder_decoder = classes, self.reads == "encoder_decoder"
        if self.head.pooling != "last":
            if isinstance(config, T5GemmaConfig):
                config = AdaptedSeq2SeqConfig.from_t5gemma(config, num_labels=classes)
            config.classifier_pooling = self.head.pooling
        config.classifier_dropout_rate = dropout
        for each in (config, config.encoder, config.decoder):
            each.dropout_rate = dropout
        auto = AutoModelForMultipleChoice if task.choices else AutoModelForSequenceClassification
        model = _with_new_head(auto, self.path, config, kwargs)
        if self.reads == "encoder_decoder":
            freeze(model, ())
        return model


class _Dropout:
    """Dropout before a linear head that has none."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.dropout(inputs[0], self.rate, module.training), *inputs[1:])


def _with_new_head(auto: Any, path: str, config: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A checkpoint's model with a head that the checkpoint need not have, and nothing else that it has not."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a report for every trial that the head is new
    try:
        model, report = load_model(auto, locate(path), config=config, **kwargs)
    finally:
        logging.set_verbosity(before)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("score.")):
        raise UserError(f"{path} has no {', '.join(missing[:5])}: it is not whole. Give a complete checkpoint.")
    return model


def _is_ours(config: Any) -> bool:
    return isinstance(config, (T5GemmaConfig, AdaptedSeq2SeqConfig))


def _config(path: str) -> Any:
    config = load_config(path)
    if config.is_encoder_decoder and not _is_ours(config):
        raise UserError(
            f"{path} is a {config.model_type}. Give an encoder-decoder of this package, or a decoder-only Gemma."
        )
    return config
