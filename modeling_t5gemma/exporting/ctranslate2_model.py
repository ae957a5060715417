"""CTranslate2: a ``t5gemma`` checkpoint as that runtime reads it, and what it computes (the ``export`` extra).

CTranslate2's own converter does the work. What it leaves out although the runtime has it is put right here, found by
comparing CTranslate2 4.8.5 with the model (tests/exporting/test_ctranslate2.py):

* the cap on the final logits, without which log-probabilities are wrong by nats;
* windows: the converter gives every layer one of 4096 positions, cross-attention too, whatever the config says. Beyond
  it the runtime lost the beginning of the source from the second token on, and once wrote past its memory. Here a
  decoder layer has the window of its kind, and cross-attention has none;
* the scale of the queries and the base of RoPE, which the converter takes to be head_dim ** -0.5 and 10,000;
* a head of its own, where it is not the decoder's embeddings;
* rows of the embeddings that the tokenizer has no word for, which the converter refuses, and tokenizers without an
  unknown word, whose models the runtime does not load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import T5GemmaLoader

from ..configuration_t5gemma import SLIDING, StackConfig, T5GemmaConfig, rope_parameters_of
from ..errors import UserError
from ..inference.loading import Checkpoint
from .decoding import Decoding
from .formats import Runtime

_VOCABULARY = "shared_vocabulary.json"
# Left out, inputs are cut off at 1024 tokens.
_NO_MAXIMUM = 0


class CTranslate2:
    """The format ``ctranslate2``; quantisations have CTranslate2's names."""

    def __init__(self, quantization: str) -> None:
        self._quantization = quantization

    def refuse(self, config: Any, path: Path) -> None:
        if not isinstance(config, T5GemmaConfig):
            kind = config.cross_attention_type
            separate = kind == T5GemmaConfig.cross_attention_type
            what = "another block or encoder" if separate else f"{kind} cross-attention"
            raise UserError(
                f"{path} is an {config.model_type!r} with {what}. CTranslate2 reads 't5gemma' alone: Gemma 2's block, "
                "separate cross-attention, a bidirectional encoder. Give --format torch or onnx, or convert a Gemma 2 "
                "with --cross-attention copy."
            )
        stacks = (config.encoder, config.decoder)
        ropes = {rope_parameters_of(stack, kind)["rope_type"] for stack in stacks for kind in stack.layer_types}
        for found, what in (
            (ropes != {"default"}, f"RoPE is scaled ({', '.join(sorted(ropes))})"),
            (len({stack.rms_norm_eps for stack in stacks}) > 1, "the stacks have different rms_norm_eps"),
        ):
            if found:
                raise UserError(f"{path}: {what}, which CTranslate2's T5Gemma lacks. Give --format torch or onnx.")

    def limits(self, config: Any) -> list[str]:
        found = []
        cap = config.decoder.attn_logit_softcapping or config.encoder.attn_logit_softcapping
        if cap is not None:
            found.append(
                f"Attention scores are not capped at {cap:g}: CTranslate2 has no such operation. It matters where "
                "scores come near the cap; the measured deviation includes it."
            )
        if SLIDING in config.encoder.layer_types:
            window = config.encoder.sliding_window
            found.append(
                "The encoder has no window: every layer sees the whole input. It matters for inputs of more than "
                f"{window} tokens."
            )
        if SLIDING in config.decoder.layer_types:
            window = config.decoder.sliding_window
            found.append(
                "translate_batch honours the decoder's window, score_batch has none. It matters for scored targets of "
                f"more than {window} tokens."
            )
        if self._quantization.endswith("bfloat16"):
            found.append("On a CPU, CTranslate2 computes in float32 what is stored in bfloat16.")
        return found

    def write(self, checkpoint: Checkpoint, folder: Path, decoding: Decoding) -> None:
        with torch.no_grad():
            spec = _Loader()(checkpoint.model, checkpoint.tokenizer)
            spec.validate()
            spec.optimize(quantization=self._quantization)
            spec.save(str(folder))

    def load(self, folder: Path, decoding: Decoding) -> Runtime:
        # On a CPU the products are of 8 or of 32 bits; asked for others, the runtime complains and takes these.
        computed_in = "int8_float32" if self._quantization.startswith("int8") else "float32"
        translator = ctranslate2.Translator(
            str(folder), device="cpu", compute_type=computed_in, intra_threads=torch.get_num_threads()
        )
        words = json.loads((folder / _VOCABULARY).read_text(encoding="utf-8"))
        return CTranslate2Runtime(translator, words, decoding)


class _Loader(T5GemmaLoader):
    """CTranslate2's own, with what it leaves out."""

    def get_model_spec(self, model: Any) -> Any:
        config = model.config
        spec = super().get_model_spec(model)
        if config.decoder.final_logit_softcapping is not None:
            spec.decoder.final_logit_softcapping = np.float32(config.decoder.final_logit_softcapping)
        for stack, stack_config in ((spec.encoder, config.encoder), (spec.decoder, config.decoder)):
            stack.sliding_window = np.int32(0)  # of the stack as a whole; each layer has its own
            for layer, kind in zip(stack.layer, stack_config.layer_types, strict=True):
                _set(layer.self_attention, stack_config, stack_config.sliding_window if kind == SLIDING else 0)
                layer.self_attention.rotary_base = np.float32(rope_parameters_of(stack_config, kind)["rope_theta"])
        for layer in spec.decoder.layer:
            _set(layer.attention, config.decoder, 0)
        self.set_linear(spec.decoder.projection, model.lm_head.out_proj)
        return spec

    def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
        words = {index: word for word, index in tokenizer.get_vocab().items()}
        return [words.get(index, f"<no word {index}>") for index in range(model.config.decoder.vocab_size)]

    def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
        super().set_config(config, model, tokenizer)
        words = self.get_vocabulary(model, tokenizer)
        config.decoder_start_token = words[model.decoder_start_token_id()]
        # A vocabulary of bytes has no unknown words. The runtime wants to be told one.
        config.unk_token = tokenizer.unk_token or words[model.config.decoder.pad_token_id]


def _set(attention: Any, config: StackConfig, window: int) -> None:
    attention.sliding_window = np.int32(window)
    attention.queries_scale = np.float32(config.query_pre_attn_scalar**-0.5)


class CTranslate2Runtime:
    """An exported model."""

    def __init__(self, translator: ctranslate2.Translator, words: Sequence[str], decoding: Decoding) -> None:
        self._translator = translator
        self._words = words
        self._ids = {word: index for index, word in enumerate(words)}
        self._ends = self._spelt(decoding.ends)

    def log_probs(self, source: Sequence[int], target: Sequence[int]) -> list[float]:
        (scored,) = self._translator.score_batch(
            [self._spelt(source)], [self._spelt(target)], max_input_length=_NO_MAXIMUM
        )
        return list(scored.log_probs[: len(target)])  # behind them is the end of the text

    def greedy(self, source: Sequence[int], count: int) -> list[int]:
        (result,) = self._translator.translate_batch(
            [self._spelt(source)],
            beam_size=1,
            max_input_length=_NO_MAXIMUM,
            max_decoding_length=count,
            min_decoding_length=0,
            end_token=self._ends,
            return_end_token=True,
        )
        return [self._ids[word] for word in result.hypotheses[0]]

    def _spelt(self, ids: Sequence[int]) -> list[str]:
        return [self._words[index] for index in ids]
