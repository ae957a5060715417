"""What is proved of a checkpoint before anybody else gets it."""

from __future__ import annotations

import contextlib
import gc
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from ..conversion.target import expected_tensors
from ..errors import UserError
from ..inference.loading import Checkpoint, load_checkpoint
from ..io.checkpoints import ADAPTER, load_config, load_model
from ..io.safetensors_files import read_headers, weight_files
from ..io.text_files import read_json
from ..text.rules import source_begin, source_ids
from ..text.tokenizer import Seq2SeqTokenizer

_VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_TEXT = "The encoder reads this text, and the decoder goes on from it."
_SOURCE_TOKENS, _TARGET_TOKENS, _NEW_TOKENS = 12, 8, 8
# How far the logits of two implementations may be apart, relative to the largest. Weights that are read wrongly give
# differences of the size of the logits.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Validated:
    """A checkpoint that loads, has the tensors of its config and generates.

    Attributes:
        config: its config.
        weights: its files of weights, in the order of their names.
        parameters: how many are in them.
        dtypes: what they are stored in.
        needs_code: whether stock transformers cannot load it, so that its repository has to hold the code.
        generated: what it said to a fixed text.
        chats: whether its tokenizer has a chat template.
        begins: whether what the encoder reads begins with ``<bos>``.
        says: whether its tokenizer does that by itself; one of an older checkpoint does what its original's did.
    """

    config: T5GemmaConfig | AdaptedSeq2SeqConfig
    weights: tuple[Path, ...]
    parameters: int
    dtypes: tuple[str, ...]
    needs_code: bool
    generated: str
    chats: bool
    begins: bool
    says: bool


def validate(folder: Path) -> Validated:
    """Load a checkpoint, compare the shapes of its tensors with its config, generate; one of model type "t5gemma" is
    loaded by stock transformers too, and has to give the same logits there.

    Raises:
        UserError: what of this fails, or the folder holds something else.
    """
    config = _config(folder)
    tensors = read_headers(folder)
    _check_shapes(folder, config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _check_tokenizer(folder)
    checkpoint = load_checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer
    begin = source_begin(tokenizer, config)
    generated = _generate(folder, checkpoint, source_ids(tokenizer, _TEXT, begin))
    needs_code = not isinstance(config, T5GemmaConfig)
    if not needs_code:
        inputs = _inputs(config, checkpoint.model.device)
        own = _logits(checkpoint.model, inputs)
        dtype, device = checkpoint.model.dtype, checkpoint.model.device
        del checkpoint
        gc.collect()  # the two need not be in memory at once
        _check_stock(folder, own, inputs, dtype, device)
    return Validated(
        config,
        tuple(sorted(weight_files(folder))),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        needs_code,
        generated,
        chats=bool(tokenizer.chat_template),
        begins=begin is not None,
        says=isinstance(tokenizer, Seq2SeqTokenizer),
    )


def _config(folder: Path) -> T5GemmaConfig | AdaptedSeq2SeqConfig:
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} is an adapter. Merge it first (t5gemma merge), and publish what comes out.")
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in (T5GemmaConfig.model_type, AdaptedSeq2SeqConfig.model_type):
        raise UserError(
            f"{folder / 'config.json'} is of model type {kind!r}. Only 't5gemma' and 'adapted_seq2seq' are published."
        )
    architecture = " and ".join(raw.get("architectures") or ())
    if not architecture.endswith("ForConditionalGeneration"):
        raise UserError(f"{folder} holds a {architecture or 'model without a class'}. Only those that generate are.")
    if "quantization_config" in raw:
        raise UserError(f"{folder / 'config.json'} describes quantised weights. Publish those that it was made from.")
    config: T5GemmaConfig | AdaptedSeq2SeqConfig = load_config(folder)
    return config


def _check_shapes(folder: Path, config: Any, found: dict[str, tuple[int, ...]]) -> None:
    expected = expected_tensors(config)
    for word, names in (("lacks", expected.keys() - found.keys()), ("has besides", found.keys() - expected.keys())):
        if names:
            raise UserError(f"{folder} {word} {len(names)} tensors such as {sorted(names)[0]}. Save it again, whole.")
    wrong = sorted(name for name in expected if expected[name] != found[name])
    if wrong:
        raise UserError(
            f"{wrong[0]} of {folder} has the shape {found[wrong[0]]}, by its config.json it is "
            f"{expected[wrong[0]]}: the config belongs to other weights."
        )


def _check_tokenizer(folder: Path) -> None:
    config = read_json(folder / "tokenizer_config.json")
    if "tokenizer_class" not in config:
        # Without it transformers takes Gemma's class for this model type, whatever the vocabulary.
        raise UserError(
            f"{folder / 'tokenizer_config.json'} names no tokenizer_class, so others might read the vocabulary "
            "wrongly. Save the tokenizer again (save_pretrained)."
        )
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        # transformers makes a tokenizer of the special tokens alone, and every word becomes an unknown one.
        raise UserError(
            f"{folder} has no {' or '.join(_VOCABULARIES)}, so its tokenizer has no words. Save the tokenizer again "
            "(save_pretrained)."
        )


@torch.no_grad()
def _generate(folder: Path, checkpoint: Checkpoint, source: list[int]) -> str:
    model = checkpoint.model
    ids = torch.tensor([source], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(bool(torch.isfinite(step).all()) for step in out.logits):
        raise UserError(f"{folder} gives logits that are not finite. Publish a checkpoint from before it diverged.")
    text: str = checkpoint.tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    return text


def _inputs(config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens without padding, no more than any window: its far end transformers 5.23 has one token further."""
    generator = torch.Generator().manual_seed(0)
    windows = [stack.sliding_window for stack in (config.encoder, config.decoder) if stack.sliding_window]
    lengths = {"input_ids": min([_SOURCE_TOKENS, *windows]), "decoder_input_ids": min([_TARGET_TOKENS, *windows])}
    drawn = {
        name: torch.randint(0, config.decoder.vocab_size - 1, (1, length), generator=generator)
        for name, length in lengths.items()
    }
    pad = config.decoder.pad_token_id
    return {name: torch.where(ids == pad, ids + 1, ids).to(device) for name, ids in drawn.items()}


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


def _check_stock(
    folder: Path, own: torch.Tensor, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # its module prints what its docstrings lack, when it is imported
        cls = transformers.T5GemmaForConditionalGeneration
    try:
        stock, found = load_model(cls, folder, dtype=dtype, attn_implementation="eager")
    except UserError as error:
        raise UserError(
            f"transformers' own T5Gemma cannot load {folder} ({error}). Give it the model type "
            f"{AdaptedSeq2SeqConfig.model_type!r}, by converting it so."
        ) from error
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
    theirs = _logits(stock.to(device).eval(), inputs)
    difference = (theirs - own).abs().max().item() / own.abs().max().item()
    if wrong or not difference <= _TOLERANCE[dtype]:
        what = f"reads {sorted(map(str, wrong))[0]} otherwise" if wrong else f"gives logits {difference:.1e} apart"
        raise UserError(
            f"transformers' own T5Gemma {what}, relative to the largest, from what {folder} computes here: whoever "
            "loads it without this package gets another model in silence. Convert it to 'adapted_seq2seq'."
        )
