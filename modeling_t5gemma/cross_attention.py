"""The kinds of cross-attention: how a decoder reads its encoder, one row each.

A row says what the rest of the package has to know of a kind; nothing else asks for one by its name. What a layer
does with it stands in ``blocks``. Whatever weights a kind adds to a decoder layer have ``cross_attn`` in their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What a decoder reads of its encoder: its final output, or of a paired layer the keys and values.
OUTPUT, KEY_VALUES = "output", "key_values"


@dataclass(frozen=True)
class CrossAttention:
    """One kind.

    Attributes:
        name: the value of ``cross_attention_type``.
        reads: ``OUTPUT`` or ``KEY_VALUES``.
        joint: the source's keys stand before the decoder's own in one softmax; otherwise a sublayer of its own reads
            them.
        continues: the decoder's positions go on after the source's, whose keys are rotated, and its windows count over
            both; otherwise they begin at 0, and the source has no positions and is always seen whole.
        begins: sources begin with ``<bos>``, as the original's texts do.
        weights: the decoder has weights for it, which ``is_cross_attention`` finds.
        summary: what it is, for model cards.
    """

    name: str
    reads: str
    joint: bool
    continues: bool
    begins: bool
    weights: bool
    summary: str

    @property
    def paired(self) -> bool:
        """Whether decoder layer l reads encoder layer m(l), by ``cross_attention_map``."""
        return self.reads != OUTPUT

    def layer_map(self, encoder: Any, decoder: Any, given: Sequence[int | None] | None) -> list[int | None] | None:
        """The encoder layer for each decoder layer, None for one that reads no source, checked; None where layers are
        not paired.

        Args:
            encoder, decoder: the stacks' configs.
            given: None for equal layers.

        Raises:
            ValueError: the map does not fit the stacks, or there is nothing to map.
        """
        if not self.paired:
            if given is not None:
                paired = " or ".join(repr(kind.name) for kind in KINDS.values() if kind.paired)
                raise ValueError(f"cross_attention_map pairs layers for cross_attention_type={paired}; leave it out.")
            return None
        layers = encoder.num_hidden_layers, decoder.num_hidden_layers
        if given is None:
            if layers[0] != layers[1]:
                raise ValueError(
                    f"{self.name.capitalize()} cross-attention pairs equal layers by default, but the encoder has "
                    f"{layers[0]} layers and the decoder {layers[1]}: give cross_attention_map, an encoder layer for "
                    "each decoder layer."
                )
            given = range(layers[0])
        layer_map = list(given)
        read = [m for m in layer_map if m is not None]
        if len(layer_map) != layers[1] or not read or not all(0 <= m < layers[0] for m in read):
            raise ValueError(
                f"cross_attention_map is {layer_map}; it needs {layers[1]} encoder layers, each from 0 to "
                f"{layers[0] - 1}, or None where a decoder layer reads no source, but not everywhere."
            )
        return layer_map


KINDS = {
    kind.name: kind
    for kind in (
        CrossAttention(
            "separate",
            reads=OUTPUT,
            joint=False,
            continues=False,
            begins=False,
            weights=True,
            summary="Cross-attention is the decoder's own and reads the encoder's output.",
        ),
        CrossAttention(
            "layerwise",
            reads=KEY_VALUES,
            joint=True,
            continues=True,
            begins=True,
            weights=False,
            summary="There are no cross-attention weights: decoder layer l attends, in one softmax with its own keys "
            "and values, to those of encoder layer m(l) (cross_attention_map in config.json).",
        ),
    )
}


def kind_of(config: Any) -> CrossAttention:
    """The kind of a pair's or a stack's config.

    Raises:
        ValueError: there is no such kind.
    """
    if config.cross_attention_type not in KINDS:
        raise ValueError(f"cross_attention_type is {config.cross_attention_type!r}; it can be one of {tuple(KINDS)}.")
    return KINDS[config.cross_attention_type]


def layers_read(config: Any) -> list[int]:
    """The encoder's layers that a decoder layer reads, ascending; none where it reads the final output."""
    return sorted({m for m in config.cross_attention_map or () if m is not None})


def is_cross_attention(name: str) -> bool:
    """Whether a parameter belongs to cross-attention; the norms around it do (arXiv 2504.06225, section 3)."""
    return "cross_attn" in name
