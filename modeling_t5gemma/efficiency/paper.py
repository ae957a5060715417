"""What "Encoder-Decoder Gemma" (arXiv 2504.06225) reports of its models' quality, FLOPs and latency."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """One model of the paper, by the preset that it is here.

    Attributes:
        flops: of one sequence; what they count is in ``accounting.paper_flops``.
        latency: seconds a question of GSM8K, batch 1.
        pretrained, instruction_tuned: averages in percent, of encoder-decoders those of PrefixLM; instruction-tuned
            with SFT, but for Gemma 2, which the paper gives after RLHF alone.
    """

    flops: float
    latency: float
    pretrained: float
    instruction_tuned: float


PAPER = {
    "gemma2-2b": Reported(0.491e14, 0.915, 47.9, 39.0),
    "2b-2b": Reported(0.464e14, 0.805, 49.7, 46.4),
    "9b-2b": Reported(1.047e14, 0.962, 55.0, 49.3),
    "gemma2-9b": Reported(1.717e14, 2.578, 61.7, 59.6),
    "9b-9b": Reported(1.630e14, 2.727, 63.1, 62.9),
}
QUALITIES = {"paper-pretrained": "pretrained", "paper-instruction-tuned": "instruction_tuned"}
