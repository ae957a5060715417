"""Compare tuned checkpoints, encoder-decoders and decoder-only models, on held-out questions.

    python examples/compare.py packages/test.jsonl --output compared \\
        --model encoder-decoder=runs/ed-0 --model encoder-decoder=runs/ed-1 --model decoder-only=runs/do-0

Checkpoints with one label are one way of making a model, tuned with several seeds. Each answers greedily and is timed
in a process of its own. What was measured once is kept in the output folder and not measured again. Then follow

- ROUGE-L F1 (stemmed English words), chrF and exact match, in percent, means over seeds. The interval around ROUGE-L
  is the middle 95% of a bootstrap that draws examples and, where there are several, seeds. A difference draws the same
  for both sides (the paired bootstrap, https://aclanthology.org/W04-3250),
- the first token's latency: one question, until ``generate`` returns one token, with all it does before,
- tokens a second after the first, one question at a time, the end of an answer not allowed; both are medians,
- answers a second with a batch, to the end of each answer,
- memory: the weights, and the peak of anonymous memory (RssAnon) above them while a batch is answered.

The table is printed and written as ``compared.md``, everything as ``compared.json``.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from tqdm import tqdm

import modeling_t5gemma  # noqa: F401  # registers the models with the Auto classes
from modeling_t5gemma.cli import run
from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.inference.batching import generate_ids
from modeling_t5gemma.post_training.encoding import Example
from modeling_t5gemma.post_training.records import UNUSABLE, load_records, require_columns
from modeling_t5gemma.post_training.rendering import Renderer
from modeling_t5gemma.training.loading import layout_of, load_model
from modeling_t5gemma.training.settings import ModelSettings
from modeling_t5gemma.training.tokenizing import load_tokenizer

Scores = npt.NDArray[np.float64]
FIRST_SENTENCE = "first sentence of the question"
RESAMPLES = 2000


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Setup:
    """What every checkpoint is asked, and how.

    Attributes:
        test: records with ``prompt`` and ``completion``.
        limit: the first so many of them.
        max_source, max_target: tokens of a question and of an answer, as in training.
        batch_size: questions answered together.
        dtype: of the weights.
        timed: questions that are answered alone, for the times.
        new_tokens: tokens of each of those answers.
    """

    test: str
    limit: int
    max_source: int
    max_target: int
    batch_size: int
    dtype: str
    timed: int
    new_tokens: int


@dataclass(frozen=True)
class Asked:
    """A checkpoint ready to answer: token ids of all questions, and what ends an answer."""

    model: Any
    tokenizer: Any
    sources: list[list[int]]
    cut: int
    pad: int
    ends: list[int]

    @classmethod
    def of(cls, checkpoint: str, setup: Setup) -> Asked:
        """Render the questions as training did.

        Raises:
            UserError: the checkpoint or the records cannot be read.
        """
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(ModelSettings(checkpoint, dtype=DType(setup.dtype).value)).eval()
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        renderer = Renderer(tokenizer, max_source=setup.max_source, max_target=setup.max_target)
        layout = layout_of(model, tokenizer)
        rendered = [renderer.source(prompt) for prompt, _ in read_test(setup)]
        nothing = np.zeros(0, np.int32)
        sources = [layout.source(Example(each.ids, nothing, "")).tolist() for each in rendered]
        return cls(model, tokenizer, sources, sum(each.cut > 0 for each in rendered), layout.pad, renderer.ends())

    def answer(self, sources: Sequence[list[int]], batch_size: int, **generation: Any) -> list[list[int]]:
        return generate_ids(
            self.model, sources, self.pad, batch_size, do_sample=False, eos_token_id=self.ends, **generation
        )


def main(
    test: Annotated[str, typer.Argument(help="A .jsonl file with the columns prompt and completion.")],
    model: Annotated[list[str], typer.Option(help="LABEL=CHECKPOINT; again for every checkpoint.")],
    output: Annotated[Path, typer.Option(help="Where everything is written.")],
    limit: Annotated[int, typer.Option(help="Questions at most.")] = 1000,
    max_source: Annotated[int, typer.Option(help="Tokens of a question, as in training.")] = 384,
    max_target: Annotated[int, typer.Option(help="Tokens of an answer.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    dtype: Annotated[DType, typer.Option(help="What weights are loaded in.")] = DType.float32,
    timed: Annotated[int, typer.Option(help="Questions answered alone, for the times.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each of those answers.")] = 32,
) -> None:
    """Answer held-out questions with every checkpoint, and write a table."""
    checkpoints = labelled(model)
    setup = Setup(test, limit, max_source, max_target, batch_size, dtype.value, timed, new_tokens)
    records = read_test(setup)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for label, folders in checkpoints.items():
        results[label] = []
        for number, folder in enumerate(folders):
            print(f"{label}, {folder}", flush=True)
            results[label].append(measured(folder, setup, output / f"{label}-{number}.json"))
    summary = compare(results, [prompt for prompt, _ in records], [completion for _, completion in records])
    (output / "compared.json").write_text(json.dumps({"setup": asdict(setup), **summary}, indent=2) + "\n")
    (output / "compared.md").write_text(table(summary))
    print(f"\n{table(summary)}")


def labelled(given: Sequence[str]) -> dict[str, list[str]]:
    """The checkpoints of each label, in the order given.

    Raises:
        UserError: one has no label, or a label that cannot name a file.
    """
    checkpoints: dict[str, list[str]] = {}
    for each in given:
        label, _, folder = each.partition("=")
        if not re.fullmatch(r"[\w.+-]+", label) or not folder:
            raise UserError(f"--model is {each!r}; it has to be LABEL=CHECKPOINT, such as decoder-only=runs/do-0.")
        checkpoints.setdefault(label, []).append(folder)
    return checkpoints


def read_test(setup: Setup) -> list[tuple[str, str]]:
    """Questions and right answers.

    Raises:
        UserError: they cannot be read.
    """
    records = load_records(setup.test)
    require_columns(records, ["prompt", "completion"], setup.test)
    if UNUSABLE in records.column_names:
        reasons = ((number, reason) for number, reason in enumerate(records[UNUSABLE], 1) if reason)
        raise UserError("{}: record {} is {}. Correct it.".format(setup.test, *next(reasons)))
    records = records.select(range(min(setup.limit, len(records))))
    return list(zip(records["prompt"], records["completion"], strict=True))


# Measuring


def measured(folder: str, setup: Setup, file: Path) -> dict[str, Any]:
    """What a file has of this checkpoint and this setup; measured and written first, unless it is there."""
    identity = {"checkpoint": folder, "setup": asdict(setup), "weights": _weights(folder)}
    if file.exists() and (held := json.loads(file.read_text()))["identity"] == identity:
        return dict(held)
    result = {"identity": identity, **in_own_process(answer_and_time, folder, setup)}
    result["working_bytes"] = in_own_process(working_bytes, folder, setup, for_memory=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)
    return result


def answer_and_time(folder: str, setup: Setup) -> dict[str, Any]:
    """All answers of a checkpoint, and its times."""
    asked = Asked.of(folder, setup)
    seconds = _times(asked, setup)
    begin = time.perf_counter()
    with tqdm(total=len(asked.sources), desc="Answering", leave=False) as bar:
        generated = asked.answer(asked.sources, setup.batch_size, max_new_tokens=setup.max_target, progress=bar.update)
    took = time.perf_counter() - begin
    texts = [asked.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generated]
    parameters = {id(each): each for each in asked.model.parameters()}.values()
    return {
        "answers": texts,
        "questions_cut": asked.cut,
        "source_tokens": statistics.median(map(len, asked.sources)),
        "parameters": sum(each.numel() for each in parameters),
        "weight_bytes": sum(each.nbytes for each in parameters),
        "answers_per_second": len(texts) / took,
        **seconds,
    }


def _times(asked: Asked, setup: Setup) -> dict[str, list[float]]:
    """Each timed question's seconds to the first token, and to each one after it."""
    count = min(setup.timed, len(asked.sources))
    chosen = [asked.sources[number * len(asked.sources) // count] for number in range(count)]

    def seconds(source: list[int], tokens: int) -> float:
        begin = time.perf_counter()
        asked.answer([source], 1, min_new_tokens=tokens, max_new_tokens=tokens)
        return time.perf_counter() - begin

    for source in chosen[:2]:  # the first calls make what later ones find made
        seconds(source, 2)
    first, later = [], []
    for source in chosen:
        first.append(seconds(source, 1))
        later.append((seconds(source, 1 + setup.new_tokens) - first[-1]) / setup.new_tokens)
    return {"first_token_seconds": first, "next_token_seconds": later}


def working_bytes(folder: str, setup: Setup) -> int:
    """The peak of anonymous memory above that of the loaded model, while the longest questions are answered."""
    asked = Asked.of(folder, setup)
    longest = sorted(asked.sources, key=len)[-setup.batch_size :]
    return peak_bytes(lambda: asked.answer(longest, setup.batch_size, max_new_tokens=setup.max_target))


def _weights(folder: str) -> list[list[Any]]:
    """Names, sizes and times of a folder's weights, by which a checkpoint that was made anew is known."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


# Scoring


def compare(
    results: dict[str, list[dict[str, Any]]], questions: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Scores and times of each label, and the difference of each pair of labels."""
    answers = {label: [result["answers"] for result in some] for label, some in results.items()}
    answers[FIRST_SENTENCE] = [[first_sentence(question) for question in questions]]
    scores = {label: np.array([rouge_l(each, references) for each in some]) for label, some in answers.items()}
    means = {label: resampled(each) for label, each in scores.items()}
    rows = {
        label: {
            "seeds": len(scores[label]),
            "rouge_l": float(scores[label].mean()),
            "rouge_l_interval": interval(means[label]),
            "rouge_l_by_seed": scores[label].mean(axis=1).tolist(),
            "chrf": statistics.mean(chrf(each, references) for each in some),
            "exact_match": statistics.mean(exact_match(each, references) for each in some),
            **(costs(results[label]) if label in results else {}),
        }
        for label, some in answers.items()
    }
    labels = list(results)
    differences = [
        {
            "of": first,
            "to": second,
            "rouge_l": float(scores[first].mean() - scores[second].mean()),
            "rouge_l_interval": interval(means[first] - means[second]),
        }
        for place, first in enumerate(labels)
        for second in labels[place + 1 :]
    ]
    return {"examples": len(references), "models": rows, "differences": differences}


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Each answer's ROUGE-L F1 in percent.

    Raises:
        UserError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("Comparing answers needs rouge-score: pip install modeling_t5gemma[metrics].") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(answers, references, strict=True)
    return [100 * scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF, of 100."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(answers), [list(references)]).score)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Percent."""
    return 100 * statistics.mean(answer == right for answer, right in zip(answers, references, strict=True))


def resampled(scores: Scores, resamples: int = RESAMPLES) -> Scores:
    """Bootstrap means, (resamples,), of scores (seeds, examples).

    What a resample draws depends on nothing but its number and the shape, so two models' resamples can be subtracted.
    """
    seeds, examples = scores.shape
    draw_examples, draw_seeds = np.random.default_rng(0), np.random.default_rng(1)
    means = np.empty(resamples)
    for number in range(resamples):
        chosen = draw_examples.integers(0, examples, examples)
        means[number] = scores[draw_seeds.integers(0, seeds, seeds)][:, chosen].mean()
    return means


def interval(means: Scores) -> list[float]:
    """The middle 95%."""
    return [float(each) for each in np.quantile(means, [0.025, 0.975])]


def first_sentence(text: str) -> str:
    """What stands before the first full stop or blank line: a summary that needs no model."""
    return re.split(r"(?<=\.)\s|\n\s*\n", text.strip(), maxsplit=1)[0]


def costs(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over all timed questions of all seeds, and over seeds."""
    return {
        "parameters": results[0]["parameters"],
        "weight_bytes": results[0]["weight_bytes"],
        "working_bytes": statistics.median(each["working_bytes"] for each in results),
        "first_token_seconds": statistics.median(s for each in results for s in each["first_token_seconds"]),
        "tokens_per_second": 1 / statistics.median(s for each in results for s in each["next_token_seconds"]),
        "answers_per_second": statistics.median(each["answers_per_second"] for each in results),
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown."""
    head = ["model", "seeds", "ROUGE-L", "95% interval", "by seed", "chrF", "exact"]
    head += ["parameters", "first token", "tokens/s", "answers/s", "weights", "working memory"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for label, row in summary["models"].items():
        low, high = row["rouge_l_interval"]
        cells = [label, str(row["seeds"]), f"{row['rouge_l']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells += [", ".join(f"{each:.2f}" for each in row["rouge_l_by_seed"])]
        cells += [f"{row['chrf']:.2f}", f"{row['exact_match']:.1f}%"]
        lines.append(cells + (_cost_cells(row) if "parameters" in row else [""] * 6))
    told = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    told += f"\n{summary['examples']} questions.\n"
    for each in summary["differences"]:
        low, high = each["rouge_l_interval"]
        told += f"ROUGE-L of {each['of']} less {each['to']}: {each['rouge_l']:+.2f} ({low:+.2f} to {high:+.2f}).\n"
    return told


def _cost_cells(row: dict[str, float]) -> list[str]:
    return [
        f"{row['parameters'] / 1e6:,.1f}M",
        f"{1000 * row['first_token_seconds']:.0f} ms",
        f"{row['tokens_per_second']:.1f}",
        f"{row['answers_per_second']:.2f}",
        f"{row['weight_bytes'] / 1e9:.2f} GB",
        f"{row['working_bytes'] / 1e6:,.0f} MB",
    ]


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run(app)
