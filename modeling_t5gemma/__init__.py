"""Encoder-decoder models from pretrained decoder-only ones.

Importing this package makes every Auto class of transformers load its models for the model types "t5gemma" and
"adapted_seq2seq".
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from . import pipelines  # noqa: F401  # registers its task
from .configuration_t5gemma import (
    AdaptedSeq2SeqConfig,
    AdaptedSeq2SeqModuleConfig,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)
from .modeling_t5gemma import (
    AdaptedSeq2SeqEncoderModel,
    AdaptedSeq2SeqForConditionalGeneration,
    AdaptedSeq2SeqForMultipleChoice,
    AdaptedSeq2SeqForQuestionAnswering,
    AdaptedSeq2SeqForSequenceClassification,
    AdaptedSeq2SeqForTokenClassification,
    AdaptedSeq2SeqModel,
    AdaptedSeq2SeqPreTrainedModel,
    T5GemmaEncoderModel,
    T5GemmaForConditionalGeneration,
    T5GemmaForMultipleChoice,
    T5GemmaForQuestionAnswering,
    T5GemmaForSequenceClassification,
    T5GemmaForTokenClassification,
    T5GemmaModel,
)
from .stacks import T5GemmaEncoderOutput, T5GemmaPreTrainedModel
from .text.tokenizer import Seq2SeqTokenizer

__version__ = "0.1.0"

__all__ = [
    "AdaptedSeq2SeqConfig",
    "AdaptedSeq2SeqEncoderModel",
    "AdaptedSeq2SeqForConditionalGeneration",
    "AdaptedSeq2SeqForMultipleChoice",
    "AdaptedSeq2SeqForQuestionAnswering",
    "AdaptedSeq2SeqForSequenceClassification",
    "AdaptedSeq2SeqForTokenClassification",
    "AdaptedSeq2SeqModel",
    "AdaptedSeq2SeqModuleConfig",
    "AdaptedSeq2SeqPreTrainedModel",
    "Seq2SeqTokenizer",
    "T5GemmaConfig",
    "T5GemmaEncoderModel",
    "T5GemmaEncoderOutput",
    "T5GemmaForConditionalGeneration",
    "T5GemmaForMultipleChoice",
    "T5GemmaForQuestionAnswering",
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
    AutoModelForMultipleChoice: (T5GemmaForMultipleChoice, AdaptedSeq2SeqForMultipleChoice),
    AutoModelForQuestionAnswering: (T5GemmaForQuestionAnswering, AdaptedSeq2SeqForQuestionAnswering),
    AutoModelForTextEncoding: (T5GemmaEncoderModel, AdaptedSeq2SeqEncoderModel),
}
AutoConfig.register(T5GemmaConfig.model_type, T5GemmaConfig, exist_ok=True)
AutoConfig.register(AdaptedSeq2SeqConfig.model_type, AdaptedSeq2SeqConfig, exist_ok=True)
# By its name, which a converted checkpoint's tokenizer_config.json gives, it is found for T5GemmaConfig as well.
AutoTokenizer.register(AdaptedSeq2SeqConfig, Seq2SeqTokenizer, exist_ok=True)
for _auto, (_t5gemma, _adapted) in _HEADS.items():
    _auto.register(T5GemmaConfig, _t5gemma, exist_ok=True)
    _auto.register(AdaptedSeq2SeqConfig, _adapted, exist_ok=True)
