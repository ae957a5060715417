"""A run of supervised fine-tuning from its settings: records, model, adapter, trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from ..collators import Layout
from ..errors import UserError
from ..io.text_files import read_text
from ..text.rules import with_rule
from ..training.checks import check_settings
from ..training.examples import ShuffledExamples, rows_of_an_epoch, steps_of
from ..training.loading import layout_of, load_model, load_teacher
from ..training.rows import Rows
from ..training.run_folder import claim, describe
from ..training.tokenizing import load_tokenizer
from ..training.trainer import Recipe
from .adapters import add_adapter
from .encoding import Encoded, Examples, encode_records
from .generated_metrics import Answering
from .records import load_records
from .rendering import Renderer
from .settings import AnswerDataSettings, RecordsSettings, SftSettings
from .sft import DecoderOnlySftTrainer, SftTrainer


def make_trainer(settings: SftSettings) -> SftTrainer | DecoderOnlySftTrainer:
    """Load, tokenise and check everything; nothing has been trained yet. ``training.max_steps`` is set from the number
    of epochs, unless it is given.

    Raises:
        UserError: something in the settings cannot be used. The output folder of a run with other settings is refused.
    """
    check_settings(settings)
    data, training = settings.data, settings.training
    if settings.model.teacher_cache:
        raise UserError("A teacher's cache is of windows of text, not of answers: give model.teacher.")
    told = describe(settings, free=("data.workers", "data.processes", "evaluation"))
    tokenizer = load_tokenizer(settings.model.path)
    if data.chat_template is not None:
        tokenizer.chat_template = read_template(data.chat_template)
    renderer = Renderer(tokenizer, max_source=data.max_source, max_target=data.max_target)
    claim(Path(training.output_dir), told, training.should_save)
    train, held_out = load_examples(data, renderer, training)
    model = _load(settings)
    if model.config.is_encoder_decoder:
        tokenizer = with_rule(tokenizer, model.config, settings.tuning.encoder_bos)
    layout = layout_of(model, tokenizer)
    check_lengths(data, layout, model)
    _end_turns(model, renderer.ends())
    if settings.lora is not None:
        set_seed(training.seed)  # it begins at random
        model = add_adapter(model, settings.lora)
    before = layout.extra_source_tokens()
    training.max_steps = steps_of(
        training, rows_of_an_epoch(train.lengths + np.array([before, 0]), data.pack, data.block)
    )
    common: dict[str, Any] = {
        "rows": _rows(ShuffledExamples(train, data.seed, data.block), data, training, before),
        "layout": layout,
        "held_out": held_out,
        "describe": {"settings": told, "examples": len(train)},
        "processing_class": tokenizer,
        "answering": _answering(settings, renderer, layout),
    }
    if model.config.is_encoder_decoder:
        return SftTrainer(
            model,
            training,
            capacity=data.pack,
            recipe=Recipe(tuple(settings.tuning.frozen), settings.tuning.learning_rates),
            teacher=load_teacher(settings.model, settings.distillation, layout),
            **common,
        )
    if settings.model.teacher or settings.tuning.learning_rates or settings.tuning.encoder_bos is not None:
        raise UserError(
            f"{settings.model.path} is decoder-only: it has no teacher here, no learning rates by part and no "
            "encoder. Leave out model.teacher, tuning.learning_rates and tuning.encoder_bos."
        )
    return DecoderOnlySftTrainer(
        model, training, packed=data.pack is not None, frozen=tuple(settings.tuning.frozen), **common
    )


def read_template(file: str) -> str:
    """A chat template.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_text(Path(file).expanduser(), "Give a file with a template.")
    except UserError as error:
        raise UserError(f"data.chat_template {file} cannot be read: {error}") from error


def load_examples(
    data: AnswerDataSettings, renderer: Renderer, training: TrainingArguments
) -> tuple[Examples, Examples]:
    """The examples to train on and those to measure on. What was skipped and cut is told.

    Raises:
        UserError: the records cannot be used.
    """
    if data.eval is not None and data.held_out:
        raise UserError("Give data.eval or data.held_out, not both.")
    with training.main_process_first(local=False, desc="tokenising"):
        train = _encoded(data.train, data, renderer, training)
        if data.eval is None:
            return train.split(data.held_out)
        return train.examples(), _encoded(data.eval, data, renderer, training).examples()


def check_lengths(data: AnswerDataSettings, layout: Layout, model: PreTrainedModel) -> None:
    """Refuse lengths that a packed row or the model's positions don't hold.

    Raises:
        UserError: one is too large.
    """
    source, target = data.max_source + layout.extra_source_tokens(), data.max_target
    if data.pack is not None and (source > data.pack[0] or target > data.pack[1]):
        raise UserError(
            f"Questions have up to {source} tokens (data.max_source) and answers {target} (data.max_target), and a "
            f"packed row has {data.pack[0]} and {data.pack[1]}: raise data.pack or lower them."
        )
    if model.config.is_encoder_decoder:
        most, longest = max(source, target), model.config.encoder.max_position_embeddings
    else:
        most, longest = source + target, model.config.get_text_config(decoder=True).max_position_embeddings
    if most > longest:
        raise UserError(
            f"Questions have up to {source} tokens (data.max_source) and answers {target} (data.max_target), and the "
            f"model was made for {longest}: lower them."
        )


def _encoded(source: RecordsSettings, data: AnswerDataSettings, renderer: Renderer, training: Any) -> Encoded:
    name = Path(source.path).name
    encoded = encode_records(
        load_records(source.path, name=source.name, split=source.split, revision=source.revision),
        renderer,
        name,
        columns=data.columns,
        turns=data.turns,
        longer=data.longer,
        processes=data.processes,
        max_bad=data.max_bad,
    )
    if training.should_log:
        tqdm.write(f"{name} ({source.split}): {encoded.report}")
    return encoded


def _end_turns(model: PreTrainedModel, ends: list[int]) -> None:
    """Have ``generate`` stop at the end of a turn, as the model is about to learn; saved with it."""
    known = model.generation_config.eos_token_id
    before = known if isinstance(known, list) else [] if known is None else [known]
    model.generation_config.eos_token_id = list(dict.fromkeys([*before, *ends]))


def _load(settings: SftSettings) -> PreTrainedModel:
    if settings.lora is None or not settings.lora.four_bit:
        return load_model(settings.model)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("lora.four_bit needs bitsandbytes: pip install modeling_t5gemma[qlora], or leave it out.")
    compute = torch.bfloat16 if settings.training.bf16 else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],  # the losses take it as one matrix, and it is the embedding
    )
    return load_model(settings.model, quantization_config=quantization)


def _rows(
    samples: ShuffledExamples, data: AnswerDataSettings, training: TrainingArguments, before_source: int
) -> Callable[[int], Rows]:
    world, rank = training.world_size, training.process_index

    def rows(position: int) -> Rows:
        return Rows(
            samples,
            data.pack,
            training.per_device_train_batch_size,
            world,
            rank,
            position,
            num_workers=data.workers,
            before_source=before_source,
        )

    return rows


def _answering(settings: SftSettings, renderer: Renderer, layout: Layout) -> Answering | None:
    how = settings.evaluation
    if how.generate < 0 or how.samples < 0 or how.num_beams < 1 or (how.max_new_tokens or 1) < 1:
        raise UserError(
            f"evaluation.generate ({how.generate}) and samples ({how.samples}) are not negative, num_beams "
            f"({how.num_beams}) and max_new_tokens ({how.max_new_tokens}) begin at 1."
        )
    if not how.generate:
        return None
    return Answering(
        renderer.tokenizer,
        layout,
        renderer.ends(),
        how.generate,
        how.samples,
        how.max_new_tokens or settings.data.max_target,
        how.num_beams,
        settings.training.per_device_eval_batch_size,
    )
