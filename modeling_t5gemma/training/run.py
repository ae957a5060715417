"""A training run from its settings: models, text, objective, trainer."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from ..collators import Layout
from ..errors import UserError
from ..objectives import (
    Objective,
    Schedule,
    check_window,
    load_sentinels,
    save_sentinels,
    schedule_from,
    sentinels_of,
)
from .checkpoints import find
from .documents import Pieces
from .evaluation import HeldOutPair
from .held_out import Remaining
from .mixture import Samples, Source, StreamedSamples, StreamedSource
from .rows import Rows
from .settings import (
    DataSettings,
    DistillationSettings,
    ModelSettings,
    ObjectiveSettings,
    RecipeSettings,
    SourceSettings,
)
from .shards import INDEX, TokenShards
from .sources import TextSource
from .teacher import Distillation, Teacher
from .teacher_cache import Taught
from .tokenizing import TokenStream, load_tokenizer, tokenize_source, vocabulary_of
from .trainer import AdaptationTrainer, Recipe

RUN_FILE = "run.json"
# What a checkpoint says about its licence, and the code that one of our own model type carries.
PAPERS = ("NOTICE*", "LICENSE*", "*TERMS*", "*.py")
ALONE_WHERE_DRAWN = 1000  # "Encoder-Decoder Gemma" (arXiv 2504.06225), section 3
SHARD_TOKENS = 1 << 26


@dataclass
class Settings:
    """All sections of a config file. ``training`` has the keys of transformers' ``Seq2SeqTrainingArguments``."""

    model: ModelSettings
    data: DataSettings
    training: TrainingArguments
    objective: ObjectiveSettings
    distillation: DistillationSettings
    recipe: RecipeSettings


def make_trainer(settings: Settings) -> AdaptationTrainer:
    """Load, tokenise and check everything; nothing has been trained yet.

    Raises:
        UserError: something in the settings cannot be used. The output folder of a run with other settings is refused.
    """
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
    if (settings.model.teacher or settings.model.teacher_cache) and not all(
        objective.teachable for objective in objectives
    ):
        raise UserError(
            "A decoder-only teacher reads text from left to right and cannot teach corrupted text: leave out "
            f"model.teacher, or train on prefix_lm alone. The objective is {settings.objective!r}."
        )
    model = _load_student(settings.model)
    layout = _layout(model, tokenizer, settings.recipe)
    _check_lengths(settings.data, objectives, layout, model)
    samples, held_out, rows_of_run = _data(settings, schedule, tokenizer)
    capacity = settings.data.pack
    world, rank = training.world_size, training.process_index
    claim(output, settings, training.should_save)
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
        teacher=_load_teacher(settings, layout),
        cached=settings.distillation.share if settings.model.teacher_cache else None,
        held_out=held_out,
        describe={"settings": describe(settings), "rows": rows_of_run},
        processing_class=tokenizer,
    )


def save_adapted(trainer: AdaptationTrainer, converted: str) -> None:
    """Save the trained model in the output folder, with the papers of the checkpoint that it began as."""
    trainer.save_model()
    output, source = Path(trainer.args.output_dir), Path(converted)
    if trainer.args.should_save and source.is_dir():
        for pattern in PAPERS:
            for path in source.glob(pattern):
                shutil.copyfile(path, output / path.name)


def claim(output: Path, settings: Settings, writes: bool) -> None:
    """Mark a folder as this run's.

    Raises:
        UserError: it holds checkpoints of a run with other settings.
    """
    wanted, path = describe(settings), output / RUN_FILE
    if path.exists() and find(output).last is not None:
        held = json.loads(path.read_text(encoding="utf-8"))
        if changed := _changed(held, wanted):
            raise UserError(
                f"{output} holds a run with another {', '.join(changed)}. Give training.output_dir another folder, or "
                "remove this one to begin anew."
            )
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


# What may differ between two parts of one run: where it runs and what it reports, not what it computes.
_FREE = ("logging", "report", "save", "eval", "disable_tqdm", "run_name", "dataloader", "push", "hub", "local_rank",
         "output_dir", "ddp", "fsdp", "deepspeed", "accelerator", "torch_compile", "project", "trackio",
         "per_device", "gradient_accumulation", "do_", "use_cpu")  # fmt: skip


def describe(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON."""
    training = {
        name: value
        for name, value in settings.training.to_dict().items()
        if not name.startswith(_FREE) and not name.endswith("_token")
    }
    sections = {name: asdict(getattr(settings, name)) for name in ("model", "data", "distillation", "recipe")}
    sections["data"].pop("workers")
    made: dict[str, Any] = json.loads(
        json.dumps({**sections, "objective": settings.objective, "training": training}, default=str)
    )
    return made


def _changed(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    changed = []
    for section, values in wanted.items():
        before = held.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            changed += [f"{section}.{key}" for key in values if values[key] != before.get(key, values[key])]
        elif values != before:
            changed.append(section)
    return changed


def _load_student(settings: ModelSettings) -> PreTrainedModel:
    kwargs = {} if settings.attention is None else {"attn_implementation": settings.attention}
    config = _loaded(AutoConfig, settings.path)
    if not config.is_encoder_decoder:
        raise UserError(
            f"{settings.path} is a {config.model_type}, no encoder-decoder. Convert it first: t5gemma convert --enc "
            f"{settings.path} --dec {settings.path} --output FOLDER."
        )
    return _loaded(AutoModelForSeq2SeqLM, settings.path, dtype=getattr(torch, settings.dtype), **kwargs)


def _load_teacher(settings: Settings, layout: Layout) -> Teacher | None:
    path = settings.model.teacher
    if path is None:
        return None
    model = _loaded(AutoModelForCausalLM, path, dtype=getattr(torch, settings.model.teacher_dtype))
    student, own = load_tokenizer(settings.model.path), load_tokenizer(path)
    if vocabulary_of(student, "").fingerprint != vocabulary_of(own, "").fingerprint:
        raise UserError(
            f"The teacher {path} has another tokenizer than {settings.model.path}: its words are other words. Take "
            "the decoder-only model that the student was converted from."
        )
    how = settings.distillation
    return Teacher(model, layout, Distillation(how.divergence, how.temperature, how.share))


def _loaded(auto: Any, path: str, **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error


def _layout(model: PreTrainedModel, tokenizer: Any, recipe: RecipeSettings) -> Layout:
    decoder = model.config.decoder
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else decoder.bos_token_id
    encoder_bos = recipe.encoder_bos
    if encoder_bos is None:
        encoder_bos = decoder.cross_attention_type == "layerwise"
    if bos is None or decoder.pad_token_id is None:
        raise UserError("The model's config has no bos_token_id or no pad_token_id: set both.")
    return Layout(decoder.pad_token_id, model.decoder_start_token_id(), bos if encoder_bos else None, bos)


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


def _sentinels(settings: Settings, tokenizer: Any) -> tuple[int, ...]:
    if settings.recipe.sentinels is not None:
        return tuple(settings.recipe.sentinels)
    stored = load_sentinels(Path(settings.model.path)) if Path(settings.model.path).is_dir() else None
    if stored:
        return stored
    try:
        return sentinels_of(tokenizer.get_vocab())
    except UserError:
        return ()  # only an objective that needs them refuses


def _recipe(settings: Settings) -> Recipe:
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


# Text


def _data(
    settings: Settings, schedule: Schedule, tokenizer: Any
) -> tuple[Samples | StreamedSamples, list[HeldOutPair], int]:
    """Samples, held-out pairs, and the rows of the whole run."""
    data, training = settings.data, settings.training
    shortest = max(objective.shortest() for _, objective in schedule.stages)
    rows = (
        training.max_steps
        * training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
    )
    if any(source.streaming for source in data.sources):
        return _streamed(settings, schedule, shortest, rows)
    sources: list[Source] = []
    held_out: list[HeldOutPair] = []
    for number, source in enumerate(data.sources):
        pieces: Any = Pieces(_documents(settings, source, tokenizer), data.window, shortest)
        if settings.model.teacher_cache:
            if len(data.sources) > 1:
                raise UserError("A teacher's cache is of one source: give data.sources that one alone.")
            pieces = Taught(Path(settings.model.teacher_cache), pieces, vocabulary_of(tokenizer, settings.model.path))
        if number == 0 and data.held_out:
            pieces = Remaining(pieces, data.held_out)
            held_out = pieces.pairs(schedule.stages[-1][1], data.seed)
        sources.append(Source(Path(source.path).name, pieces, source.weight))
    weights = [source.weight for source in sources]
    mean = sum(w * s.pieces.mean_tokens for w, s in zip(weights, sources)) / sum(weights)
    total = rows if data.pack is None else math.ceil(rows * sum(data.pack) / mean)
    return Samples(sources, schedule, data.seed, data.block, total), held_out, rows


def _streamed(
    settings: Settings, schedule: Schedule, shortest: int, rows: int
) -> tuple[StreamedSamples, list[HeldOutPair], int]:
    data = settings.data
    if data.held_out:
        raise UserError(
            "Windows of a stream cannot be held out: its length is not known. Set data.held_out to 0 and "
            "training.eval_strategy to no, or tokenise it first (t5gemma tokenize)."
        )
    sources = [
        StreamedSource(
            Path(source.path).name,
            TokenStream(_text_source(source), settings.model.path, data.max_bad),
            source.weight,
            data.window,
            shortest,
        )
        for source in data.sources
    ]
    total = rows if data.pack is None else math.ceil(rows * sum(data.pack) / data.window)
    return StreamedSamples(sources, schedule, data.seed, data.block, total), [], rows


def _documents(settings: Settings, source: SourceSettings, tokenizer: Any) -> TokenShards:
    vocabulary = vocabulary_of(tokenizer, settings.model.path)
    if (Path(source.path) / INDEX).is_file():
        return TokenShards(source.path, vocabulary)
    cache = Path(settings.data.cache or Path(settings.training.output_dir) / "tokens")
    what = json.dumps([asdict(source), vocabulary.fingerprint], sort_keys=True).encode()
    folder = cache / f"{Path(source.path).stem}-{hashlib.sha256(what).hexdigest()[:12]}"
    with settings.training.main_process_first(local=False, desc="tokenising"):
        if not (folder / INDEX).is_file():
            with tqdm(unit="token", unit_scale=True, desc=f"Tokenising {source.path}", leave=False) as bar:
                result = tokenize_source(
                    _text_source(source),
                    settings.model.path,
                    folder,
                    processes=max(1, settings.data.workers),
                    shard_tokens=SHARD_TOKENS,
                    max_bad=settings.data.max_bad,
                    progress=_advance(bar),
                )
            if result.skipped:
                tqdm.write(f"{source.path}: skipped {result.skipped}; the first: {'; '.join(result.first_skipped)}")
    return TokenShards(folder, vocabulary)


def _advance(bar: Any) -> Callable[[int, int], None]:
    return lambda _, tokens: bar.update(tokens)


def _text_source(source: SourceSettings) -> TextSource:
    return TextSource(
        source.path,
        name=source.name,
        split=source.split,
        column=source.column,
        streaming=source.streaming,
        revision=source.revision,
        weight=source.weight,
    )
