"""From what the user names (an alias, a Hub repository, a folder, a GGUF file) to a checkpoint that can be planned."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_t5gemma.conversion.families import FAMILIES
from modeling_t5gemma.conversion.family import EMBEDDING, OUTPUT_HEAD, Family
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import hub
from modeling_t5gemma.io.checkpoints import is_gguf, load_config, locate, read_generation_config, told
from modeling_t5gemma.io.fields import check_config
from modeling_t5gemma.io.safetensors_files import read_headers, weight_dtype
from modeling_t5gemma.io.tensors import RemoteTensor, StoredTensor, row_ranges
from modeling_t5gemma.io.text_files import read_json

# Names of fields that change what a model computes, whether or not transformers' class has them.
_COMPUTES = re.compile(r"factor|multiplier|scal|softcap|bias|rotary|norm|expert|head|resid|window|att|act|alibi")
# What transformers' classes read of it under another name.
_OTHER_SPELLINGS = {
    "rope_scaling",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "hidden_activation",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "output_attentions",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A decoder-only checkpoint on this machine.

    Attributes:
        name: what to call it: the Hub repository where it has one, or the last part of its path.
        path: the folder, or the GGUF file.
        commit: of a Hub repository, the commit that was read.
        family: how to read it.
        config: its text stack's config.
        tensors: by the names in its files.
        stack_names: stack name to name in its files, for every tensor of the text stack.
        left_out: the other names, and why each may be left out.
        generation: the contents of its ``generation_config.json``, {} without one.
    """

    name: str
    path: Path
    commit: str | None
    family: Family
    config: PreTrainedConfig
    tensors: Mapping[str, StoredTensor]
    stack_names: Mapping[str, str]
    left_out: Mapping[str, str]
    generation: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie."""
        return self.path.parent if self.path.is_file() else self.path

    def has_head_of_its_own(self) -> bool:
        """Whether there is an output head other than the embedding, whatever the config says of a tie.

        What was only looked up has none that could be compared.
        """
        names = self.stack_names.get(OUTPUT_HEAD), self.stack_names.get(EMBEDDING)
        head, embedding = (self.tensors.get(name or "") for name in names)
        if head is None or embedding is None or isinstance(head, RemoteTensor):
            return False
        return head.shape != embedding.shape or not all(
            torch.equal(head.rows(start, stop), embedding.rows(start, stop)) for start, stop in row_ranges(head.shape)
        )

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def resolve_source(
    given: str, revision: str | None = None, aliases_of: str = "gemma2", *, weights: bool = True
) -> Source:
    """Find a source and read everything but its weights.

    Args:
        given: an alias of the family ``aliases_of``, the path of a folder or of a ``.gguf`` file, or a Hub repository.
        revision: branch, tag or commit of a Hub repository; a file or folder here has none.
        weights: whether those of a Hub repository are fetched; a plan can be made without.

    Raises:
        UserError: it cannot be found, is not of a supported family, or its files are not as they should be.
    """
    aliases = FAMILIES[aliases_of].aliases
    path = Path(os.path.expanduser(given))
    if given not in aliases and os.path.lexists(path):
        return _open_local(locate(path), name=path.resolve().name, commit=None)
    repo = aliases.get(given, given)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(repo):
        raise UserError(
            f"{given} is no file or folder here, and neither an alias ({', '.join(aliases)}) nor a Hub repository "
            "(OWNER/NAME). Check the path."
        )
    # The small files first: an unsupported model should not cost a download of its weights.
    folder, commit = hub.download(repo, revision, weights=False)
    _family_of(read_json(folder / "config.json"), folder / "config.json")
    if weights:
        folder, commit = hub.download(repo, commit)
        return _open_local(locate(folder), name=repo, commit=commit)
    table = hub.tensor_table(repo, commit)
    looked_up = {name: RemoteTensor(shape, weight_dtype(code, name, repo)) for name, (code, shape) in table.items()}
    return _open_folder(folder, repo, commit, looked_up)


def _open_local(path: Path, name: str, commit: str | None) -> Source:
    return _open_gguf(path, path.stem, commit) if is_gguf(path) else _open_folder(path, name, commit)


def _open_folder(
    folder: Path, name: str, commit: str | None, looked_up: Mapping[str, StoredTensor] | None = None
) -> Source:
    config_file = folder / "config.json"
    raw = read_json(config_file)
    family = _family_of(raw, config_file)
    if "quantization_config" in raw:
        raise UserError(f"{config_file} describes quantised weights. Give the unquantised ones, or a .gguf file.")
    config = _text_config(raw, family, folder)
    tensors = read_headers(folder) if looked_up is None else looked_up
    generation = read_generation_config(folder)
    stack_names, left_out = _sort(family, list(tensors), family.stack_name, folder)
    return Source(name, folder, commit, family, config, tensors, stack_names, left_out, generation)


def _open_gguf(path: Path, name: str, commit: str | None) -> Source:
    from modeling_t5gemma.conversion.gguf_file import read_gguf_header

    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    by_architecture = {family.gguf.architecture: family for family in FAMILIES.values()}
    if architecture not in by_architecture:
        raise UserError(
            f"{path} holds the architecture {architecture!r}; supported in GGUF files: {', '.join(by_architecture)}."
        )
    family = by_architecture[architecture]
    header = read_gguf_header(path, added_to_norms=family.gguf.added_to_norms)
    with told(f"{path} has incomplete metadata", "Give another conversion"):
        stated = family.gguf.config(header.metadata)
        check_config(stated, path)
        tied = "output.weight" not in header.tensors
        config = AutoConfig.for_model(family.model_type, tie_word_embeddings=tied, **stated)
    generation = read_generation_config(path.parent)
    stack_names, left_out = _sort(family, list(header.tensors), family.gguf_stack_name, path)
    return Source(name, path, commit, family, config, header.tensors, stack_names, left_out, generation)


def _text_config(raw: dict[str, Any], family: Family, folder: Path) -> PreTrainedConfig:
    """The config of the text stack, none of whose fields says what the family's block does not do."""
    config_file = folder / "config.json"
    with told(f"{config_file} is no valid {family.title} config", "Repair it"):
        config: PreTrainedConfig = load_config(folder).get_text_config()
    kind = getattr(config, "model_type", None)
    if kind != family.model_type:
        raise UserError(
            f"{config_file} is of model type {kind!r}; a {family.title} is {family.model_type!r}. Repair it."
        )
    known = {field.name for field in fields(config)} | _OTHER_SPELLINGS
    for name, value in (raw.get("text_config") or raw).items():
        # Unset, off or 1: as if it were not there.
        if name not in known and _COMPUTES.search(name) and value not in (None, False, 1, [], {}):
            raise UserError(
                f"{config_file} sets {name} to {value!r:.80}, which no {family.title} has, so the result would not "
                "compute what the source does. Take it out if it does not matter."
            )
    return config


def _family_of(config: dict[str, Any], file: Path) -> Family:
    check_config(config, file)
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in architectures):
            return family
        if not architectures and config.get("model_type") == family.model_type:
            return family
    supported = ", ".join(architecture for family in FAMILIES.values() for architecture in family.architectures)
    seen = ", ".join(architectures) or f"model_type {config.get('model_type')!r}"
    raise UserError(f"{file} describes {seen}, which cannot be converted. Supported: {supported}.")


def _sort(family: Family, names: list[str], translate: Any, where: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Split a source's tensors into those of the text stack and those that may be left out.

    Raises:
        UserError: a tensor is neither, or two tensors claim one place.
    """
    stack_names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in names:
        stack_name = translate(name)
        reason = family.reason_left_out(name)
        if stack_name is not None:
            if stack_name in stack_names:
                raise UserError(f"{where} holds {name} and {stack_names[stack_name]} for one place. Remove one.")
            stack_names[stack_name] = name
        elif reason is not None:
            left_out[name] = reason
        else:
            raise UserError(
                f"{where} holds {name}, which no {family.title} has, so it is not known where it belongs. "
                f"Give a plain {family.title} checkpoint (adapters merged)."
            )
    return stack_names, left_out
