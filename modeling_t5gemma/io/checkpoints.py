"""The one door to a checkpoint's files, whoever wrote them: config, tokenizer, generation config, adapter, weights.

No code of a checkpoint runs, and nobody is asked whether it may: what asks for any is refused, and the checkpoints of
this package are read by the installed classes. Weights are safetensors alone. Only regular files are opened. Whatever
is wrong with them comes out as a ``UserError`` that names them. None of it reads the weights.

What a user names goes through ``locate`` first; the rest takes the folder that comes out::

    folder = locate(given)
    model, found = load_model(AutoModelForSeq2SeqLM, folder)
    tokenizer = load_tokenizer(folder)

``check_weights(folder, model)`` says whether a checkpoint has all tensors of a model that is there already, in their
shapes, as before going on from it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from ..errors import UserError
from ..layers import RotaryEmbedding
from . import hub
from .fields import check_config, check_generation, refuse_code, vocabulary_size
from .safetensors_files import read_shapes
from .text_files import check_regular, read_json, read_text

CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Beside the two configs, what transformers reads of a folder when it loads a model or a tokenizer.
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_OTHERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates/*.jinja"


def locate(given: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder or GGUF file that a user names.

    Args:
        given: the path of a folder or of a ``.gguf`` file, or a Hub repository, which is fetched. A folder without a
            config that holds one GGUF file stands for it.
        revision: branch, tag or commit of a Hub repository.
        weights: whether those of a Hub repository are fetched too.

    Raises:
        UserError: there is no such thing, or the Hub does not give it.
    """
    path = Path(os.path.expanduser(given))
    if str(given) and os.path.isdir(path):
        ggufs = [] if os.path.lexists(path / CONFIG) else sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 else path
    if str(given) and os.path.lexists(path):
        if path.suffix != ".gguf" or not os.path.isfile(path):
            raise UserError(f"{given} is neither a folder nor a .gguf file. Give the folder that holds {CONFIG}.")
        return path
    name = str(given)
    # A name whose first part is a folder here is a path that was mistyped.
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name) or os.path.isdir(path.parent):
        raise UserError(f"There is no folder {given}. Give a checkpoint's folder, or a Hub repository (OWNER/NAME).")
    return hub.download(name, revision, weights=weights)[0]


def is_gguf(place: Path) -> bool:
    """Whether what ``locate`` found is a GGUF file."""
    return place.suffix == ".gguf" and place.is_file()


def check_files(folder: Path) -> None:
    """Check all that transformers reads of a folder but for the weights.

    Raises:
        UserError: a file asks for code of its own, is damaged or no regular file, or a field is out of its range.
    """
    if os.path.lexists(folder / "custom_generate"):
        raise UserError(f"{folder / 'custom_generate'} is code of the checkpoint, which is never run. Remove it.")
    vocabulary = None
    if os.path.lexists(folder / CONFIG):
        raw = read_json(folder / CONFIG)
        check_config(raw, folder / CONFIG)
        vocabulary = vocabulary_size(raw)
    read_generation_config(folder, vocabulary)
    for name in _OBJECTS:
        if os.path.lexists(folder / name):
            content = read_json(folder / name)
            if name == "tokenizer_config.json":
                refuse_code(content, folder / name)
    for name in _OTHERS:
        if os.path.lexists(folder / name):
            check_regular(folder / name)
    templates = [folder / _TEMPLATE] if os.path.lexists(folder / _TEMPLATE) else []
    for file in (*templates, *folder.glob(_MORE_TEMPLATES)):
        read_text(file)


def load_config(folder: Path) -> Any:
    """A checkpoint's config, of this package or of transformers.

    Raises:
        UserError: there is none, as where it is an adapter, or as ``check_files``.
    """
    if not os.path.isfile(folder / CONFIG) and os.path.lexists(folder / ADAPTER):
        raise UserError(
            f"{folder} is an adapter. Merge it into its base first: t5gemma merge {folder} --output FOLDER."
        )
    check_regular(folder / CONFIG)
    check_files(folder)
    with told(f"{folder / CONFIG} cannot be loaded", "Repair or download it"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(config, T5GemmaConfig | AdaptedSeq2SeqConfig):
            check_stacks(config)
    return config


def check_stacks(config: T5GemmaConfig | AdaptedSeq2SeqConfig) -> None:
    """Look up what a model looks up when it is made or run: activation functions and rotary frequencies.

    Raises:
        Exception: there is none of that name, or it lacks a parameter; of any kind, so call it in ``told``.
    """
    stack: Any
    for stack in (config.encoder, config.decoder):
        ACT2FN[stack.hidden_activation]
        for layer_type in set(stack.layer_types):
            RotaryEmbedding(stack, layer_type).frequencies(torch.device("cpu"))


def read_generation_config(folder: Path, vocabulary: int | None = None) -> dict[str, Any]:
    """What a folder's ``generation_config.json`` says; {} without one.

    Args:
        vocabulary: how many tokens the model has.

    Raises:
        UserError: it is damaged, asks for code, or a field is out of its range.
    """
    file = folder / GENERATION
    if not os.path.lexists(file):
        return {}
    raw = read_json(file)
    check_generation(raw, file, vocabulary)
    with told(f"{file} cannot be loaded", "Repair or download it"):
        GenerationConfig.from_dict(raw)
    return raw


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none, or as ``check_files``.
    """
    if not any(os.path.lexists(folder / name) for name in TOKENIZER_FILES):
        # For some model types transformers would make one without words.
        raise UserError(f"{folder} has no tokenizer that can be loaded: put its {TOKENIZER_FILES[0]} there.")
    check_files(folder)
    with told(f"The tokenizer of {folder} cannot be loaded", f"Put the model's own {TOKENIZER_FILES[0]} there"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("text")  # some damage shows at the first word alone
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")  # a template file's byte order mark
    return tokenizer


def load_model(cls: Any, folder: Path, **kwargs: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model and what transformers says of its tensors: ``missing_keys``, which it drew at random, and others.

    Args:
        cls: an Auto class, or a model's own.
        kwargs: for its ``from_pretrained``, such as ``dtype`` or ``config``.

    Raises:
        UserError: the folder is an adapter's or has no safetensors, tensors have other shapes than the config says, or
            as ``check_files``.
    """
    if os.path.lexists(folder / ADAPTER):  # transformers would load the base that it names
        raise UserError(
            f"{folder} is an adapter. Merge it into its base first: t5gemma merge {folder} --output FOLDER."
        )
    config = load_config(folder)
    _check_room(config, folder)
    with told(f"{folder} cannot be loaded", "Give a whole checkpoint"):
        model, found = cls.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **kwargs
        )
    return model, found


def check_weights(folder: Path, model: nn.Module) -> None:
    """Make sure that a checkpoint's files hold a model's tensors, by their headers.

    Args:
        model: whose ``state_dict`` has to be there, but for tensors that are tied to one that is.

    Raises:
        UserError: a file of weights is missing, cut short or damaged, or a tensor is missing or has another shape.
    """
    stored = read_shapes(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        shape = stored.get(name)
        if shape is None and name not in tied:
            raise UserError(f"{folder} lacks {name}. Give a checkpoint that was written to its end.")
        if shape is not None and shape != tuple(tensor.shape):
            raise UserError(f"{name} is {shape} in {folder} and {tuple(tensor.shape)} in the model. Give one of it.")


@contextmanager
def told(what: str, remedy: str) -> Iterator[None]:
    """Around calls of libraries that read a checkpoint: tell in one line what they raise.

    Each has exceptions of its own for what it finds, tokenizers' even none that is an ``Exception``.

    Args:
        what: begins the line, as "FILE cannot be loaded".
        remedy: ends it.

    Raises:
        UserError: for whatever is raised inside, but for a lack of memory.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # Of a config that a class is not for, transformers lists all that it is for.
        said = " ".join(str(error).split()).partition(" Model type should be one of")[0]
        said = said if len(said) <= 300 else f"{said[:297]}..."
        raise UserError(f"{what} ({said or type(error).__name__}). {remedy}.") from error


def _check_room(config: Any, folder: Path) -> None:
    """Refuse a config of another model than that of the files, before a model of its size is made."""
    shapes = read_shapes(folder)
    largest = max(map(math.prod, shapes.values()), default=0)
    stacks = [config.get_text_config()]
    if hasattr(config, "encoder"):
        stacks = [config.encoder, config.decoder] if config.is_encoder_decoder else [config.encoder]
    for stack in stacks:
        sizes = [getattr(stack, name, None) or 0 for name in ("vocab_size", "hidden_size", "num_hidden_layers")]
        if sizes[0] * sizes[1] > largest or sizes[2] > len(shapes):
            raise UserError(
                f"{folder / CONFIG} describes {sizes[2]} layers of width {sizes[1]} and {sizes[0]} words, more than "
                "the files of weights hold. Put back the config that was saved with them."
            )
