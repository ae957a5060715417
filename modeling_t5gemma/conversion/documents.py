"""The papers of a converted checkpoint: model card, licence, record of how it was made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modeling_t5gemma.conversion.family import Legal
from modeling_t5gemma.conversion.options import ConversionOptions, describe_layers
from modeling_t5gemma.conversion.plan import Copied, Plan
from modeling_t5gemma.conversion.source import Source
from modeling_t5gemma.conversion.target import DECODER, ENCODER, Stack, Target, stack_configs
from modeling_t5gemma.cross_attention import kind_of
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io.text_files import check_regular, read_json, read_text

RECORD_FILE = "conversion.json"
# What a source's folder may hold of its licence.
_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "*TERMS*")
# How a separate one begins.
_CROSS_ATTENTION = {
    "copy": "Cross-attention is the decoder's own; its weights and the norms around it start as copies of the same "
    "layer's self-attention.",
    "random": "Cross-attention is the decoder's own; its weights start at random (normal, standard deviation "
    "initializer_range), the norms around it with gain 1. Train it alone for the first 1000 steps, as the paper does.",
    "partial": "Cross-attention is the decoder's own; queries, output and norms start as copies of the same layer's "
    "self-attention, keys and values at random.",
}


def write_documents(folder: Path, target: Target, plan: Plan, options: ConversionOptions) -> None:
    """Write ``README.md``, ``conversion.json``, and what the sources' licences ask for."""
    terms = write_licences(folder, target)
    record = _record(target, plan, options)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _card(target, plan, options, terms).save(folder / "README.md")


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's ``conversion.json``, {} without one.

    Raises:
        UserError: it is damaged.
    """
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        return {}
    record = read_json(file)
    stacks = [record.get(side) for side in (ENCODER, DECODER)]
    if not all(map(_is_stack_record, stacks)) or not isinstance(record.get("cross_attention"), str):
        raise UserError(
            f"{file} is not as t5gemma convert wrote it (source, commit and layers of each stack, and what "
            "cross_attention began as). Put it back, or remove it."
        )
    return record


def write_licences(folder: Path, target: Target) -> str | None:
    """Write ``NOTICE`` and the terms, or where they are if no source carries a copy.

    Returns:
        The name of the file with the terms; None if no source asks for them.
    """
    sources = _distinct_sources(target)
    for source in sources:
        for pattern in _LICENCE_PATTERNS:
            for path in source.folder.glob(pattern):
                check_regular(path)
                shutil.copyfile(path, folder / path.name)
    legal = _legal(target)
    if legal is None:
        return None
    given = [path for source in sources for path in sorted(source.folder.glob("NOTICE*"))]
    names = " and ".join(source.name for source in sources)
    return write_notice(
        folder,
        legal,
        f"they were converted from {names} into an encoder-decoder",
        [read_text(path).strip() for path in given],
    )


def write_notice(folder: Path, legal: Legal, change: str, given: Sequence[str] = ()) -> str:
    """Write ``NOTICE``, and where the terms are if the folder has no copy of them.

    Args:
        change: how the weights were modified.
        given: notices that have to be passed on.

    Returns:
        The name of the file with the terms.
    """
    terms_file = max((path.name for path in folder.iterdir() if "TERMS" in path.name.upper()), default=None)
    if terms_file is None:
        terms_file = legal.terms_file
        (folder / terms_file).write_text(
            f"The terms are at {legal.terms_url} and were not among the source's files. Before you pass this "
            "checkpoint on, put a copy of them here: whoever gets it has to get them too.\n",
            encoding="utf-8",
        )
    paragraphs = [legal.notice, f"The weights in this folder were modified: {change}.", *dict.fromkeys(given)]
    (folder / "NOTICE").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return terms_file


def _card(target: Target, plan: Plan, options: ConversionOptions, terms_file: str | None) -> ModelCard:
    legal = _legal(target)
    stacks = stack_configs(target.config)
    repository = options.push_to_hub or options.output.name
    data = ModelCardData(
        base_model=[source.name for source in _distinct_sources(target) if "/" in source.name] or None,
        library_name="transformers",
        license=legal.license if legal else None,
        pipeline_tag="text-generation",
        tags=["encoder-decoder", "text2text-generation", target.config.model_type],
    )
    rows: dict[str, list[object]] = {
        "source": [target.encoder.source.name, target.decoder.source.name],
        "layers": [stack.num_hidden_layers for stack in stacks],
        "width / FFN": [f"{stack.hidden_size} / {stack.intermediate_size}" for stack in stacks],
        "query / kv heads x head_dim": [
            f"{stack.num_attention_heads} / {stack.num_key_value_heads} x {stack.head_dim}" for stack in stacks
        ],
        "bidirectional layers": [_bidirectional(stacks[0]), "none"],
    }
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=files("modeling_t5gemma.conversion").joinpath("files/MODEL_CARD.md").read_text(encoding="utf-8"),
        model_name=repository.split("/")[-1],
        repository=repository,
        sources=" and ".join(_linked(source) for source in _distinct_sources(target)),
        architecture=[[title, *cells] for title, cells in rows.items()],
        cross_attention=_CROSS_ATTENTION.get(target.cross_attention) or kind_of(target.config).summary,
        provenance=_provenance(target, plan, options),
        needs_package=target.config.model_type != "t5gemma",
        begins=kind_of(target.config).begins,
        says=True,
        legal=legal,
        terms_file=terms_file,
    )
    return card


def _provenance(target: Target, plan: Plan, options: ConversionOptions) -> list[str]:
    drawn = sum(write.parameters for write in plan.writes if not isinstance(write.origin, Copied))
    total = sum(write.parameters for write in plan.writes)
    lines = [
        f"{total:,} parameters in {str(plan.dtype).removeprefix('torch.')}, {drawn:,} of them not from a source "
        f"(seed {options.seed}).",
    ]
    for side, stack in (("Encoder", target.encoder), ("Decoder", target.decoder)):
        commit = f", commit {stack.source.commit}" if stack.source.commit else ""
        repeated = f", each key/value head {stack.kv_repeats} times" if stack.kv_repeats > 1 else ""
        lines.append(f"{side}: layers {describe_layers(stack.layers)} of {_linked(stack.source)}{commit}{repeated}.")
    if target.config.share_embeddings:
        lines.append("Encoder and decoder share the decoder source's embedding.")
    return lines


def _record(target: Target, plan: Plan, options: ConversionOptions) -> dict[str, Any]:
    return {
        "encoder": _stack_record(target.encoder),
        "decoder": _stack_record(target.decoder),
        "cross_attention": target.cross_attention,
        "encoder_attention": stack_configs(target.config)[0].bidirectional_layers,
        "share_embeddings": target.config.share_embeddings,
        "seed": options.seed,
        "not_from_a_source": [write.name for write in plan.writes if not isinstance(write.origin, Copied)],
        "left_out": [{"side": left.side, "name": left.name, "reason": left.reason} for left in plan.left_out],
    }


def _stack_record(stack: Stack) -> dict[str, Any]:
    return {
        "source": stack.source.name,
        "family": stack.source.family.name,
        "commit": stack.source.commit,
        "layers": stack.layers,
        "kv_repeats": stack.kv_repeats,
    }


def _is_stack_record(origin: Any) -> bool:
    if not isinstance(origin, dict) or not isinstance(origin.get("source"), str):
        return False
    layers = origin.get("layers")
    whole = isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers) and bool(layers)
    return whole and isinstance(origin.get("commit"), str | None)


def _distinct_sources(target: Target) -> list[Source]:
    return list({source.path: source for source in (target.encoder.source, target.decoder.source)}.values())


def _legal(target: Target) -> Legal | None:
    return target.decoder.source.family.legal or target.encoder.source.family.legal


def _linked(source: Source) -> str:
    return f"[{source.name}](https://huggingface.co/{source.name})" if "/" in source.name else source.name


def _bidirectional(encoder: Any) -> str:
    layers: str | list[int] = encoder.bidirectional_layers
    return layers if isinstance(layers, str) else describe_layers(layers)
