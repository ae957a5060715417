"""Make an encoder a text encoder: contrastive fine-tuning with sentence-transformers' own trainer.

    python examples/embed.py --model.path CHECKPOINT --training.output_dir embedded --training.max_steps 300 \\
        --data.train packages/train.jsonl --data.test packages/test.jsonl

Each query has to find its own document among those of the batch (multiple negatives, arXiv 1705.00652): a package's
title its description. Retrieval from held-out documents is measured before and after. The result loads with
``SentenceTransformer(FOLDER, trust_remote_code=True)``, which is tried at the end, and goes into ``mteb.evaluate``.
Every key can be given on the command line or, with --config FILE, in a YAML file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Features, Value
from jsonargparse import ArgumentParser
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from tqdm import tqdm

from modeling_t5gemma.cli import run
from modeling_t5gemma.embeddings import sentence_transformer
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.post_training.records import load_records, require_columns
from modeling_t5gemma.training.papers import copy_papers
from modeling_t5gemma.training.run_folder import keep_apart
from modeling_t5gemma.training.script import instantiate, on_this_machine

SHOWN = ("accuracy@1", "accuracy@10", "mrr@10", "ndcg@10")


@dataclass
class EncoderSettings:
    """The encoder.

    Attributes:
        path: an encoder-decoder or an encoder, a folder or a Hub repository.
        pooling: "mean" over the tokens or "lasttoken".
        max_seq_length: longer texts are cut to so many tokens.
    """

    path: str
    pooling: Literal["mean", "lasttoken"] = "mean"
    max_seq_length: int = 256


@dataclass
class PairsSettings:
    """Queries and the documents they should find.

    Attributes:
        train, test: .jsonl, .json or .parquet files.
        query, document: their columns.
        tested: queries of the test, and documents to choose from, at most.
    """

    train: str
    test: str
    query: str = "completion"
    document: str = "description"
    tested: int = 1000


@dataclass
class ContrastSettings:
    """The loss.

    Attributes:
        scale: of the cosine similarities before the softmax, the inverse of a temperature.
        mini_batch_size: texts that are encoded at a time, for batches larger than the memory (arXiv 2101.06983); left
            out, the whole batch.
    """

    scale: float = 20.0
    mini_batch_size: int | None = None


@dataclass
class Settings:
    """All sections. ``training`` has the keys of ``SentenceTransformerTrainingArguments``."""

    model: EncoderSettings
    data: PairsSettings
    training: SentenceTransformerTrainingArguments
    contrast: ContrastSettings


def parser() -> ArgumentParser:
    """The command line: --config FILE and every key of every section."""
    made = ArgumentParser(
        description=__doc__, usage="embed.py [--config FILE] [--SECTION.KEY VALUE ...]", allow_abbrev=False
    )
    made.add_argument("--config", action="config", help="a YAML file with these sections")
    made.add_argument("--model", type=EncoderSettings)
    made.add_argument("--data", type=PairsSettings)
    made.add_argument("--contrast", type=ContrastSettings, default=ContrastSettings())
    made.add_argument("--training", type=SentenceTransformerTrainingArguments)
    made.set_defaults(
        {
            **on_this_machine(),
            "training.per_device_train_batch_size": 32,
            "training.learning_rate": 2e-5,
            "training.warmup_steps": 0.1,
            "training.logging_steps": 10,
            "training.save_strategy": "no",
            "training.report_to": "none",
            # A document that is another query's as well would be a wrong negative.
            "training.batch_sampler": BatchSamplers.NO_DUPLICATES.value,
        }
    )
    return made


def settings_of(arguments: list[str] | None = None) -> Settings:
    """The settings of a command line.

    Raises:
        UserError: the training settings don't fit each other.
    """
    given = instantiate(parser(), arguments)
    return Settings(given.model, given.data, given.training, given.contrast)


def embed(settings: Settings) -> dict[str, dict[str, float]]:
    """Measure, train, measure, save, load. Returns the measures ``before`` and ``after``.

    Raises:
        UserError: the model or the data cannot be used.
    """
    output = Path(settings.training.output_dir)
    keep_apart(output, settings.model.path)
    train, test = pairs_of(settings.data, settings.data.train), pairs_of(settings.data, settings.data.test)
    test = test.select(range(min(settings.data.tested, len(test))))
    device = "cpu" if settings.training.use_cpu else None
    model = sentence_transformer(
        settings.model.path,
        settings.model.pooling,
        settings.model.max_seq_length,
        model_kwargs={"dtype": torch.float32},  # what an optimiser can add small steps to
        device=device,
    )
    for name, pairs in (("train", train), ("test", test)):
        if cut := sum(model[0].count_longer(pairs[column]) for column in ("query", "document")):
            tqdm.write(f"{name}: cut {cut} of {2 * len(pairs)} texts to {settings.model.max_seq_length} tokens")
    evaluator = retrieval(test, settings.training.per_device_eval_batch_size)
    before = evaluator(model)
    trainer = SentenceTransformerTrainer(model, settings.training, train_dataset=train, loss=loss_of(model, settings))
    trainer.train()
    # Training in bfloat16 leaves its autocast around the model; what is saved computes without it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    measures = {"before": before, "after": evaluator(model)}
    model.save(str(output))
    copy_papers(settings.model.path, output)
    (output / "retrieval.json").write_text(json.dumps(measures, indent=2) + "\n")
    check_saved(model, output, test["document"][:8], device)
    return measures


def pairs_of(data: PairsSettings, path: str) -> Any:
    """A data set with the columns ``query`` and ``document``, in this order. Pairs that lack a text are left out and
    counted.

    Raises:
        UserError: it cannot be read, a column does not hold texts, or nothing is left.
    """
    records = load_records(path)
    require_columns(records, [data.query, data.document], path)
    chosen = records.select_columns([data.query, data.document])
    chosen = chosen.rename_columns({data.query: "query", data.document: "document"})
    whole = chosen.filter(_both_texts, input_columns=["query", "document"])
    if not len(whole):
        for column in (data.query, data.document):
            if (kind := records.features[column]) != Value("string"):
                raise UserError(f"The column {column!r} of {path} does not hold texts, but {kind}: name another.")
        raise UserError(f"{path} has no pair of two texts in {data.query!r} and {data.document!r}.")
    if len(whole) < len(chosen):
        odd = next(n for n, pair in enumerate(chosen, 1) if not _both_texts(pair["query"], pair["document"]))
        left_out = len(chosen) - len(whole)
        tqdm.write(f"{path}: left out {left_out} of {len(chosen)} pairs, which lack a text; the first: record {odd}")
    return whole.map(lambda pair: pair, features=Features(dict.fromkeys(whole.column_names, Value("string"))))


def _both_texts(query: Any, document: Any) -> bool:
    return all(isinstance(text, str) and text for text in (query, document))


def retrieval(pairs: Any, batch_size: int) -> InformationRetrievalEvaluator:
    """Every query against all documents. Equal documents are one, and right for the queries of each."""
    documents = {text: f"d{number}" for number, text in enumerate(dict.fromkeys(pairs["document"]))}
    queries = {f"q{number}": text for number, text in enumerate(pairs["query"])}
    relevant = {f"q{number}": {documents[text]} for number, text in enumerate(pairs["document"])}
    corpus = {name: text for text, name in documents.items()}
    return InformationRetrievalEvaluator(queries, corpus, relevant, batch_size=batch_size, show_progress_bar=True)


def loss_of(model: SentenceTransformer, settings: Settings) -> torch.nn.Module:
    scale, size = settings.contrast.scale, settings.contrast.mini_batch_size
    if size is None:
        return MultipleNegativesRankingLoss(model, scale=scale)
    return CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=size)


def check_saved(model: SentenceTransformer, folder: Path, texts: list[str], device: str | None) -> None:
    """Make sure that what was saved gives the vectors of what was trained."""
    again = SentenceTransformer(str(folder), trust_remote_code=True, device=device)
    expected = model.encode(texts)
    difference = float(np.linalg.norm(again.encode(texts) - expected) / np.linalg.norm(expected))
    assert difference < 1e-4, f"the saved vectors differ from the trained by {difference:.1e} of their length"


def table(measures: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [f"| held-out retrieval | {' | '.join(SHOWN)} |", "|---|" + "---:|" * len(SHOWN)]
    for when, found in measures.items():
        cells = [f"{found['cosine_' + name]:.3f}" for name in SHOWN]
        lines.append(f"| {when} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    settings = settings_of()
    print(f"\n{table(embed(settings))}\n\nSaved in {settings.training.output_dir}.")


if __name__ == "__main__":
    run(main)
