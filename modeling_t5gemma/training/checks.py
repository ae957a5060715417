"""Settings that would end in a traceback, a hang or another run than was meant, refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from ..errors import UserError

_LARGEST_SEED = 2**32 - 1  # numpy's
# The least value of a setting, by its key, and the most or None.
_RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("block", "window", "max_source", "max_target", "processes", "pack", "rank"), (1, None)),
    **dict.fromkeys(("held_out", "workers", "max_bad", "seed", "weight"), (0, None)),
    "dropout": (0, 1),
}
_RANGES_OF_TRAINING: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"), (1, None)
    ),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps", "torch_empty_cache_steps"), (1, None)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), (0, None)),
    **dict.fromkeys(("num_train_epochs", "warmup_steps", "eval_delay", "dataloader_num_workers"), (0, None)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, _LARGEST_SEED)),
}
_BELOW = {"dropout", "adam_beta1", "adam_beta2"}  # what may not reach its most
# What the trainers here don't ask for, or would go on wrongly with.
_WITHOUT_MEANING = (
    "use_liger_kernel", "label_smoothing_factor", "neftune_noise_alpha", "load_best_model_at_end",
    "auto_find_batch_size", "predict_with_generate", "generation_max_length", "generation_num_beams",
    "generation_config", "sortish_sampler", "data_seed",
)  # fmt: skip


def check_settings(settings: Any) -> None:
    """Look at every number of a run's settings, and at its training arguments.

    Args:
        settings: a dataclass of sections.

    Raises:
        UserError: names the setting, what it is and what it can be.
    """
    for section in fields(settings):
        value = getattr(settings, section.name)
        if isinstance(value, TrainingArguments):
            check_arguments(value)
        else:
            _check_numbers(_numbers(value, section.name), _RANGES)


def check_arguments(args: TrainingArguments) -> None:
    """The same of transformers' training arguments.

    Raises:
        UserError: as ``check_settings``.
    """
    _check_numbers(_numbers(vars(args), "training"), _RANGES_OF_TRAINING)
    if args.resume_from_checkpoint is not None:
        raise UserError(
            f"training.resume_from_checkpoint is {args.resume_from_checkpoint}: give --resume instead, which goes on "
            "from the last checkpoint if left out."
        )
    if args.save_only_model:
        raise UserError("training.save_only_model leaves checkpoints that no run can go on from: leave it out.")
    defaults = {field.name: field.default for field in fields(args)}
    if given := [name for name in _WITHOUT_MEANING if getattr(args, name, None) != defaults.get(name)]:
        raise UserError(f"training.{', training.'.join(given)} have no meaning here: leave them out.")
    known = get_available_reporting_integrations()
    if unknown := [name for name in args.report_to if name not in known]:
        raise UserError(
            f"training.report_to is {', '.join(unknown)}, which is not installed or not known here. Take none"
            f"{''.join(f' or {name}' for name in known)}."
        )
    _check_schedule(args)


def check_yaml(path: Path) -> None:
    """Refuse a file of settings whose references to its own parts unfold to more than settings are.

    Raises:
        UserError: it does, or is no YAML.
    """
    import yaml  # type: ignore[import-untyped]

    sizes: dict[int, int] = {}

    def size(node: Any, above: frozenset[int] = frozenset()) -> int:
        if id(node) in above:
            raise UserError(f"{path} refers to itself. Write out what is meant.")
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [part for own in parts for part in (own if isinstance(own, tuple) else (own,))]
            sizes[id(node)] = 1 + sum(size(part, above | {id(node)}) for part in inner)
        return sizes[id(node)]

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None and (found := size(root)) > 10_000:
            raise UserError(f"{path} unfolds to {found:,} values by its references. Settings are a few hundred.")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as settings: {told}") from error


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in a section, with its dotted name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each, name)


def _check_numbers(numbers: Iterator[tuple[str, float]], ranges: dict[str, tuple[float, float | None]]) -> None:
    for name, value in numbers:
        key = name.rpartition(".")[2]
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: give a finite number.")
        least, most = ranges.get(key, (None, None))
        if least is not None and value < least:
            raise UserError(f"{name} is {value}: it is at least {least}.")
        if most is not None and (value > most or (value == most and key in _BELOW)):
            raise UserError(f"{name} is {value}: it is {'below' if key in _BELOW else 'at most'} {most}.")


def _check_schedule(args: TrainingArguments) -> None:
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        return
    steps = max(1, args.max_steps)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"training.lr_scheduler_type {args.lr_scheduler_type.value} cannot be made with lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {' '.join(str(error).split())}"
        ) from error
