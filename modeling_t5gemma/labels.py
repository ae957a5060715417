"""Labels to decoder inputs, and what looks wrong with labels.

Shapes: B batch, T target length.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .losses import IGNORED


def shifted_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Labels (B, T) behind the start token, int64 (B, T); ignored ones become padding.

    The start token stands right before a row's first label, on whichever side the row is padded: collators go by the
    tokenizer. One that a tokenizer put before the answer counts as padding, as it is there already.
    """
    learnt = labels != IGNORED
    number = learnt.cumsum(1)
    before = (number == 0) | ((number == 1) & learnt & (labels == start))
    before &= ~before.all(1, keepdim=True)
    begun = labels.masked_fill(before, start)
    shifted = torch.cat([labels.new_full((len(labels), 1), start), begun[:, :-1]], dim=1)
    return shifted.masked_fill(before | (shifted == IGNORED), pad)


def without_start(labels: torch.Tensor, decoder_input_ids: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Labels (B, T) but for the start token where ``shifted_right`` made it padding: nothing could predict it."""
    if start == pad:
        return labels
    return labels.masked_fill((labels == start) & (decoder_input_ids == pad), IGNORED)


def complaints(labels: torch.Tensor, start: int, pad: int, ends: Collection[int]) -> list[str]:
    """What looks wrong with labels (B, T) that decoder inputs are to be made from, in sentences.

    Args:
        ends: tokens of which an answer ends with one.
    """
    rows = [row[row != IGNORED].tolist() for row in labels.cpu()]
    rows = [row for row in rows if row]
    learnt = labels != IGNORED
    inside = (learnt.cumsum(1) > 0) & (learnt.flip(1).cumsum(1).flip(1) > 0) & ~learnt
    found = []
    if rows and ends and not any(row[-1] in ends for row in rows):
        found.append(
            f"None of them ends with an end of sequence ({', '.join(map(str, sorted(ends)))}), and a model that is "
            "trained so never stops. tokenizer(text_target=...) puts one where modeling_t5gemma is imported; without, "
            "append tokenizer.eos_token to each answer."
        )
    if any(row[0] == start for row in rows):
        found.append(f"They begin with the start token ({start}), which the model puts there itself: it is left out.")
    if pad not in ends and any(pad in row for row in rows):
        found.append(f"The padding token ({pad}) is among them and is learnt like a word. Put {IGNORED} in its place.")
    if bool(inside.any()):
        found.append(
            f"Some are {IGNORED} in the middle of an answer, where the decoder then reads padding. Give "
            "decoder_input_ids as well."
        )
    return found
