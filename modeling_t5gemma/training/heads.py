"""Losses over a large vocabulary, a chunk of tokens at a time.

At a vocabulary of 262,144 the logits of one token are 1 MB in float32, so those of a batch must never exist at once.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Head:
    """The last step of a language model.

    Attributes:
        weight: (V, D), frozen.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
    """

    weight: torch.Tensor
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> Head:
        """A model's head, its weight cast once instead of at every call of autocast."""
        stack = model.config.get_text_config(decoder=True)
        weight = model.get_output_embeddings().weight.detach().to(dtype)
        return cls(weight, getattr(stack, "final_logit_softcapping", None))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, D) to float32 logits (N, V), softcapped."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight).float()
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def hidden_gradient(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient (N, D) of what has the gradient (N, V), overwritten, with respect to these ``logits``."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)
        return gradient.to(self.weight.dtype) @ self.weight


def cross_entropies(hidden: torch.Tensor, head: Head, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    """Cross-entropy of each label in nats, float32 (N,), from hidden states (N, D), without a graph."""
    losses = []
    with torch.no_grad():
        for h, label in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            losses.append(F.cross_entropy(head.logits(h), label, reduction="none"))
    return torch.cat(losses)


def distillation_backward(
    student_hidden: torch.Tensor, student: Head, teacher_hidden: torch.Tensor, teacher: Head, chunk: int
) -> torch.Tensor:
    """Mean forward KL at temperature 1 between two models on the same tokens, and its backward pass.

    The gradient with respect to the student's hidden states, p_student - p_teacher times the head, is formed chunk by
    chunk, each chunk's logits gone before the next one's; then it goes down the model in one piece. The result is
    that of the dense computation.

    Args:
        student_hidden: (N, D) with a graph.
        teacher_hidden: (N, D'), of the same tokens.
        chunk: how many tokens' logits exist at once; 5 arrays of (chunk, V) float32 at the peak.

    Returns:
        The mean KL in nats, float32 scalar without a graph.
    """
    gradient = torch.empty_like(student_hidden, dtype=torch.float32)
    total = torch.zeros((), device=student_hidden.device)
    chunks = (gradient.split(chunk), student_hidden.detach().split(chunk), teacher_hidden.detach().split(chunk))
    with torch.no_grad():
        for out, s, t in zip(*chunks, strict=True):
            expected = teacher.logits(t).log_softmax(dim=-1)
            logits = student.logits(s)
            found = logits.log_softmax(dim=-1)
            probabilities = expected.exp()
            total += torch.dot(probabilities.view(-1), expected.sub_(found).view(-1))
            out.copy_(student.hidden_gradient(found.exp_().sub_(probabilities), logits))
    student_hidden.backward((gradient / len(gradient)).to(student_hidden.dtype))
    return total / len(gradient)
