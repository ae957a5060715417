"""What "Encoder-Decoder Gemma" (arXiv 2504.06225) reports of its models' quality, FLOPs and latency."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Averages:
    """Averages over the paper's benchmarks, in percent; None where it gives none.

    Attributes:
        pretrained: over its 22 benchmarks of pretrained models.
        instruction_tuned, after_rlhf: over its 10 of instruction-tuned ones, after SFT and after RLHF.
    """

    pretrained: float
    instruction_tuned: float | None = None
    after_rlhf: float | None = None


# By the names of the released checkpoints.
AVERAGES = {
    "gemma-2-2b": Averages(47.9, None, 39.0),
    "gemma-2-9b": Averages(61.7, None, 59.6),
    "t5gemma-2b-2b-prefixlm": Averages(49.7, 46.4, 46.1),
    "t5gemma-2b-2b-ul2": Averages(50.1, 42.4),
    "t5gemma-9b-2b-prefixlm": Averages(55.0, 49.3, 50.6),
    "t5gemma-9b-2b-ul2": Averages(52.9, 45.7),
    "t5gemma-9b-9b-prefixlm": Averages(63.1, 62.9, 64.5),
    "t5gemma-9b-9b-ul2": Averages(63.9, 61.5),
    "t5gemma-s-s-prefixlm": Averages(22.8, 9.8),
    "t5gemma-s-s-ul2": Averages(23.1, 10.7),
    "t5gemma-b-b-prefixlm": Averages(26.9, 12.9),
    "t5gemma-b-b-ul2": Averages(26.0, 11.1),
    "t5gemma-l-l-prefixlm": Averages(31.6, 17.5),
    "t5gemma-l-l-ul2": Averages(30.9, 18.9),
    "t5gemma-xl-xl-prefixlm": Averages(39.5, 30.7),
    "t5gemma-xl-xl-ul2": Averages(38.5, 29.2),
}


@dataclass(frozen=True)
class Reported:
    """One model of the paper, by the preset that it is here.

    Attributes:
        flops: of one sequence; what they count is in ``accounting.paper_flops``.
        latency: seconds a question of GSM8K, batch 1.
        averages: of encoder-decoders those of PrefixLM.
    """

    flops: float
    latency: float
    averages: Averages

    @property
    def pretrained(self) -> float:
        return self.averages.pretrained

    @property
    def instruction_tuned(self) -> float | None:
        """With SFT, but for Gemma 2, which the paper gives after RLHF alone."""
        return self.averages.instruction_tuned or self.averages.after_rlhf


PAPER = {
    "gemma2-2b": Reported(0.491e14, 0.915, AVERAGES["gemma-2-2b"]),
    "2b-2b": Reported(0.464e14, 0.805, AVERAGES["t5gemma-2b-2b-prefixlm"]),
    "9b-2b": Reported(1.047e14, 0.962, AVERAGES["t5gemma-9b-2b-prefixlm"]),
    "gemma2-9b": Reported(1.717e14, 2.578, AVERAGES["gemma-2-9b"]),
    "9b-9b": Reported(1.630e14, 2.727, AVERAGES["t5gemma-9b-9b-prefixlm"]),
}
QUALITIES = {"paper-pretrained": "pretrained", "paper-instruction-tuned": "instruction_tuned"}
# What they are, for an axis.
AXES = {
    "pretrained": "average of pretrained models, percent\n(arXiv 2504.06225)",
    "instruction_tuned": "average after SFT (Gemma 2: after RLHF),\npercent (arXiv 2504.06225)",
}
