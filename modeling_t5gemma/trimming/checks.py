"""What is proved of a trimmed checkpoint before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

import modeling_t5gemma

from ..errors import UserError
from ..io.checkpoints import load_config, load_model

_TOKENS, _ROWS = 64, 8
# Of the largest logit. The sums are the same, in another order: a product with a smaller matrix is cut otherwise.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check_tokens(before: Any, after: Any, texts: Sequence[str], kept: Sequence[int]) -> list[list[int]]:
    """Make sure that texts have the tokens that they had, if all of them were kept, and that all can be read back.

    Args:
        before, after: the tokenizers.
        kept: the old ids of the new tokens, in their order.

    Returns:
        Rows of new ids from the texts, to compare the models with.

    Raises:
        UserError: a text has other tokens or is another when it is decoded.
    """
    there = set(kept)
    rows: list[list[int]] = []
    for text in texts:
        old, new = (
            tokenizer(text, add_special_tokens=False, verbose=False).input_ids for tokenizer in (before, after)
        )
        if there.issuperset(old) and [kept[index] for index in new] != old:
            raise UserError(f"The trimmed tokenizer makes other tokens of {text[:60]!r}. Nothing was written.")
        if after.decode(new) != before.decode(old):
            raise UserError(f"The trimmed tokenizer does not give {text[:60]!r} back. Nothing was written.")
        if len(rows) < _ROWS and len(new) > 1:
            rows.append(new[:_TOKENS])
    draw = torch.Generator().manual_seed(0)
    return rows or [torch.randint(len(kept), (_TOKENS,), generator=draw).tolist()]


@torch.no_grad()
def check_logits(before: Path, after: Path, rows: Sequence[list[int]], kept: Sequence[int]) -> float:
    """The largest difference between what the two models compute, relative to the largest value.

    Args:
        before, after: their folders; one is loaded after the other, in its own dtype.
        rows: new ids.
        kept: the old ids of the new tokens, in their order.

    Raises:
        UserError: it is more than rounding.
    """
    disable_progress_bar()
    old = _outputs(before, [[kept[index] for index in row] for row in rows])
    new = _outputs(after, rows)
    widest, difference = 0.0, 0.0
    for theirs, ours in zip(old, new, strict=True):
        if theirs.shape != ours.shape:  # logits of a language model
            theirs = theirs[..., list(kept)]
        widest = max(widest, theirs.abs().max().item())
        difference = max(difference, (theirs.float() - ours.float()).abs().max().item())
    relative = difference / max(widest, 1e-30)
    if not relative <= _ALLOWED[old[0].dtype]:
        raise UserError(
            f"The trimmed model does not compute what {before} does: {relative:.1e} of the largest logit apart. "
            "Nothing was written."
        )
    return relative


def _outputs(folder: Path, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits or states of each row: half of it is the source and half the target where there are two sides."""
    (name,) = load_config(folder).architectures or ("",)
    auto = getattr(modeling_t5gemma, name, None) or getattr(transformers, name, None)
    if auto is None:
        raise UserError(f"{folder / 'config.json'} names the class {name!r}, which is not known. Give --no-verify.")
    model = load_model(auto, folder, dtype="auto")[0].eval()
    outputs = []
    for row in rows:
        ids = torch.tensor([row])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name.endswith("ForMultipleChoice"):
            inputs = {key: value[:, None] for key, value in inputs.items()}
        elif model.config.is_encoder_decoder and name.endswith(("ForConditionalGeneration", "Model")):
            half = len(row) // 2
            inputs = {key: value[:, :half] for key, value in inputs.items()}
            inputs |= {"decoder_input_ids": ids[:, half:]}
        outputs.append(model(**inputs)[0])
    return outputs
