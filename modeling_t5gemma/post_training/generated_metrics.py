"""Generated answers against the right ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..collators import Layout, Pair
from ..errors import UserError
from ..inference.batching import generate_ids

ROUGE = ("rouge1", "rouge2", "rougeL")
_SHOWN = 400  # characters of a printed text


@dataclass(frozen=True)
class Answering:
    """How answers are generated for measuring.

    Attributes:
        tokenizer, layout: of the model.
        ends: tokens that end an answer.
        count: examples; the first ones.
        samples: how many of them are printed.
        max_new_tokens, num_beams: of generation, which draws nothing at random.
        batch_size: answers generated together.
    """

    tokenizer: Any
    layout: Layout
    ends: Sequence[int]
    count: int
    samples: int
    max_new_tokens: int
    num_beams: int
    batch_size: int

    def measure(self, model: Any, pairs: Sequence[Pair], prints: bool = True) -> dict[str, float]:
        """The metrics of ``score`` on the first pairs.

        Args:
            prints: whether this process prints the samples.
        """
        some = [pairs[number] for number in range(min(self.count, len(pairs)))]
        generated = generate_ids(
            model,
            [self.layout.source(pair).tolist() for pair in some],
            self.layout.pad,
            self.batch_size,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            eos_token_id=list(self.ends),
        )
        answers, references = self._texts(generated), self._texts([pair.target.tolist() for pair in some])
        for number in range(min(self.samples, len(some)) if prints else 0):
            question = self.tokenizer.decode(some[number].source.tolist())
            tqdm.write(
                f"question: {_shortened(question)}\n  answer: {_shortened(answers[number])}\n"
                f"  right: {_shortened(references[number])}"
            )
        return score(answers, references)

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Of each row, up to where its answer ends."""
        ends = set(self.ends)
        answers = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percentages over all answers: ``exact_match``, ROUGE F1 (``rouge1``, ``rouge2``, ``rougeL``, English words,
    stemmed), corpus ``bleu`` and ``chrf``.

    Raises:
        UserError: rouge-score or sacrebleu is not installed.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            f"Measuring generated answers needs {error.name}: pip install modeling_t5gemma[metrics], or set "
            "evaluation.generate to 0."
        ) from error
    assert len(answers) == len(references) > 0
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    equal = [answer == reference for answer, reference in zip(answers, references, strict=True)]
    return {
        "exact_match": 100 * float(np.mean(equal)),
        **{name: 100 * float(np.mean([each[name].fmeasure for each in rouge])) for name in ROUGE},
        "bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(answers), [list(references)]).score,
    }


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
