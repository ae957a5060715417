"""LoRA with peft, which has no default targets for these models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

# Every projection of both stacks; embeddings and heads stay as they are. A path from the layers on, so that nothing
# outside them can match.
LORA_TARGETS = r".*(encoder|decoder)\.layers\.\d+\.(self_attn|cross_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
# The same of a decoder-only model of transformers.
DECODER_ONLY_TARGETS = r"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def lora_config(**kwargs: Any) -> LoraConfig:
    """A ``peft.LoraConfig`` for an encoder-decoder of this package.

    Args:
        kwargs: fields of ``LoraConfig``; ``target_modules`` defaults to all projections, ``task_type`` to
            "SEQ_2_SEQ_LM".
    """
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": LORA_TARGETS, "task_type": "SEQ_2_SEQ_LM", **kwargs})
