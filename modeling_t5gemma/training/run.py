"""A training run from its settings: models, text, objective, trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..collators import Layout
from ..errors import UserError
from ..io.tensors import check_finite_model
from ..objectives import Objective, check_window, load_sentinels, save_sentinels, schedule_from, sentinels_of
from ..text.rules import with_rule
from .checks import check_settings
from .loading import layout_of, load_student, load_teacher
from .papers import copy_papers
from .resumable import ResumableTrainer
from .rows import Rows
from .run_folder import claim, describe
from .settings import AdaptSettings, DataSettings
from .teacher import Distillation
from .text import samples_of
from .tokenizing import load_tokenizer
from .trainer import AdaptationTrainer, Recipe

ALONE_WHERE_DRAWN = 1000  # "Encoder-Decoder Gemma" (arXiv 2504.06225), section 3


def make_trainer(settings: AdaptSettings) -> AdaptationTrainer:
    """Load, tokenise and check everything; nothing has been trained yet.

    Raises:
        UserError: something in the settings cannot be used. The output folder of a run with other settings is refused.
    """
    check_settings(settings)
    output, training = Path(settings.training.output_dir), settings.training
    tokenizer = load_tokenizer(settings.model.path)
    sentinels = _sentinels(settings, tokenizer)
    schedule = schedule_from(
        settings.objective,
        sentinels,
        eos=tokenizer.eos_token_id,
        mode_tokens=settings.recipe.mode_tokens,
        mask=tokenizer.mask_token_id,
    )
    objectives = [objective for _, objective in schedule.stages]
    for objective in objectives:
        check_window(objective, settings.data.window)
    if settings.model.teacher and settings.model.teacher_cache:
        raise UserError("Give model.teacher or model.teacher_cache, not both.")
    how = settings.distillation
    followed = Distillation(how.divergence, how.temperature, how.share)
    if settings.model.teacher_cache and (followed.divergence, followed.temperature) != ("forward_kl", 1.0):
        raise UserError(
            "Samples of a teacher's distribution give its forward KL at temperature 1 alone: leave out "
            "distillation.divergence and temperature, or give model.teacher in place of model.teacher_cache."
        )
    if (settings.model.teacher or settings.model.teacher_cache) and not all(
        objective.teachable for objective in objectives
    ):
        raise UserError(
            "A decoder-only teacher reads text from left to right and cannot teach corrupted text: leave out "
            f"model.teacher, or train on prefix_lm alone. The objective is {settings.objective!r}."
        )
    model = load_student(settings.model)
    tokenizer = with_rule(tokenizer, model.config, settings.recipe.encoder_bos)
    layout = layout_of(model, tokenizer)
    _check_lengths(settings.data, objectives, layout, model)
    claim(output, describe(settings), training.should_save)
    samples, held_out, rows_of_run = samples_of(settings.data, settings.model, training, schedule, tokenizer)
    capacity = settings.data.pack
    world, rank = training.world_size, training.process_index
    if training.should_save:
        save_sentinels(output, sentinels)

    def rows(position: int) -> Rows:
        return Rows(
            samples,
            capacity,
            training.per_device_train_batch_size,
            world,
            rank,
            position,
            num_workers=settings.data.workers,
            before_source=layout.extra_source_tokens(),
        )

    return AdaptationTrainer(
        model,
        training,
        rows=rows,
        layout=layout,
        capacity=capacity,
        recipe=_recipe(settings),
        teacher=load_teacher(settings.model, settings.distillation, layout),
        cached=followed.share if settings.model.teacher_cache else None,
        held_out=held_out,
        describe={"settings": describe(settings), "rows": rows_of_run},
        processing_class=tokenizer,
    )


def save_adapted(trainer: ResumableTrainer, converted: str) -> None:
    """Save the trained model in the output folder, with the papers of the checkpoint that it began as.

    Raises:
        UserError: its weights are not finite.
    """
    if not trainer.is_fsdp_enabled:  # where no rank has all of them
        check_finite_model(trainer.model, "the trained model")
    trainer.save_model()
    if trainer.args.should_save:
        copy_papers(converted, Path(trainer.args.output_dir))


def _check_lengths(
    data: DataSettings, objectives: Sequence[Objective], layout: Layout, model: PreTrainedModel
) -> None:
    """Refuse windows that don't fit a packed row or the positions of the model."""
    for objective in objectives:
        source, target = objective.lengths(data.window)
        source += layout.extra_source_tokens()
        if data.pack is not None and (source > data.pack[0] or target > data.pack[1]):
            raise UserError(
                f"A window of {data.window} tokens gives {objective.name} up to {source} source and {target} target "
                f"tokens, and a packed row has {data.pack[0]} and {data.pack[1]}: raise data.pack or lower "
                "data.window."
            )
        longest = model.config.encoder.max_position_embeddings
        if max(source, target) > longest:
            raise UserError(
                f"A window of {data.window} tokens gives {objective.name} up to {source} source and {target} target "
                f"tokens, and the model was made for {longest}: lower data.window."
            )


def _sentinels(settings: AdaptSettings, tokenizer: Any) -> tuple[int, ...]:
    if settings.recipe.sentinels is not None:
        return tuple(settings.recipe.sentinels)
    stored = load_sentinels(Path(settings.model.path)) if Path(settings.model.path).is_dir() else None
    if stored:
        return stored
    try:
        return sentinels_of(tokenizer.get_vocab())
    except UserError:
        return ()  # only an objective that needs them refuses


def _recipe(settings: AdaptSettings) -> Recipe:
    recipe = settings.recipe
    alone = recipe.alone
    if alone is None:
        record = Path(settings.model.path) / "conversion.json"
        drawn = record.is_file() and json.loads(record.read_text(encoding="utf-8"))["cross_attention"] in (
            "random",
            "partial",
        )
        alone = min(ALONE_WHERE_DRAWN, settings.training.max_steps // 2) if drawn else 0
    return Recipe(tuple(recipe.frozen), recipe.learning_rates, alone, recipe.joining)
