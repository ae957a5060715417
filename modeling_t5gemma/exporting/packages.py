"""The two programs in files, for torch or for ONNX Runtime (the ``export`` extra), and the loop around them.

Shapes as in ``programs``.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import UserError
from ..inference.loading import Checkpoint
from .decoding import Decoding
from .programs import ENCODER_INPUTS, ENCODER_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, empty_cache, make_programs

RECORD_FILE = "export.json"
ENCODER, STEP = "encoder", "decoder_step"
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
Program = Callable[..., tuple[torch.Tensor, ...]]


class TwoPrograms:
    """The formats ``torch`` and ``onnx``: they differ in the files and in what runs them."""

    def __init__(self, format: str, quantization: str) -> None:
        self._format, self._dtype = format, getattr(torch, quantization)

    def refuse(self, config: Any, path: Path) -> None:
        """A decoder with layers that read no source: the programs hand over as many keys for every layer."""
        if None in (config.cross_attention_map or ()):
            raise UserError(
                f"{path} has decoder layers that read no source (None in cross_attention_map), which no format can "
                "represent yet. Export a checkpoint whose encoder keeps a layer for each."
            )

    def limits(self, config: Any) -> list[str]:
        heads = config.encoder.num_attention_heads
        return [
            f"A layer's attention scores exist whole: {heads} x N x N numbers for a source of N tokens. It matters "
            "for the memory that long sources take."
        ]

    def write(self, checkpoint: Checkpoint, folder: Path, decoding: Decoding) -> None:
        config = checkpoint.model.config.to_diff_dict()
        config.pop("auto_map", None)  # the code that it names is in the programs
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_programs(*make_programs(checkpoint.model.to(self._dtype), decoding), folder, self._format)

    def load(self, folder: Path, decoding: Decoding) -> Packages:
        return Packages(folder, self._format, decoding)


def save_programs(encoder: ExportedProgram, step: ExportedProgram, folder: Path, format: str) -> None:
    """Write both programs with their weights. A matrix that both need is in both."""
    for name, program, inputs, outputs in (
        (ENCODER, encoder, ENCODER_INPUTS, ENCODER_OUTPUTS),
        (STEP, step, STEP_INPUTS, STEP_OUTPUTS),
    ):
        path = folder / f"{name}{SUFFIXES[format]}"
        if format == "torch":
            torch.export.save(program, path)
        else:
            _save_onnx(program, path, inputs, outputs)


class Packages:
    """An export of format ``torch`` or ``onnx`` that generates."""

    def __init__(self, folder: Path, format: str, decoding: Decoding) -> None:
        load = _load_torch if format == "torch" else _load_onnx
        self._encode = load(folder / f"{ENCODER}{SUFFIXES[format]}")
        self._step = load(folder / f"{STEP}{SUFFIXES[format]}")
        self.decoding = decoding

    @classmethod
    def load(cls, folder: str | Path) -> Packages:
        """An export that ``t5gemma export`` wrote.

        Raises:
            UserError: the folder holds none, or ONNX Runtime is needed and not installed.
        """
        path = Path(folder) / RECORD_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged. Give a folder that `t5gemma export` wrote.") from error
        if record["format"] not in SUFFIXES:
            raise UserError(f"{folder} is an export for {record['format']}, which has a runtime of its own.")
        return cls(Path(folder), record["format"], Decoding(**record["decoding"]))

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, max_new_tokens: int
    ) -> torch.Tensor:
        """The likeliest token after the likeliest token, as the model's own ``generate`` gives them.

        Args:
            input_ids: int64 (B, S).
            attention_mask: int64 (B, S), 1 where a token is no padding; inferred from the padding token if left out.

        Returns:
            int64 (B, 1 + T), T at most ``max_new_tokens``: the start, then what was decoded; behind an end, padding.
        """
        begin, ends = self.decoding.start, torch.tensor(self.decoding.ends)
        if attention_mask is None:
            attention_mask = (input_ids != self.decoding.pad).long()
        decoder = _Decoder(
            self._step, self._encode(input_ids, attention_mask), attention_mask, self.decoding, max_new_tokens
        )
        tokens = [input_ids.new_full((len(input_ids),), begin)]
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        while len(tokens) <= max_new_tokens and not bool(ended.all()):
            likeliest = decoder.next(tokens[-1]).argmax(-1)
            tokens.append(likeliest.masked_fill(ended, self.decoding.pad))
            ended |= torch.isin(tokens[-1], ends)
        return torch.stack(tokens, dim=1)

    @torch.no_grad()
    def log_probs(self, source: Sequence[int], target: Sequence[int]) -> list[float]:
        """The log-probability of each target token in nats, given the source and the target before it."""
        ids = torch.tensor([source])
        mask = torch.ones_like(ids)
        decoder = _Decoder(self._step, self._encode(ids, mask), mask, self.decoding, len(target))
        found = []
        for before, token in zip([self.decoding.start, *target], target):
            logits = decoder.next(torch.tensor([before]))
            found.append(logits.float().log_softmax(-1)[0, token].item())
        return found

    def greedy(self, source: Sequence[int], count: int) -> list[int]:
        """At most ``count`` likeliest tokens one after the other, up to and with one that ends a text."""
        ids = torch.tensor([source])
        tokens: list[int] = self.generate(ids, torch.ones_like(ids), max_new_tokens=count)[0, 1:].tolist()
        return tokens


class _Decoder:
    """The step's program with its cache, from the first token on."""

    def __init__(
        self,
        step: Program,
        cross: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor,
        decoding: Decoding,
        slots: int,
    ) -> None:
        self._step = step
        self._source = (attention_mask, *cross)
        self._keys, self._values = empty_cache(decoding, len(attention_mask), slots)
        self._slot = 0

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of what comes after ``tokens``, int64 (B,), which follow those of the call before."""
        slot = torch.tensor([self._slot])
        logits, keys, values = self._step(tokens[:, None], slot, *self._source, self._keys, self._values)
        self._keys[:, :, :, self._slot] = keys[:, :, :, 0]
        self._values[:, :, :, self._slot] = values[:, :, :, 0]
        self._slot += 1
        return logits


def _load_torch(path: Path) -> Program:
    program: Program = torch.export.load(path).module()
    return program


def _load_onnx(path: Path) -> Program:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs ONNX Runtime: pip install modeling_t5gemma[export].") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(None, arrays))

    return run


def _save_onnx(program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Weights go into a file beside it: a protocol buffer ends at 2 GB."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells which operators of torchvision it goes without
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(
                program, (), path, dynamo=True, external_data=True, verbose=False,
                input_names=list(inputs), output_names=list(outputs),
            )  # fmt: skip
    finally:
        log.setLevel(level)
