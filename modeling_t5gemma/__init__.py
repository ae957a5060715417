"""Encoder-decoder models from pretrained decoder-only ones.

Importing this package makes every Auto class of transformers load its models for the model types "t5gemma" and
"adapted_seq2seq".
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .configuration_t5gemma import (
    AdaptedSeq2SeqConfig,
    AdaptedSeq2SeqModuleConfig,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)
from .modeling_t5gemma import (
    AdaptedSeq2SeqEncoderModel,
    AdaptedSeq2SeqForConditionalGeneration,
    AdaptedSeq2SeqForSequenceClassification,
    AdaptedSeq2SeqForTokenClassification,
    AdaptedSeq2SeqModel,
    AdaptedSeq2SeqPreTrainedModel,
    T5GemmaEncoderModel,
    T5GemmaEncoderOutput,
    T5GemmaForConditionalGeneration,
    T5GemmaForSequenceClassification,
    T5GemmaForTokenClassification,
    T5GemmaModel,
    T5GemmaPreTrainedModel,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptedSeq2SeqConfig",
    "AdaptedSeq2SeqEncoderModel",
    "AdaptedSeq2SeqForConditionalGeneration",
    "AdaptedSeq2SeqForSequenceClassification",
    "AdaptedSeq2SeqForTokenClassification",
    "AdaptedSeq2SeqModel",
    "AdaptedSeq2SeqModuleConfig",
    "AdaptedSeq2SeqPreTrainedModel",
    "T5GemmaConfig",
    "T5GemmaEncoderModel",
    "T5GemmaEncoderOutput",
    "T5GemmaForConditionalGeneration",
    "T5GemmaForSequenceClassification",
    "T5GemmaForTokenClassification",
    "T5GemmaModel",
    "T5GemmaModuleConfig",
    "T5GemmaPreTrainedModel",
]

# An auto class that is left out here would silently load transformers' own class for the same model type.
_HEADS = {
    AutoModel: (T5GemmaModel, AdaptedSeq2SeqModel),
    AutoModelForSeq2SeqLM: (T5GemmaForConditionalGeneration, AdaptedSeq2SeqForConditionalGeneration),
    AutoModelForSequenceClassification: (T5GemmaForSequenceClassification, AdaptedSeq2SeqForSequenceClassification),
    AutoModelForTokenClassification: (T5GemmaForTokenClassification, AdaptedSeq2SeqForTokenClassification),
    AutoModelForTextEncoding: (T5GemmaEncoderModel, AdaptedSeq2SeqEncoderModel),
}
for _config, _heads in zip((T5GemmaConfig, AdaptedSeq2SeqConfig), zip(*_HEADS.values(), strict=True), strict=True):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _head in zip(_HEADS, _heads, strict=True):
        _auto.register(_config, _head, exist_ok=True)
