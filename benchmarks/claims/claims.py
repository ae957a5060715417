"""The claims: which two arms stand for each, and what "Encoder-Decoder Gemma" (arXiv 2504.06225) found.

In the paper's effects PT is the average of its pretraining benchmarks, IT that after instruction tuning and SG its
SuperGLUE average, all in points; the models are Gemma 2's 2B-2B where no other is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["loss", "labels", "use"]


@dataclass(frozen=True)
class Claim:
    """That the arm ``better`` beats the arm ``worse``; "tuned" is after the encoder was tuned to tell labels.

    Attributes:
        measure: "loss" in bits a byte, lower is better; "labels", accuracy in points; "use" of the encoder in bits a
            byte, higher is better.
        paper: its effect, for the table.
        claimed: by the paper. What it has not looked at has a row all the same.
    """

    title: str
    better: str
    worse: str
    measure: Measure
    paper: str
    claimed: bool = True


CLAIMS = (
    Claim("adaptation beats training from scratch at equal tokens", "copy", "scratch", "loss",
          "PT +2.6 (XL-XL +1.8, L-L +0.7, B-B -1.2, S-S -1.2)"),
    Claim("adaptation beats training from scratch, tuned", "copy", "scratch", "labels", "not stated", claimed=False),
    Claim("adaptation beats more decoder-only training: it is not only compute (equal FLOPs)", "copy", "single",
          "loss", "PT 49.7 against 48.6 after 6T more tokens: +1.1"),
    Claim("adaptation beats more decoder-only training, tuned", "copy", "single", "labels",
          "SG +12.6 over Gemma 2 2B"),
    Claim("adaptation beats a decoder-only model of as many parameters", "copy", "grown", "loss", "not tried",
          claimed=False),
    Claim("adaptation beats a decoder-only model of as many parameters, tuned", "copy", "grown", "labels",
          "not tried", claimed=False),
    Claim("adaptation with layerwise cross-attention beats more decoder-only training", "layerwise", "single", "loss",
          "not tried", claimed=False),
    Claim("distillation beats the text alone", "distilled", "copy", "loss",
          "\"often improves small models significantly\", no figure"),
    Claim("distillation beats the text alone, tuned", "distilled", "copy", "labels", "not stated", claimed=False),
    Claim("a bidirectional encoder beats a causal one", "copy", "causal", "loss", "PT +4.1"),
    Claim("a bidirectional encoder beats a causal one, tuned", "copy", "causal", "labels", "IT +4.7"),
    Claim("an MHA encoder beats a GQA encoder", "mha", "copy", "loss", "PT +0.5"),
    Claim("a GQA encoder beats an MHA encoder, tuned", "copy", "mha", "labels", "IT +2.9"),
    Claim("large-small beats small-small", "unbalanced-short", "small-small", "loss", "9B-2B over 2B-2B: PT +5.3"),
    Claim("large-small beats small-small, tuned", "unbalanced-short", "small-small", "labels", "SG +2.1"),
    Claim("large-large beats large-small", "copy", "unbalanced-short", "loss", "9B-9B over 9B-2B: PT +8.1"),
    Claim("large-small: a short warm-up beats none", "unbalanced-short", "unbalanced", "loss", "9B-2B, UL2: +0.7"),
    Claim("large-small: a short warm-up beats a long one", "unbalanced-short", "unbalanced-long", "loss",
          "9B-2B, UL2: +2.3"),
    Claim("PrefixLM beats UL2 in generation", "copy", "ul2", "loss", "IT +4.0, PT -0.4"),
    Claim("UL2 beats PrefixLM in representation", "ul2", "copy", "labels", "SG 0.0 (XL-XL +1.0, 9B-9B +0.4)"),
    Claim("PrefixLM in the last tenth beats UL2 alone in generation", "ul2-first", "ul2", "loss",
          "IT better, PT worse, no figure"),
    Claim("UL2 alone beats PrefixLM in the last tenth in representation", "ul2", "ul2-first", "labels",
          "SG worse with it, no figure"),
    Claim("PrefixLM alone beats UL2 in the last tenth in generation", "copy", "ul2-last", "loss",
          "\"generally hurts\", no figure"),
    Claim("PrefixLM alone beats UL2 in the last tenth in representation", "copy", "ul2-last", "labels",
          "\"generally hurts\", no figure"),
    Claim("joint training beats UL2 in generation", "joint", "ul2", "loss", "not tried", claimed=False),
    Claim("joint training beats PrefixLM in representation", "joint", "copy", "labels", "not tried", claimed=False),
    Claim("PrefixLM beats the mean of both in generation", "copy", "merged", "loss",
          "mean \"similar or much worse\""),
    Claim("UL2 beats the mean of both in representation", "ul2", "merged", "labels",
          "mean \"similar or much worse\""),
    *(
        Claim(f"cross-attention: {title} beats copied{of}", start, "copy", measure, "not compared", claimed=False)
        for start, title in (
            ("random", "drawn"),
            ("random-alone", "drawn, alone for a tenth,"),
            ("partial", "partial"),
            ("layerwise", "layerwise"),
            ("fitted", "keys and values by regression"),
            ("silenced", "silent at first"),
            ("cross-rate", "5 times the learning rate"),
            ("reconstruction", "reconstruction for a third"),
            ("contrast", "contrast of prefixes"),
            ("hidden-words", "30% of the decoder's words hidden"),
            ("decoder-waits", "decoder waiting for a half"),
        )
        for measure, of in (("loss", ""), ("use", " in use of the encoder"))
    ),
)  # fmt: skip
