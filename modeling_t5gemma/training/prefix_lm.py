"""How a window becomes the inputs of an encoder-decoder and of the decoder-only model it came from.

Shapes: N windows, P prefix length, T target length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .windows import Windows

DecoderStart = Literal["bos", "last_prefix_token"]


@dataclass(frozen=True)
class PrefixLM:
    """The layout of PrefixLM inputs.

    Attributes:
        bos_token_id: the beginning-of-sequence token.
        decoder_start: what the decoder begins with. "bos": the released T5Gemma's layout, the encoder reads the whole
            prefix. "last_prefix_token": the encoder reads the prefix without its last token and the decoder begins
            with that; with layerwise cross-attention and a causal encoder this is the decoder-only model's own layout.
        encoder_bos: whether the encoder's input begins with the beginning-of-sequence token.
    """

    bos_token_id: int
    decoder_start: DecoderStart = "bos"
    encoder_bos: bool = False

    def student_inputs(self, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder input, int64 (N, P - 1 to P + 1), and decoder input, int64 (N, T), whose position t predicts target
        token t."""
        source, start = windows.prefixes, self._bos(windows)
        if self.decoder_start == "last_prefix_token":
            source, start = source[:, :-1], source[:, -1:]
        if self.encoder_bos:
            source = torch.cat([self._bos(windows), source], dim=1)
        return source, torch.cat([start, windows.targets[:, :-1]], dim=1)

    def teacher_inputs(self, windows: Windows) -> torch.Tensor:
        """Decoder-only input, int64 (N, P + T), whose last T positions predict the target."""
        return torch.cat([self._bos(windows), windows.prefixes, windows.targets[:, :-1]], dim=1)

    def teacher_inputs_without_prefix(self, windows: Windows) -> torch.Tensor:
        """Decoder-only input, int64 (N, T), of the target alone."""
        return torch.cat([self._bos(windows), windows.targets[:, :-1]], dim=1)

    def _bos(self, windows: Windows) -> torch.Tensor:
        return windows.prefixes.new_full((len(windows), 1), self.bos_token_id)
