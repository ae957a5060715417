"""A checkpoint ready to generate: an encoder-decoder, a decoder-only model, or an adapter on either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..errors import UserError
from ..io.checkpoints import ADAPTER, TOKENIZER_FILES, locate, read_generation_config
from ..training.loading import load_config, load_whole
from ..training.tokenizing import load_tokenizer
from .adapters import load_adapter, read_base

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode, and what came with it.

    Attributes:
        model: of transformers, also where an adapter is on it.
        tokenizer: the adapter's own, if it has one.
        places: folders or Hub repositories that it came from: the adapter's before the base's.
    """

    model: PreTrainedModel
    tokenizer: Any
    places: tuple[str, ...]

    def file(self, name: str) -> Path | None:
        """A small file beside the weights; None if there is none.

        Raises:
            UserError: it is a Hub repository's that is cached, and there is no network to ask whether it has the file.
        """
        for place in self.places:
            try:
                if (path := _file_of(place, name)) is not None:
                    return path
            except LocalEntryNotFoundError as error:
                raise UserError(
                    f"Without a network nobody can tell whether {place} has a {name}. Give the folder that it was "
                    "downloaded to, or go online."
                ) from error
        return None


def load_checkpoint(path: str, *, base: str | None = None, dtype: str = "auto", device: str = "auto") -> Checkpoint:
    """Load a model and its tokenizer.

    Args:
        path: a folder or Hub repository, of a model or of a PEFT adapter.
        base: of an adapter, where it is not at the place that the adapter names.
        dtype: one of ``DTYPES``; "auto" is the checkpoint's own.
        device: as torch names it; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        UserError: something is missing, damaged or not meant for generating, the adapter belongs to another base, or
            there is no such device or no room on it.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is none of {', '.join(DTYPES)}.")
    disable_progress_bar()
    place = _device(device)
    adapter, base, tokenizer = _parts(path, base)
    if adapter is None:
        return Checkpoint(_load_model(base, dtype, place), tokenizer, (base,))
    adapted = load_adapter(_load_model(base, dtype, place), adapter)
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        raise UserError(
            f"{path} is an adapter of learnt prompts. Only those that change weights, as LoRA, can be used."
        )
    model = adapted.get_base_model().eval()  # its own modules hold the adapter now, and generate needs no wrapper
    if generation := read_generation_config(adapter):  # with the ends of an answer that the adapter was trained to
        model.generation_config = GenerationConfig.from_dict(generation)
    return Checkpoint(model, tokenizer, (str(adapter), base))


def check_checkpoint(path: str, *, base: str | None = None) -> None:
    """Find out whether ``load_checkpoint`` would load a checkpoint, as far as it shows without the weights.

    Raises:
        UserError: as ``load_checkpoint``.
    """
    _check_config(_parts(path, base)[1])


def _parts(path: str, base: str | None) -> tuple[Path | None, str, Any]:
    """The adapter's folder, None for a model; where the model is; the tokenizer."""
    adapter = _adapter_folder(path)
    if adapter is None:
        if base is not None:
            raise UserError(f"{path} is no adapter, so it has no --base. Leave that out.")
        return None, path, load_tokenizer(path)
    base = base or str(read_base(adapter)["path"])
    own = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    return adapter, base, load_tokenizer(str(adapter) if own else base)


def _check_config(path: str) -> None:
    config = load_config(path)
    if hasattr(config, "encoder") and not config.is_encoder_decoder:
        raise UserError(f"{path} is an encoder alone, which generates nothing. Give a whole encoder-decoder.")


def _load_model(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    _check_config(path)
    model = load_whole(path, dtype=dtype)
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path} does not fit on {device}. Give --dtype bfloat16 or --device cpu.") from error


def _device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = "cpu" if accelerator is None else f"{accelerator.type}, cpu"
        raise UserError(f"--device {name} cannot be used; this machine has {there}.") from error
    return device


def _adapter_folder(path: str) -> Path | None:
    """The folder of an adapter, downloaded if need be; None for anything else."""
    folder = locate(path, weights=False)
    return locate(path) if (folder / ADAPTER).is_file() else None


def _file_of(place: str, name: str) -> Path | None:
    """A file of a folder or a Hub repository; None if it has no such file."""
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
