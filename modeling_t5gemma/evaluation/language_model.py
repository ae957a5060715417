"""A checkpoint as the harness's language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from ..errors import UserError
from ..inference.batching import generate_ids, text_of
from ..inference.loading import Checkpoint
from ..inference.prompts import longest_prompt
from ..inference.sampling import ends_of, generation_config, pad_token
from .batches import BatchSize, Shape, in_batches
from .scoring import Pair, Score, log_likelihoods
from .texts import Texts

# The harness's own default, for tasks that do not say.
_NEW_TOKENS = 256
BLOCK = 128


class EvaluatedModel(LM):
    """Scores and generates for the harness, which batches nothing itself.

    Args:
        checkpoint: an encoder-decoder or a decoder-only model.
        rows: of a batch at most; found automatically if left out.
        chat: whether contexts are written by the chat template.
        block: tokens that an encoder-decoder scores at a time of a text without a context; see ``Texts.blocks``.

    Attributes:
        backend: "seq2seq" or "causal".
        shortened: how many contexts of each task were cut at their beginning.
        asked: how many requests there were of each task.
        how_cut: how texts without a context are cut into sources and targets.

    Raises:
        UserError: as ``Texts.of``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        rows: int | None = None,
        chat: bool = False,
        block: int = BLOCK,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer = checkpoint.model, checkpoint.tokenizer
        self._device = self._model.device
        self._texts = Texts.of(self._model, self._tokenizer, chat=chat)
        self._pad = pad_token(self._model, self._tokenizer)
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        self.batch_size = BatchSize.of(self._device, vocabulary, rows)
        self.backend = "seq2seq" if self._model.config.is_encoder_decoder else "causal"
        if self.backend == "causal":  # where the cuts are is of no matter, so they are where the logits fit
            block = max(1, min(self.batch_size.logits // vocabulary, self.max_length // 2))
        self._block, self.how_cut = block, self._texts.how_cut(block)
        self.shortened: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    @property
    def max_length(self) -> int:
        """Tokens that are read at most, by an encoder or before a decoder-only model's next one."""
        return longest_prompt(self._model, 0)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; see ``Texts.conversation``."""
        return self._texts.conversation(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether it is the greedy one.

        Raises:
            UserError: a continuation is longer than the model, or a single row does not fit into memory.
        """
        pairs = []
        for request in requests:
            source, target = self._texts.pair(*request.args)
            fitted = self._fitted(
                list(source), max(1, len(target)), f"A continuation of {request.task_name} has", request
            )
            pairs.append(Pair(tuple(fitted), target))
        return [(score.log_likelihood, score.greedy) for score in self._scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each text, all of whose tokens are scored once; ``how_cut`` says given what.

        Raises:
            UserError: a single row does not fit into memory.
        """
        texts = [list(self._texts.blocks(request.args[0], self._block)) for request in requests]
        scores = iter(self._scores([pair for pairs in texts for pair in pairs]))
        return [sum(next(scores).log_likelihood for _ in pairs) for pairs in texts]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model says to each context, greedily, up to a stop string, which is left out.

        Raises:
            UserError: a task asks for drawn text or for more tokens than there are positions, or a single row does not
                fit into memory.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[_Prompt]] = {}
        for number, request in enumerate(requests):
            context, asked = request.args
            stops, new_tokens = _how(asked, str(request.task_name))
            ids = self._fitted(
                self._texts.context(context), new_tokens, f"An answer to {request.task_name} may have", request
            )
            groups.setdefault((stops, new_tokens), []).append(_Prompt(number, ids, new_tokens))
        with tqdm(total=len(requests), unit=" texts", leave=False) as bar:
            for (stops, new_tokens), prompts in groups.items():
                answer = self._generator(stops, new_tokens, answers, bar.update)
                in_batches(sorted(prompts, key=lambda prompt: -len(prompt.ids)), self.batch_size, answer)
        return answers

    def _generator(
        self, stops: tuple[str, ...], new_tokens: int, answers: list[str], progress: Callable[[int], object]
    ) -> Callable[[list[_Prompt]], None]:
        """What does a batch of prompts."""
        ends = self._texts.prompts.turn_ends() if self._texts.chat else ()
        config = generation_config(self._model, self._tokenizer, max_new_tokens=new_tokens, ends=ends)

        def answer(batch: list[_Prompt]) -> None:
            sources = [prompt.ids for prompt in batch]
            read = 1 if self.backend == "seq2seq" else max(map(len, sources))
            criteria = StoppingCriteriaList([_StopAtText(self._tokenizer, stops, read)] if stops else [])
            written = generate_ids(
                self._model, sources, self._pad, len(batch), generation_config=config, stopping_criteria=criteria
            )
            for prompt, ids in zip(batch, written, strict=True):
                text = text_of(self._tokenizer, ids, ends_of(config))
                answers[prompt.number] = postprocess_generated_text(text, list(stops), think_end_token=None)
            progress(len(batch))

        return answer

    def _scores(self, pairs: Sequence[Pair]) -> list[Score]:
        with tqdm(total=len(pairs), unit=" targets", leave=False) as bar:
            return log_likelihoods(self._model, pairs, self._pad, self.batch_size, bar.update)

    def _fitted(self, ids: list[int], new_tokens: int, what: str, request: Instance) -> list[int]:
        fitted = self._texts.fitted(ids, new_tokens, what)
        self.asked[str(request.task_name)] += 1
        self.shortened[str(request.task_name)] += len(fitted) < len(ids)
        return fitted


@dataclass(frozen=True)
class _Prompt:
    """A context of a batch."""

    number: int
    ids: list[int]
    new_tokens: int

    @property
    def shape(self) -> Shape:
        return Shape(1, len(self.ids), self.new_tokens, 1)

    def halves(self) -> list[_Prompt]:
        return []


class _StopAtText(StoppingCriteria):
    """Ends a row whose new text has one of the stops, however it is tokenised.

    Args:
        read: tokens of a row that are not new.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], read: int) -> None:
        self._tokenizer, self._stops, self._read = tokenizer, stops, read
        # A token has a byte at least, and the first one's leading space may be lost.
        self._tail = 1 + max(len(stop.encode()) for stop in stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = self._tokenizer.batch_decode(input_ids[:, self._read :][:, -self._tail :])
        return torch.tensor([any(stop in tail for stop in self._stops) for tail in tails], device=input_ids.device)


def _how(asked: dict[str, Any], task: str) -> tuple[tuple[str, ...], int]:
    """Stop strings and new tokens that a task's ``generation_kwargs`` ask for.

    Raises:
        UserError: they ask for anything but greedy text.
    """
    how = normalize_gen_kwargs(asked, _NEW_TOKENS)
    if (how["do_sample"] and how.get("temperature") != 0) or int(how.get("num_beams") or 1) > 1:
        raise UserError(f"{task} asks for drawn text or beams ({asked}); here all text is greedy. Leave it out.")
    return tuple(stop for stop in how["until"] if stop), how["max_gen_toks"]
