"""The text of a run: tokenised where it is not yet, cut into windows, some of them held out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from ..errors import UserError
from ..objectives import Schedule
from .documents import Pieces
from .evaluation import HeldOutPair
from .held_out import Remaining
from .mixture import Samples, Source, StreamedSamples, StreamedSource
from .settings import DataSettings, ModelSettings, SourceSettings
from .shards import INDEX, TokenShards
from .sources import TextSource
from .teacher_cache import Taught
from .tokenizing import TokenStream, check_unchanged, tokenize_source, vocabulary_of

SHARD_TOKENS = 1 << 26


def samples_of(
    data: DataSettings, model: ModelSettings, training: TrainingArguments, schedule: Schedule, tokenizer: Any
) -> tuple[Samples | StreamedSamples, list[HeldOutPair], int]:
    """Samples, held-out pairs, and the rows of the whole run.

    Raises:
        UserError: the text cannot be used.
    """
    if not data.sources:
        raise UserError("data.sources is empty: name at least one text.")
    shortest = max(objective.shortest() for _, objective in schedule.stages)
    rows = (
        training.max_steps
        * training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
    )
    if any(source.streaming for source in data.sources):
        return _streamed(data, model.path, schedule, shortest, rows)
    sources: list[Source] = []
    held_out: list[HeldOutPair] = []
    for number, source in enumerate(data.sources):
        pieces: Any = Pieces(_documents(data, model.path, training, source, tokenizer), data.window, shortest)
        if model.teacher_cache:
            if len(data.sources) > 1:
                raise UserError("A teacher's cache is of one source: give data.sources that one alone.")
            pieces = Taught(Path(model.teacher_cache), pieces, vocabulary_of(tokenizer, model.path))
        if number == 0 and data.held_out:
            pieces = Remaining(pieces, data.held_out)
            held_out = pieces.pairs(schedule.stages[-1][1], data.seed)
        sources.append(Source(Path(source.path).name, pieces, source.weight))
    weights = [source.weight for source in sources]
    mean = sum(w * s.pieces.mean_tokens for w, s in zip(weights, sources)) / sum(weights)
    total = rows if data.pack is None else math.ceil(rows * sum(data.pack) / mean)
    return Samples(sources, schedule, data.seed, data.block, total), held_out, rows


def _streamed(
    data: DataSettings, tokenizer_path: str, schedule: Schedule, shortest: int, rows: int
) -> tuple[StreamedSamples, list[HeldOutPair], int]:
    if data.held_out:
        raise UserError(
            "Windows of a stream cannot be held out: its length is not known. Set data.held_out to 0 and "
            "training.eval_strategy to no, or tokenise it first (t5gemma tokenize)."
        )
    sources = [
        StreamedSource(
            Path(source.path).name,
            TokenStream(_text_source(source), tokenizer_path, data.max_bad),
            source.weight,
            data.window,
            shortest,
        )
        for source in data.sources
    ]
    total = rows if data.pack is None else math.ceil(rows * sum(data.pack) / data.window)
    return StreamedSamples(sources, schedule, data.seed, data.block, total), [], rows


def _documents(
    data: DataSettings, tokenizer_path: str, training: TrainingArguments, source: SourceSettings, tokenizer: Any
) -> TokenShards:
    vocabulary = vocabulary_of(tokenizer, tokenizer_path)
    if (Path(source.path) / INDEX).is_file():
        return TokenShards(source.path, vocabulary)
    cache = Path(data.cache or Path(training.output_dir) / "tokens")
    what = json.dumps([asdict(source), vocabulary.fingerprint], sort_keys=True).encode()
    folder = cache / f"{Path(source.path).stem}-{hashlib.sha256(what).hexdigest()[:12]}"
    with training.main_process_first(local=False, desc="tokenising"):
        if (folder / INDEX).is_file():
            check_unchanged(folder, _text_source(source))
        else:
            with tqdm(unit="token", unit_scale=True, desc=f"Tokenising {source.path}", leave=False) as bar:
                result = tokenize_source(
                    _text_source(source),
                    tokenizer_path,
                    folder,
                    processes=max(1, data.workers),
                    shard_tokens=SHARD_TOKENS,
                    max_bad=data.max_bad,
                    progress=_advance(bar),
                )
            if result.skipped:
                tqdm.write(f"{source.path}: skipped {result.skipped}; the first: {'; '.join(result.first_skipped)}")
    shards = TokenShards(folder, vocabulary)
    if not len(shards):
        raise UserError(
            f"{source.path} has no record with a text in {source.column!r}. Name another column, or mend the text and "
            f"remove {folder}."
        )
    return shards


def _advance(bar: Any) -> Callable[[int, int], None]:
    return lambda _, tokens: bar.update(tokens)


def _text_source(source: SourceSettings) -> TextSource:
    return TextSource(
        source.path,
        name=source.name,
        split=source.split,
        column=source.column,
        streaming=source.streaming,
        revision=source.revision,
        weight=source.weight,
    )
