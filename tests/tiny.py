"""Tiny random models whose softcaps, windows and norms matter and whose greedy text is not one token over and over."""

from __future__ import annotations

import copy

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers import T5GemmaForConditionalGeneration as StockT5Gemma

import modeling_t5gemma as m

VOCAB = 97
BALANCED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=16,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=3.0,
    initializer_range=0.25,
    max_position_embeddings=256,
)
NARROW = {**BALANCED, "hidden_size": 24, "num_hidden_layers": 3, "num_key_value_heads": 1}


@torch.no_grad()
def stir(model: torch.nn.Module) -> torch.nn.Module:
    """Gains away from 1 and sublayers that outweigh the embedding, so that a wrong norm or layer shows."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(std=0.2)
        elif "embed_tokens" in name:
            parameter.mul_(0.1)
        if name.endswith(("decoder.norm.weight", "model.norm.weight")):
            # The head is the embedding, which is small now.
            parameter.add_(4)
    return model.eval()


def t5gemma(encoder: dict = BALANCED, decoder: dict = BALANCED, **kwargs) -> m.T5GemmaForConditionalGeneration:
    config = m.T5GemmaConfig(encoder=dict(encoder), decoder=dict(decoder), **kwargs)
    return stir(m.T5GemmaForConditionalGeneration(config))


def stock_twin(model: m.T5GemmaForConditionalGeneration, folder: str) -> StockT5Gemma:
    """Stock transformers' model from a checkpoint that ours wrote."""
    model.save_pretrained(folder)
    return StockT5Gemma.from_pretrained(folder, attn_implementation="eager").eval()


def gemma3(**kwargs) -> Gemma3ForCausalLM:
    """A decoder-only model with QK-norm, a window of 6, two RoPE bases."""
    switches = {k: v for k, v in BALANCED.items() if "softcapping" not in k}
    config = Gemma3TextConfig(
        **{**switches, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, **kwargs}
    )
    return stir(Gemma3ForCausalLM._from_config(config, attn_implementation="eager"))


def adapted_config(source: Gemma3ForCausalLM, **kwargs) -> m.AdaptedSeq2SeqConfig:
    """Both stacks are ``source``'s; ``bidirectional_layers`` goes to the encoder."""
    names = set(m.AdaptedSeq2SeqModuleConfig.__dataclass_fields__) & set(source.config.to_dict())
    stack = {
        name: copy.deepcopy(getattr(source.config, name)) for name in names if name not in ("dtype", "is_decoder")
    }
    stack = {name: value for name, value in stack.items() if not hasattr(m.AdaptedSeq2SeqConfig, name)} | {
        name: stack[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if name in stack
    }
    encoder = {**stack, "bidirectional_layers": kwargs.pop("bidirectional_layers", "all")}
    return m.AdaptedSeq2SeqConfig(encoder=encoder, decoder=stack, **kwargs)


def layerwise(source: Gemma3ForCausalLM, **kwargs) -> m.AdaptedSeq2SeqForConditionalGeneration:
    """The layerwise encoder-decoder of a decoder-only model; causal unless ``bidirectional_layers`` says otherwise."""
    kwargs.setdefault("bidirectional_layers", "none")
    model = m.AdaptedSeq2SeqForConditionalGeneration(
        adapted_config(source, cross_attention_type="layerwise", **kwargs)
    )
    renamed = {
        name.replace("input_layernorm", "pre_self_attn_layernorm").replace(
            "post_attention_layernorm", "post_self_attn_layernorm"
        ): tensor.clone()
        for name, tensor in source.model.state_dict().items()
    }
    weights = {f"model.{side}.{name}": tensor for side in ("encoder", "decoder") for name, tensor in renamed.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ["lm_head.out_proj.weight"], (missing, unexpected)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids without special tokens, int64 (rows, length)."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, lengths: list[int], side: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``lengths`` ids of each row padded to ``width``, and their mask."""
    out = torch.zeros((len(lengths), width), dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        out[row, place] = ids[row, :length]
    return out, (out != 0).long()


def word_tokenizer():
    """A tokenizer of VOCAB words, "w3" being token 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words["<unk>"] = words.pop("w3")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
