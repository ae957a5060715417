"""Tiny random decoder-only models of every family, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
)

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
VOCABULARY = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "th", "the"]
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    # Large enough for the softcaps to matter.
    "initializer_range": 0.5,
}
SLIDING = {"sliding_window": 8, "query_pre_attn_scalar": 32}
MODELS: dict[str, tuple[Callable[..., Any], type, dict[str, Any]]] = {
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, SLIDING),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**SLIDING, "sliding_window_pattern": 2}),
}


def tiny_model(family: str, seed: int = 0, **changes: Any):
    """A model whose every tensor is random, norms included."""
    config_class, model_class, fields = MODELS[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**TINY, **fields, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.normal_(0.0, 0.3)
    return model


def tiny_multimodal():
    """A Gemma 3 with a vision tower."""
    text = {**TINY, **SLIDING, "sliding_window_pattern": 2, "vocab_size": 320}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=300,
            boi_token_index=301,
            eoi_token_index=302,
        )
    )


def save_tokenizer(folder: Path, vocabulary: list[str] = VOCABULARY) -> None:
    GemmaTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=[("▁", "a"), ("t", "h"), ("th", "e")]
    ).save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read with the safetensors package."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_gguf(model: Any, path: Path, quantization: str | None = "Q8_0", **metadata: float) -> None:
    """Write a model as llama.cpp's converter does: 1 added to the norms, matrices quantised, the vocabulary inside.

    The names are those of the gguf package's own table.
    """
    import gguf

    config = model.config.get_text_config()
    name = config.model_type.removesuffix("_text")
    arch = gguf.MODEL_ARCH[name.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name != "gemma":
        writer.add_sliding_window(config.sliding_window)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{name}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    words = VOCABULARY + [f"<unused{i}>" for i in range(config.vocab_size - len(VOCABULARY))]
    writer.add_token_list([word.replace("\u2581\u2581", "  ") for word in words])
    writer.add_token_scores([float(-i) for i in range(len(words))])
    writer.add_token_types(
        [3 if i < len(WORDS) else 6 if word.startswith("<0x") else 1 for i, word in enumerate(words)]
    )
    for token, i in (("bos", 2), ("eos", 1), ("pad", 0), ("unk", 3)):
        getattr(writer, f"add_{token}_token_id")(i)
    plain = gguf.GGMLQuantizationType.F32
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        values = tensor.float().numpy() + (1 if key.endswith("norm.weight") else 0)
        kind = plain if values.ndim == 1 or quantization is None else gguf.GGMLQuantizationType[quantization]
        data = values if kind == plain else gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
