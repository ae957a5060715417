"""A checkpoint to a folder that another runtime loads, measured against the model."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ..configuration_t5gemma import AdaptedSeq2SeqConfig, T5GemmaConfig
from ..errors import UserError
from ..inference.loading import load_checkpoint
from ..io.checkpoints import ADAPTER
from ..io.staging import check_apart, check_output, staged
from ..text.rules import with_rule
from ..training.loading import load_config
from ..training.papers import legal_papers
from .card import write_card
from .decoding import Decoding
from .deviation import Behaviour, Deviation, Model
from .formats import FORMATS, Backend, backend_of, chosen
from .packages import RECORD_FILE
from .samples import TEXTS, halves


@dataclass(frozen=True)
class Export:
    """What was written, as ``export.json`` tells it.

    Attributes:
        format, quantization: as asked for.
        checkpoint: the name of the folder that it was made of.
        decoding: what a program that decodes with it has to know.
        deviation: from the model in float32.
        limits: what the runtime computes otherwise than the model, and when that matters.
        versions: of the packages that wrote and measured it.
    """

    format: str
    quantization: str
    checkpoint: str
    decoding: Decoding
    deviation: Deviation
    limits: list[str]
    versions: dict[str, str]


def export(
    checkpoint: Path,
    output: Path,
    format: str,
    quantization: str | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    overwrite: bool = False,
) -> Export:
    """Write an export, and beside it ``export.json``, a card, the tokenizer, and terms and notices.

    Args:
        checkpoint: the folder of an encoder-decoder.
        output: the folder to write; it is there whole or not at all.
        format, quantization: see ``FORMATS``; left out, weights are stored in float32.
        texts: to measure on: the first half of each is encoded, the second is scored.
        overwrite: replace an export that is at ``output``.

    Raises:
        UserError: the checkpoint is of another kind or one that the runtime cannot represent, a package is missing,
            a text does not fit, or ``output`` is in the way, is no export or holds the checkpoint.
    """
    _check_output(checkpoint, output, overwrite)
    quantization = chosen(format, quantization)
    backend = backend_of(format, quantization)
    _check_kind(checkpoint, backend)
    found = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
    samples = halves(found, texts)
    own = Behaviour.of(Model(found), samples)
    if not own.is_finite():
        raise UserError(f"{checkpoint} gives values that are not finite. Export a checkpoint from before it diverged.")
    config, tokenizer = found.model.config, found.tokenizer
    decoding = Decoding.of(found, "bfloat16" if quantization == "bfloat16" else "float32")
    size = sum(parameter.numel() for parameter in found.model.parameters())
    needed = size * FORMATS[format].quantizations[quantization]
    with staged(output, overwrite=overwrite, needed=needed) as folder:
        with_rule(tokenizer, config).save_pretrained(folder)
        backend.write(found, folder, decoding)
        del found
        gc.collect()  # the model and the export need not be in memory at once
        other = Behaviour.of(backend.load(folder, decoding), samples)
        made = Export(
            format=format,
            quantization=quantization,
            checkpoint=checkpoint.resolve().name,
            decoding=decoding,
            deviation=Deviation.between(own, other, samples),
            limits=backend.limits(config),
            versions={name: version(name) for name in ("torch", "transformers", *FORMATS[format].packages)},
        )
        (folder / RECORD_FILE).write_text(json.dumps(asdict(made), indent=2) + "\n", encoding="utf-8")
        papers = legal_papers(checkpoint)
        for path in papers:
            shutil.copyfile(path, folder / path.name)
        write_card(folder, checkpoint, made, [path.name for path in papers])
    return made


def _check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    check_output(output, overwrite=overwrite)
    check_apart(output, [checkpoint])
    if output.exists() and not (output / RECORD_FILE).is_file():
        raise UserError(f"{output} is no export (it has no {RECORD_FILE}), so --overwrite leaves it alone.")


def _check_kind(checkpoint: Path, backend: Backend) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no folder. Give a checkpoint's (hf download fetches one from the Hub).")
    if (checkpoint / ADAPTER).is_file():
        raise UserError(f"{checkpoint} is an adapter. Merge it first (t5gemma merge), and export what comes out.")
    config = load_config(str(checkpoint))
    if not isinstance(config, T5GemmaConfig | AdaptedSeq2SeqConfig):
        raise UserError(
            f"{checkpoint} is a {config.model_type!r}, no encoder-decoder of this package. Make one of it first "
            "(t5gemma convert)."
        )
    backend.refuse(config, checkpoint)
