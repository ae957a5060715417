"""Text in, text out, as a transformers pipeline.

transformers 5 removed "text2text-generation" and keeps the name reserved. Importing the package registers
"seq2seq-generation" in its place::

    import modeling_t5gemma
    from transformers import pipeline

    write = pipeline("seq2seq-generation", model="my-checkpoint")
    write("A text to continue", max_new_tokens=40)  # [{"generated_text": "..."}]
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSeq2SeqLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .text.rules import unbegun, with_rows, with_rule

TASK = "seq2seq-generation"


class Seq2SeqGenerationPipeline(Pipeline):
    """Encode a text, generate, decode. Further keywords of a call go to ``generate``."""

    _load_tokenizer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, tokenizer = self.model.config, kwargs["tokenizer"]
        self.tokenizer = with_rule(with_rows(tokenizer, config.encoder.vocab_size), config)

    def _sanitize_parameters(
        self, truncation: bool = False, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {"truncation": truncation}, generate_kwargs, {}

    def preprocess(self, input_: str, truncation: bool = False) -> Any:
        return self.tokenizer(unbegun(self.tokenizer, input_), return_tensors="pt", truncation=truncation)

    def _forward(self, input_tensors: Any, **generate_kwargs: Any) -> dict[str, Any]:
        return {"sequences": self.model.generate(**input_tensors, **generate_kwargs)}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(model_outputs["sequences"], skip_special_tokens=True)
        return [{"generated_text": text} for text in texts]


PIPELINE_REGISTRY.register_pipeline(TASK, Seq2SeqGenerationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")
