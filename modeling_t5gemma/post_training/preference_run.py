"""Runs on preferences and on rewards from their settings: records, model, adapter, reference, trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from ..collators import Layout
from ..errors import UserError
from ..text.rules import with_rule
from ..training.checks import check_settings
from ..training.examples import steps_of
from ..training.loading import layout_of, load_student
from ..training.run_folder import claim, describe
from ..training.sources import import_datasets
from ..training.tokenizing import load_tokenizer, vocabulary_of
from .adapters import add_adapter
from .dpo import DpoTrainer
from .grpo import GrpoTrainer
from .preferences import Loaded, held_out, load_pairs, load_prompts
from .records import load_records, require_columns
from .rendering import Renderer
from .rewards import load_rewards
from .settings import DpoRun, DpoSettings, GrpoRun, GrpoSettings, PromptDataSettings, RecordsSettings
from .sft_run import read_template

Made = TypeVar("Made")
Load = Callable[[Any, Renderer, str, int], tuple[list[Made], Loaded]]


def make_dpo_trainer(settings: DpoRun) -> DpoTrainer:
    """Load, tokenise and check everything; nothing has been trained yet. ``training.max_steps`` is set from the number
    of epochs, unless it is given.

    Raises:
        UserError: something in the settings cannot be used. The output folder of a run with other settings is refused.
    """
    check_settings(settings)
    settings.dpo.check()
    told = describe(settings, free=())
    begun = _begin(settings, settings.data.max_target)
    claim(Path(settings.training.output_dir), told, settings.training.should_save)
    train, test = _examples(settings.data, begun.renderer, settings.training, load_pairs)
    settings.training.max_steps = steps_of(settings.training, len(train))
    return DpoTrainer(
        begun.model,
        settings.training,
        pairs=train,
        layout=begun.layout,
        settings=settings.dpo,
        held_out=test,
        reference_model=_reference(settings, settings.dpo) if settings.dpo.reference == "loaded" else None,
        frozen=settings.tuning.frozen,
        seed=settings.data.seed,
        describe={"settings": told, "pairs": len(train)},
        processing_class=begun.renderer.tokenizer,
    )


def make_grpo_trainer(settings: GrpoRun) -> GrpoTrainer:
    """As ``make_dpo_trainer``; an epoch takes ``num_iterations`` times as many steps."""
    check_settings(settings)
    settings.grpo.check()
    rewards = load_rewards(settings.grpo.rewards)
    told = describe(settings, free=())
    begun = _begin(settings, settings.grpo.max_completion_length)
    claim(Path(settings.training.output_dir), told, settings.training.should_save)
    train, test = _examples(settings.data, begun.renderer, settings.training, load_prompts)
    settings.training.max_steps = steps_of(settings.training, len(train) * settings.grpo.num_iterations)
    own = settings.grpo.beta and (settings.lora is None or settings.grpo.reference_model is not None)
    return GrpoTrainer(
        begun.model,
        settings.training,
        prompts=train,
        rewards=rewards,
        layout=begun.layout,
        tokenizer=begun.renderer.tokenizer,
        ends=begun.ends,
        settings=settings.grpo,
        held_out=test,
        reference_model=_reference(settings, settings.grpo) if own else None,
        frozen=settings.tuning.frozen,
        seed=settings.data.seed,
        describe={"settings": told, "prompts": len(train)},
    )


@dataclass(frozen=True)
class _Begun:
    """What both kinds of run begin with; ``ends`` are the tokens that end an answer."""

    model: PreTrainedModel
    layout: Layout
    renderer: Renderer
    ends: list[int]


def _begin(settings: DpoRun | GrpoRun, max_target: int) -> _Begun:
    if settings.model.teacher or settings.model.teacher_cache:
        raise UserError("There is no teacher here: leave out model.teacher and model.teacher_cache.")
    if settings.lora is not None and settings.lora.four_bit:
        raise UserError("lora.four_bit is for supervised fine-tuning: leave it out here.")
    tokenizer = load_tokenizer(settings.model.path)
    if settings.data.chat_template is not None:
        tokenizer.chat_template = read_template(settings.data.chat_template)
    model = load_student(settings.model)
    tokenizer = with_rule(tokenizer, model.config, settings.tuning.encoder_bos)
    renderer = Renderer(tokenizer, max_source=settings.data.max_source, max_target=max_target)
    layout = layout_of(model, tokenizer)
    _check_lengths(settings.data.max_source + layout.extra_source_tokens(), max_target, model)
    known = model.generation_config.eos_token_id
    before = known if isinstance(known, list) else [] if known is None else [known]
    ends = list(dict.fromkeys([*before, *renderer.ends()]))
    model.generation_config.eos_token_id = ends
    if settings.lora is not None:
        set_seed(settings.training.seed)  # it begins at random
        model = add_adapter(model, settings.lora)
    return _Begun(model, layout, renderer, ends)


def _examples(
    data: PromptDataSettings, renderer: Renderer, training: TrainingArguments, load: Load[Made]
) -> tuple[Sequence[Made], Sequence[Made]]:
    """The examples to train on, and those to measure on."""
    if data.eval is not None and data.held_out:
        raise UserError("Give data.eval or data.held_out, not both.")
    with training.main_process_first(local=False, desc="reading records"):
        train = _read(data.train, data, renderer, training, load)
        if data.eval is None:
            return held_out(train, data.held_out)
        return train, _read(data.eval, data, renderer, training, load)


def _read(
    source: RecordsSettings, data: PromptDataSettings, renderer: Renderer, training: Any, load: Load[Made]
) -> list[Made]:
    name = Path(source.path).name
    records = load_records(source.path, name=source.name, split=source.split, revision=source.revision)
    require_columns(records, list(data.columns.values()), name)
    # A column that stands where another goes would be there twice.
    records = records.remove_columns([own for own in data.columns if own in records.column_names])
    records = records.rename_columns({there: own for own, there in data.columns.items()})
    if data.chat:
        datasets = import_datasets()
        said = {name: datasets.Json() for name in _ROLES if name in records.column_names}
        records = records.map(_in_messages, features=datasets.Features({**records.features, **said}))
    made, report = load(records, renderer, name, data.max_bad)
    if training.should_log and str(report):
        tqdm.write(f"{name} ({source.split}): {len(made)} examples; {report}")
    return made


_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def _in_messages(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [{"role": role, "content": record[name]}]
        for name, role in _ROLES.items()
        if isinstance(record.get(name), str)
    }


def _reference(settings: DpoRun | GrpoRun, how: DpoSettings | GrpoSettings) -> PreTrainedModel:
    path = how.reference_model or settings.model.path
    own, other = load_tokenizer(settings.model.path), load_tokenizer(path)
    if vocabulary_of(own, "").fingerprint != vocabulary_of(other, "").fingerprint:
        raise UserError(
            f"The reference {path} has another tokenizer than {settings.model.path}: its words are other words."
        )
    return load_student(replace(settings.model, path=path))


def _check_lengths(source: int, target: int, model: PreTrainedModel) -> None:
    for tokens, stack, what in (
        (source, "encoder", "Questions (data.max_source)"),
        (target, "decoder", "Answers (data.max_target, grpo.max_completion_length)"),
    ):
        longest = getattr(model.config, stack).max_position_embeddings
        if tokens > longest:
            raise UserError(f"{what} have up to {tokens} tokens, and the model was made for {longest}: lower that.")
