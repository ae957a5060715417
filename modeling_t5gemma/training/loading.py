"""The models of a run, and how examples become their inputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ..collators import Layout
from ..configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from ..conversion.reference import load_source
from ..conversion.source import resolve_source
from ..errors import UserError
from ..io import checkpoints
from ..io.checkpoints import is_gguf, locate
from ..text.rules import source_begin
from .settings import DistillationSettings, ModelSettings
from .teacher import Distillation, Teacher
from .tokenizing import load_tokenizer, vocabulary_of


def load_student(settings: ModelSettings) -> PreTrainedModel:
    """The encoder-decoder that is trained.

    Raises:
        UserError: it cannot be loaded, or is no encoder-decoder.
    """
    config = load_config(settings.path)
    if not config.is_encoder_decoder:
        raise UserError(
            f"{settings.path} is a {config.model_type}, no encoder-decoder. Convert it first: t5gemma convert --enc "
            f"{settings.path} --dec {settings.path} --output FOLDER."
        )
    return load_model(settings)


def load_model(settings: ModelSettings, **kwargs: Any) -> PreTrainedModel:
    """The language model that is trained, an encoder-decoder or a decoder-only one.

    Args:
        kwargs: go to ``from_pretrained``.

    Raises:
        UserError: as ``load_whole``.
    """
    if settings.attention is not None:
        kwargs["attn_implementation"] = settings.attention
    return load_whole(settings.path, dtype=getattr(torch, settings.dtype), **kwargs)


def load_whole(path: str, **kwargs: Any) -> PreTrainedModel:
    """A language model with all of its tensors: where one is missing, transformers would draw it at random.

    Args:
        kwargs: go to ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, is an encoder-decoder of another kind, or lacks tensors.
    """
    place = locate(path)
    if is_gguf(place):
        return load_source(resolve_source(str(place)), **kwargs)
    config = checkpoints.load_config(place)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if config.is_encoder_decoder and not isinstance(config, T5GemmaConfig | AdaptedSeq2SeqConfig):
        raise UserError(f"{path} is a {config.model_type}. Of encoder-decoders, only T5Gemma's kind can be used.")
    model, found = checkpoints.load_model(auto, place, **kwargs)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} tensors such as {missing[0]}, which would be noise. It may be a classifier "
            "or an encoder: give a language model."
        )
    model.config.name_or_path = path  # a Hub repository's is not the place in the cache
    return model


def load_config(path: str) -> Any:
    """A checkpoint's config.

    Raises:
        UserError: it cannot be loaded, as where it is an adapter.
    """
    place = locate(path, weights=False)
    return resolve_source(str(place)).config if is_gguf(place) else checkpoints.load_config(place)


def load_teacher(model: ModelSettings, how: DistillationSettings, layout: Layout) -> Teacher | None:
    """The teacher that the settings name.

    Raises:
        UserError: it cannot be loaded, or has another tokenizer than the student.
    """
    path = model.teacher
    if path is None:
        return None
    teacher = load_original(path, model.teacher_dtype)
    student, own = load_tokenizer(model.path), load_tokenizer(path)
    if vocabulary_of(student, "").fingerprint != vocabulary_of(own, "").fingerprint:
        raise UserError(
            f"The teacher {path} has another tokenizer than {model.path}: its words are other words. Take "
            "the decoder-only model that the student was converted from."
        )
    return Teacher(teacher, layout, Distillation(how.divergence, how.temperature, how.share))


def load_original(path: str, dtype: str) -> PreTrainedModel:
    """A decoder-only model to learn from.

    Raises:
        UserError: it cannot be loaded, or is an encoder-decoder.
    """
    config = load_config(path)
    if config.is_encoder_decoder:
        raise UserError(
            f"The teacher {path} is an encoder-decoder ({config.model_type}), and a teacher is decoder-only. Take the "
            "model that the student was converted from."
        )
    return load_whole(path, dtype=getattr(torch, dtype))


def layout_of(model: PreTrainedModel, tokenizer: Any) -> Layout:
    """How examples become the inputs of a model.

    Raises:
        UserError: there is no ``<bos>`` or no padding token.
    """
    decoder = getattr(model.config, "decoder", None)
    config = model.config if decoder is None else decoder
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    if bos is None or config.pad_token_id is None:
        raise UserError("The model's config has no bos_token_id or no pad_token_id: set both.")
    if decoder is None:
        return Layout(config.pad_token_id, bos, bos, bos)
    begin = source_begin(tokenizer, model.config)
    return Layout(config.pad_token_id, model.decoder_start_token_id(), begin, bos)
