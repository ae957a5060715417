"""The page that goes with an export: what it is, how it is run, how far it is from the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .formats import FORMATS

if TYPE_CHECKING:
    from .export import Export

CARD_FILE = "README.md"
# The card of what was exported: what it says of training, data and risks holds here as well.
SOURCE_CARD_FILE = "MODEL_CARD.md"
_PASSED_ON = ("license", "language", "base_model", "datasets")
_LIBRARIES = {"ctranslate2": "ctranslate2", "torch": "pytorch", "onnx": "onnx"}
_CTRANSLATE2 = """\
import ctranslate2
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
translator = ctranslate2.Translator(folder, device="cpu")
ids = tokenizer("The text that the encoder reads").input_ids
words = tokenizer.convert_ids_to_tokens(ids)
(result,) = translator.translate_batch([words], beam_size=1, max_input_length=0, max_decoding_length=64)
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0])))
"""
_PACKAGES = """\
from modeling_t5gemma.exporting.packages import Packages
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
packages = Packages.load(folder)
ids = tokenizer("The text that the encoder reads", return_tensors="pt").input_ids
print(tokenizer.decode(packages.generate(ids, max_new_tokens=64)[0], skip_special_tokens=True))
"""
_PROGRAMS = """\
Without modeling_t5gemma, load `encoder{suffix}` and `decoder_step{suffix}` with {runtime}.
B is the batch, S the source's length, C how many tokens there is room for, each of any size.

| program | input | | output | |
|---|---|---|---|---|
| encoder | input_ids | int64 (B, S) | cross_keys | ({layers}, B, {heads}, S, {head_dim}) |
| | attention_mask | int64 (B, S), 0 for padding | cross_values | the same |
| decoder_step | input_ids | int64 (B, 1), begin with {start} | logits | (B, vocabulary) |
| | slot | int64 (1,), 0, 1, 2, ... | new_keys | ({layers}, B, {heads}, 1, {head_dim}) |
| | attention_mask | as above | new_values | the same |
| | cross_keys, cross_values | from the encoder | | |
| | keys, values | ({layers}, B, {heads}, C, {head_dim}), zeros at first | | |

After each step write new_keys and new_values into keys and values at the slot. A text ends at {ends}."""


def write_card(folder: Path, checkpoint: Path, export: Export, papers: Sequence[str]) -> None:
    """Write ``README.md``; the checkpoint's own card goes with it under another name.

    Args:
        papers: names of the files with terms and notices.
    """
    data, origin = {}, ""
    source = checkpoint / CARD_FILE
    if source.is_file():
        origin = f" What it is made of and trained on: [{SOURCE_CARD_FILE}]({SOURCE_CARD_FILE})."
        shutil.copyfile(source, folder / SOURCE_CARD_FILE)
        known = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
        data = {key: known[key] for key in _PASSED_ON if key in known}
    tags = [export.format, export.quantization, "encoder-decoder"]
    metadata = ModelCardData(**data, library_name=_LIBRARIES[export.format], tags=tags)
    title = FORMATS[export.format].title
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {export.checkpoint} for {title}, {export.quantization}",
        f"`{export.checkpoint}`, an encoder-decoder, written for {title} by [modeling_t5gemma]"
        f"(https://pypi.org/project/modeling-t5gemma).{origin}",
        "## Use",
        f'```python\nfolder = "where/this/lies"\n\n{_CTRANSLATE2 if export.format == "ctranslate2" else _PACKAGES}```',
        *_programs(export),
        f"## Beside the model in float32\n\n{_table(export.deviation.rows())}",
    ]
    if export.limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in export.limits))
    if papers:
        named = ", ".join(f"`{name}`" for name in papers)
        parts.append(
            f"## Licence\n\nThe weights were modified: stored as {export.quantization} in another format. They stay "
            f"under the terms of what they were made of; whoever passes them on passes on {named}."
        )
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _programs(export: Export) -> list[str]:
    if export.format == "ctranslate2":
        return []
    decoding = export.decoding
    suffix, runtime = {
        "torch": (".pt2", "`torch.export.load(path).module()`"),
        "onnx": (".onnx", "`onnxruntime.InferenceSession(path)`"),
    }[export.format]
    return [
        _PROGRAMS.format(
            suffix=suffix,
            runtime=runtime,
            layers=decoding.layers,
            heads=decoding.heads,
            head_dim=decoding.head_dim,
            start=decoding.start,
            ends=" or ".join(map(str, decoding.ends)),
        )
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows)])
