"""Text as token windows, each cut into a prefix and a target.

Shapes: N windows, P prefix length, T target length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows without special tokens.

    Attributes:
        prefixes: int64 (N, P).
        targets: int64 (N, T), what follows each prefix.
    """

    prefixes: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, index: torch.Tensor | slice) -> Windows:
        return Windows(self.prefixes[index], self.targets[index])

    def to(self, device: torch.device) -> Windows:
        return Windows(self.prefixes.to(device), self.targets.to(device))

    def digest(self) -> str:
        """What tells these windows from others."""
        return hashlib.sha256(torch.cat([self.prefixes, self.targets], dim=1).numpy().tobytes()).hexdigest()

    def with_wrong_prefixes(self) -> Windows:
        """Each target behind the prefix of the window before it (the first behind the last's).

        Raises:
            ValueError: there is only one window.
        """
        if len(self) < 2:
            raise ValueError("One window alone has no other window's prefix: give at least two.")
        return Windows(self.prefixes.roll(1, dims=0), self.targets)


def cut_windows(tokens: Sequence[int], prefix_length: int, target_length: int) -> Windows:
    """Cut a token sequence into windows that lie end to end; what is left over at its end is dropped.

    Raises:
        ValueError: the sequence is shorter than one window.
    """
    length = prefix_length + target_length
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"The text has {len(tokens)} tokens, fewer than one window of {length}: give a longer text.")
    rows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    return Windows(rows[:, :prefix_length], rows[:, prefix_length:])


def hold_out(windows: Windows, count: int) -> tuple[Windows, Windows]:
    """The windows to train on, and ``count`` others spread evenly over the text: of its kind, and far enough apart to
    know little of each other.

    Raises:
        ValueError: no window would be left to train on.
    """
    if not 0 < count < len(windows):
        raise ValueError(
            f"{count} of {len(windows)} windows cannot be held out: at least one has to remain on each side."
        )
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[torch.arange(count) * len(windows) // count] = True
    return windows[~held_out], windows[held_out]
