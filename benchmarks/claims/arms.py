"""The runs that are compared: what each starts from and what it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modeling_t5gemma.training.settings import Part

Stages = tuple[tuple[float, Any], ...]

PREFIX_LM: Stages = ((1.0, "prefix_lm"),)
UL2: Stages = ((1.0, "ul2"),)
JOINT = {"mixture": [{"objective": "prefix_lm", "weight": 1}, {"objective": "ul2", "weight": 1}]}
RECONSTRUCTION = {"denoisers": [{"mean_span": 3, "rate": 0.5}]}
SHORT, LONG = 0.1, 0.5


@dataclass(frozen=True)
class Arm:
    """One run of each seed. All see the same windows in the same order.

    Attributes:
        title: what it is called in the tables.
        kind: "pair", an encoder-decoder; "single", the decoder-only model trained on; "grown", the same with as many
            parameters as a pair; "merged", the mean of the arms in ``of``.
        small: which of its stacks come from the small model: "" or "decoder" or "both".
        cross_attention, encoder_attention, encoder_kv: the converter's options.
        fresh: nothing is taken from the decoder-only model but its shape.
        silenced: cross-attention adds nothing at first.
        fitted: its keys and values come from a regression.
        stages: objectives with their shares of the run.
        distilled: from the decoder-only model, instead of the labels.
        cross_rate: what cross-attention's learning rate is multiplied with.
        wait, waiting: the share of the steps in which these parts are not trained.
        contrast, hidden_words: see ``training.Adapting``.
        of: of a merged arm.
        curve: whether it is drawn.
    """

    title: str
    kind: Literal["pair", "single", "grown", "merged"] = "pair"
    small: Literal["", "decoder", "both"] = ""
    cross_attention: str = "copy"
    encoder_attention: str = "bidirectional"
    encoder_kv: str = "gqa"
    fresh: bool = False
    silenced: bool = False
    fitted: bool = False
    stages: Stages = PREFIX_LM
    distilled: bool = False
    cross_rate: float = 1.0
    wait: float = 0.0
    waiting: tuple[Part, ...] = ("embeddings", "encoder", "decoder")
    contrast: float = 0.0
    hidden_words: float = 0.0
    of: tuple[str, ...] = ()
    curve: bool = False


# The paper's own way comes first: balanced, copied cross-attention, bidirectional encoder. All differ from it in one
# thing, and it learns from the text itself, as UL2 has to.
ARMS: Mapping[str, Arm] = {
    "copy": Arm("adapted: copied cross-attention, PrefixLM", curve=True),
    "scratch": Arm("encoder-decoder from scratch", fresh=True),
    "single": Arm("decoder-only, trained on", kind="single"),
    "grown": Arm("decoder-only, grown to as many parameters", kind="grown"),
    "distilled": Arm("adapted, distilled", distilled=True),
    "causal": Arm("causal encoder", encoder_attention="causal"),
    "mha": Arm("MHA encoder", encoder_kv="mha"),
    "ul2": Arm("UL2", stages=UL2),
    "ul2-first": Arm("UL2, then PrefixLM for the last tenth", stages=((0.9, "ul2"), (0.1, "prefix_lm"))),
    "ul2-last": Arm("PrefixLM, then UL2 for the last tenth", stages=((0.9, "prefix_lm"), (0.1, "ul2"))),
    "joint": Arm("PrefixLM and UL2 jointly", stages=((1.0, JOINT),)),
    "merged": Arm("mean of PrefixLM's and UL2's weights", kind="merged", of=("copy", "ul2")),
    "small-small": Arm("small-small", small="both"),
    "unbalanced": Arm("large-small, K = 0", small="decoder", cross_attention="random"),
    "unbalanced-short": Arm("large-small, K short", small="decoder", cross_attention="random", wait=SHORT),
    "unbalanced-long": Arm("large-small, K long", small="decoder", cross_attention="random", wait=LONG),
    "random": Arm("drawn", cross_attention="random", curve=True),
    "partial": Arm("partial: keys and values drawn", cross_attention="partial", curve=True),
    "layerwise": Arm("layerwise", cross_attention="layerwise", curve=True),
    "fitted": Arm("keys and values by regression", fitted=True, curve=True),
    "silenced": Arm("copied, silent at first, 5 times the learning rate", silenced=True, cross_rate=5.0, curve=True),
    "reconstruction": Arm(
        "copied, reconstruction for a third", stages=((0.34, RECONSTRUCTION), (0.66, "prefix_lm")), curve=True
    ),
    "contrast": Arm("copied, contrast of right and wrong prefix", contrast=1.0, curve=True),
    "random-alone": Arm("drawn, alone for a tenth", cross_attention="random", wait=SHORT, curve=True),
    "cross-rate": Arm("copied, 5 times the learning rate", cross_rate=5.0, curve=True),
    "hidden-words": Arm("copied, 30% of the decoder's words hidden", hidden_words=0.3, curve=True),
    "decoder-waits": Arm("copied, decoder waits for a half", wait=0.5, waiting=("embeddings", "decoder"), curve=True),
}
