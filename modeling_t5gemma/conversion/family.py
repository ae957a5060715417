"""What is known of a family of decoder-only checkpoints, as data: one ``Family`` for each file in ``families/``.

A tensor has three names: the one in the source's files, the *stack name* (the one it has under ``model.encoder.`` or
``model.decoder.`` of the converted checkpoint) and, in a GGUF file, llama.cpp's. A family maps the first and the third
to the second. In all of them ``{i}`` stands for the layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling_t5gemma.configuration_t5gemma import FamilySwitches

OUTPUT_HEAD = "lm_head.out_proj.weight"
EMBEDDING = "embed_tokens.weight"

# What every family's projections are called; a checkpoint without biases simply has none of the second kind.
PROJECTIONS = {
    f"layers.{{i}}.{module}.{projection}_proj.{kind}": f"layers.{{i}}.{module}.{projection}_proj.{kind}"
    for module, projections in {"self_attn": "q k v o", "mlp": "gate up down"}.items()
    for projection in projections.split()
    for kind in (("weight", "bias") if module == "self_attn" else ("weight",))
}
GGUF_PROJECTIONS = {
    f"blk.{{i}}.{gguf}.{kind}": f"layers.{{i}}.{name}.{kind}"
    for gguf, name in {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }.items()
    for kind in (("weight", "bias") if gguf.startswith("attn") else ("weight",))
}


@dataclass(frozen=True)
class Legal:
    """What has to accompany a derivative of a family.

    Attributes:
        license: the Hub's licence identifier.
        terms_url: where the terms are.
        notice: the line that the NOTICE file must contain.
        terms_file: the name of the copy of the terms.
    """

    license: str
    terms_url: str
    notice: str
    terms_file: str


@dataclass(frozen=True)
class GgufLayout:
    """How llama.cpp stores the family.

    Attributes:
        architecture: the value of ``general.architecture``.
        tensors: GGUF name to stack name.
        added_to_norms: what llama.cpp added to every norm weight when it wrote the file (1 for Gemma, whose gain is
            1 + weight); taken off again.
        config: metadata to the keyword arguments of the source's config class.
        left_out: patterns of GGUF names that are not weights, and why each is left out.
    """

    architecture: str
    tensors: Mapping[str, str]
    added_to_norms: float
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family of decoder-only checkpoints.

    Attributes:
        name: the row of ``FAMILY_SWITCHES``, and what the user is told.
        title: the name to print.
        architectures: the ``architectures`` entries of ``config.json`` that it accepts.
        model_type: the text stack's ``model_type``.
        aliases: short names and the Hub repositories they stand for.
        switches: what tells the family's block from another's.
        stack_fields: the source's text config to the fields of ``AdaptedSeq2SeqModuleConfig`` (those that are not
            switches), which ``T5GemmaModuleConfig`` shares.
        prefixes: what may stand before a name of ``tensors``, tried in this order.
        tensors: source name without its prefix to stack name.
        left_out: patterns of whole source names that are left out, and why.
        tokenizer_class: of a tokenizer that does not name its own.
        legal: what has to accompany a derivative; None if nothing.
        gguf: how llama.cpp stores the family.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    model_type: str
    aliases: Mapping[str, str]
    switches: FamilySwitches
    stack_fields: Callable[[Any], dict[str, Any]]
    prefixes: tuple[str, ...]
    tensors: Mapping[str, str]
    left_out: Mapping[str, str]
    tokenizer_class: str
    legal: Legal | None
    gguf: GgufLayout

    def stack_name(self, source_name: str) -> str | None:
        """The stack name of a tensor of the source's own files, or None if it is not one of the text stack's."""
        for prefix in self.prefixes:
            if source_name.startswith(prefix):
                found = _translate(self.tensors, source_name.removeprefix(prefix))
                if found is not None:
                    return found
        return None

    def gguf_stack_name(self, gguf_name: str) -> str | None:
        """The stack name of a tensor of a GGUF file, or None."""
        return _translate(self.gguf.tensors, gguf_name)

    def reason_left_out(self, source_name: str) -> str | None:
        """Why a tensor that has no stack name may be left out, or None if it may not."""
        for pattern, reason in {**self.left_out, **self.gguf.left_out}.items():
            if re.fullmatch(pattern, source_name):
                return reason
        return None


def common_stack_fields(config: Any) -> dict[str, Any]:
    """The fields that Gemma's text configs share by name. Dropout is not among them: adapting sets its own."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "pad_token_id",
        "eos_token_id",
        "bos_token_id",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_bias",
    )
    return {name: getattr(config, name) for name in names}


def common_gguf_config(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keyword arguments that GGUF metadata give every config, from llama.cpp's keys.

    Raises:
        KeyError: the metadata lack a key that llama.cpp always writes.
    """
    heads = metadata[f"{architecture}.attention.head_count"]
    return {
        "vocab_size": metadata["tokenizer.ggml.tokens"],
        "hidden_size": metadata[f"{architecture}.embedding_length"],
        "intermediate_size": metadata[f"{architecture}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{architecture}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": metadata[f"{architecture}.attention.key_length"],
        "max_position_embeddings": metadata[f"{architecture}.context_length"],
        "rms_norm_eps": metadata[f"{architecture}.attention.layer_norm_rms_epsilon"],
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _translate(table: Mapping[str, str], name: str) -> str | None:
    """Look ``name`` up in a table whose names have ``{i}`` for the layer's number."""
    numbers: list[str] = re.findall(r"(?<=\.)\d+(?=\.)", name)
    if not numbers:
        return table.get(name)
    found = table.get(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name, count=1))
    return None if found is None else found.replace("{i}", numbers[0])
