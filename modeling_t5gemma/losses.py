"""Losses over a large vocabulary, straight from hidden states and head weight.

At 256,000 words the float32 logits of one token are 1 MB, and training with dense logits keeps five or more copies of
them for every token of the batch. Here logits exist for one chunk of tokens at a time, and the gradient takes their
place in the same memory while they are there: the forward pass ends with the gradients of hidden states and weight,
the backward pass only hands them on. Three products of the size of the head for cross-entropy, four for distillation,
and nothing is computed twice.

Shapes: N tokens, D width of the student, E width of the teacher, V vocabulary, C tokens in a chunk, R rows of a chunk
that stay in cache, K samples of a teacher's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

# The logits of a chunk take at most this much memory where the head has a gradient, whose sum over chunks is read and
# written again for each; otherwise a quarter, as fresh memory costs time too. In half precision a third more, as that
# sum is kept in float32 and takes memory where one chunk needs none.
CHUNK_BYTES = 3 * 2**27
# The element-wise passes go over so many logits at a time: on a CPU such that they stay in its cache, on an
# accelerator such that there are few of them.
TILE_ELEMENTS, ACCELERATOR_TILE_ELEMENTS = 2**18, 2**26


@dataclass(frozen=True, eq=False)
class LossParts:
    """A loss with a graph and what it consists of, float32 scalars without one; in nats a token.

    Attributes:
        total: what to train on.
        cross_entropy: against the labels.
        distillation: the divergence from the teacher, times the square of the temperature; None without a teacher.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class TeacherTarget:
    """What a teacher thinks of the same tokens, kept as its hidden states: a few KB a token where logits are 1 MB.

    Attributes:
        hidden: (N, E), the teacher's final hidden states at the positions that predict the labels which are not
            ignored, in the labels' order.
        weight: (V, E), its head.
        softcap: of its logits, or None.
        divergence: "forward_kl" is KL(teacher || student), whose gradient is that of cross-entropy against the
            teacher's distribution ("Encoder-Decoder Gemma", arXiv 2504.06225, section 3); "reverse_kl" is
            KL(student || teacher); "jensen_shannon" is the mean of both against their even mixture.
        temperature: divides both sides' logits. The divergence is multiplied by its square, so that the gradient keeps
            its size (Hinton et al., arXiv 1503.02531).
        share: the weight of the divergence; cross-entropy against the labels has 1 - share.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    softcap: float | None = None
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class SampledTarget:
    """Samples of a teacher's distribution instead of it: an unbiased estimate of the cross-entropy against it (arXiv
    2503.16870), where the k likeliest words would be a biased one.

    Attributes:
        ids: int64 (N, K), words drawn from the teacher.
        weights: float32 (N, K), what each counts; they sum to 1 in a row, and words with weight 0 count nothing.
        share: as in ``TeacherTarget``; the reported distillation is a cross-entropy, not a divergence.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    share: float = 1.0


Target = TeacherTarget | SampledTarget


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not ``IGNORED``, in nats, for a caller who wants the logits too.

    Rows with an ignored label are dropped before anything is cast to float32.

    Args:
        logits: float (..., V), already aligned with the labels.
        labels: int64 (...).
        num_items_in_batch: what to divide the sum by instead of this batch's own number of labels, so that
            micro-batches of an accumulated batch weigh by their tokens.

    Returns:
        float32 scalar; 0 with a graph when every label is ignored.
    """
    kept = labels != IGNORED
    total = F.cross_entropy(logits[kept].float(), labels[kept].to(logits.device), reduction="sum")
    return total / _count(kept, num_items_in_batch, total.device)


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    target: Target | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> LossParts:
    """Cross-entropy, and distillation where there is a target, from hidden states: the dense result without logits.

    Products are computed in the type of ``hidden`` (under autocast in its type), everything else in float32 (float64
    for float64). Rows with an ignored label never reach the head.

    Args:
        hidden: float (..., D), final hidden states, already aligned with the labels.
        weight: float (V, D), the head.
        labels: int64 (...), ``IGNORED`` where there is nothing to learn.
        softcap: logits become softcap * tanh(logits / softcap).
        target: what a teacher thinks of the labels that are not ignored.
        num_items_in_batch: what to divide the sums by instead of the number of labels that are not ignored.

    Raises:
        ValueError: the target has not one row for each label that is not ignored, or its vocabulary is another one.
    """
    labels = labels.to(hidden.device)
    kept = labels != IGNORED
    hidden, labels = hidden[kept], labels[kept]
    _check(target, hidden, weight)
    count = _count(kept, num_items_in_batch, hidden.device)
    total, hard, soft = _LinearLoss.apply(hidden, weight, labels, softcap, target, _product_dtype(hidden))
    return LossParts(total / count, hard.detach() / count, None if target is None else soft.detach() / count)


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The cross-entropy of each label in nats, float32 (..., ) (float64 for float64), 0 where ignored: minus the
    log-probability.

    For losses that are no plain mean, such as those of preferences and rewards. Where a gradient is asked for, the
    logits are computed a second time for it, so there are never more than a chunk's.

    Args:
        hidden: float (..., D), already aligned with the labels.
        weight: float (V, D).
        labels: int64 (...).
        temperature: divides the logits, after the softcap.
    """
    labels = labels.to(hidden.device)
    kept = labels != IGNORED
    losses: torch.Tensor = _TokenLosses.apply(
        hidden[kept], weight, labels[kept], softcap, temperature, _product_dtype(hidden)
    )
    return losses.new_zeros(labels.shape).masked_scatter(kept, losses)


class _TokenLosses(torch.autograd.Function):
    """The losses of N labels. What is made of them decides the gradient, so it is formed in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        temperature: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rest = softcap, temperature, dtype
        wide = torch.promote_types(torch.float32, hidden.dtype)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        for _, logits_CV, places in _chunks_of_logits(hidden, weight, dtype, head_gradient=False):
            for rows in _tiles(logits_CV):
                z_RV = _capped(logits_CV[rows].to(wide, copy=True), softcap).div_(temperature)
                own = labels[places][rows]
                losses[places][rows] = z_RV.logsumexp(dim=-1) - z_RV.gather(1, own[:, None])[:, 0]
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        softcap, temperature, dtype = ctx.rest
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight) if of_weight and not len(hidden) else None
        operand = hidden.detach().to(dtype)
        for student, logits_CV, places in _chunks_of_logits(hidden, weight, dtype, of_weight):
            for rows in _tiles(logits_CV):
                z_RV = _capped(logits_CV[rows].to(grad.dtype, copy=True), softcap)
                gradient_RV = (z_RV / temperature).softmax(dim=-1)
                own = labels[places][rows][:, None]
                gradient_RV.scatter_add_(1, own, torch.full_like(own, -1, dtype=grad.dtype))
                gradient_RV.mul_(grad[places][rows][:, None] / temperature)
                logits_CV[rows] = _through_softcap(gradient_RV, z_RV, softcap)
            if grad_hidden is not None:
                grad_hidden[places] = logits_CV @ student
            if of_weight:
                single = len(logits_CV) == len(hidden)
                grad_weight = _add_product(grad_weight, logits_CV, operand[places], weight.dtype, single)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 4


def _chunks_of_logits(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, head_gradient: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """The weight in the type of the products, a chunk's logits before the softcap, and which rows they are of."""
    student, operand = weight.detach().to(dtype), hidden.detach().to(dtype)
    rows = _rows_of_a_chunk(len(hidden), student, head_gradient)
    buffer = student.new_empty((rows, len(student)))
    for chunk in _slices(len(hidden), rows):
        yield student, torch.mm(operand[chunk], student.T, out=buffer[: chunk.stop - chunk.start]), chunk


class _LinearLoss(torch.autograd.Function):
    """Sums over tokens: of what is trained on, of cross-entropy, of distillation. Only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        target: Target | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rest = softcap, target, dtype, ctx.needs_input_grad[:2]
        sums, ctx.gradients = _sums_and_gradients(hidden, weight, labels, *ctx.rest)
        total, hard, soft = sums.unbind()
        ctx.mark_non_differentiable(hard := hard.clone(), soft := soft.clone())
        return total.clone(), hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place and given away, as they are large. A second pass, which is rare, computes them again.
        gradients = ctx.gradients or _sums_and_gradients(*ctx.saved_tensors, *ctx.rest)[1]
        ctx.gradients = None
        return *(None if each is None else each.mul_(grad.to(each.dtype)) for each in gradients), *[None] * 4


def _sums_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    target: Target | None,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The three sums, and the gradients of the first with respect to hidden states and weight, where wanted."""
    operand = hidden.detach().to(dtype)
    teacher = target.weight.detach() if isinstance(target, TeacherTarget) else None
    wide = torch.promote_types(torch.float32, hidden.dtype)
    sums = torch.zeros(3, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] and not len(hidden) else None
    taught_buffer: torch.Tensor | None = None
    for student, logits_CV, chunk in _chunks_of_logits(hidden, weight, dtype, wanted[1]):
        taught_CV = None
        if isinstance(target, TeacherTarget):
            assert teacher is not None
            if taught_buffer is None:
                taught_buffer = torch.empty_like(logits_CV, dtype=teacher.dtype)
            states = target.hidden[chunk].to(teacher.dtype)
            taught_CV = torch.mm(states, teacher.T, out=taught_buffer[: len(states)])
        for rows in _tiles(logits_CV):
            place = slice(chunk.start + rows.start, chunk.start + rows.stop)
            taught_RV = None if taught_CV is None else taught_CV[rows]
            tile = _Tile(logits_CV[rows], taught_RV, labels[place], place, wide)
            sums += _losses_to_gradients(tile, softcap, target)
        if grad_hidden is not None:
            grad_hidden[chunk] = logits_CV @ student
        if wanted[1]:
            single = len(logits_CV) == len(hidden)
            grad_weight = _add_product(grad_weight, logits_CV, operand[chunk], weight.dtype, single)
    return sums, (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some rows: their logits before the softcap, to be overwritten with the gradient, the teacher's, the labels."""

    logits_RV: torch.Tensor
    taught_RV: torch.Tensor | None
    labels: torch.Tensor
    place: slice
    dtype: torch.dtype


def _losses_to_gradients(tile: _Tile, softcap: float | None, target: Target | None) -> torch.Tensor:
    """Put the gradient in the place of the logits.

    Returns:
        (3,): the sums over the rows of what is trained on, of cross-entropy, of distillation.
    """
    share = 0.0 if target is None else target.share
    z_RV = _capped(tile.logits_RV.to(tile.dtype, copy=True), softcap)
    log_p_RV = torch.log_softmax(z_RV, dim=-1)
    places = tile.labels[:, None]
    hard = -log_p_RV.gather(1, places).sum()
    soft = torch.zeros_like(hard)
    if isinstance(target, TeacherTarget):
        assert tile.taught_RV is not None
        u_RV = _capped(tile.taught_RV.to(tile.dtype, copy=True), target.softcap)
        if target.temperature == 1:
            soft, gradient_RV = _divergence(log_p_RV, u_RV.log_softmax(dim=-1), target.divergence)
        else:
            t = target.temperature
            tempered = (z_RV / t).log_softmax(dim=-1), u_RV.div_(t).log_softmax(dim=-1)
            soft, gradient_RV = _divergence(*tempered, target.divergence)
            soft, gradient_RV = soft * t**2, gradient_RV.mul_(t)
        if share < 1:
            p_RV = log_p_RV.exp_()
            p_RV.scatter_add_(1, places, torch.full_like(places, -1, dtype=p_RV.dtype))
            gradient_RV.mul_(share).add_(p_RV, alpha=1 - share)
    else:
        if target is not None:
            ids, weights = target.ids[tile.place], target.weights[tile.place].to(tile.dtype)
            soft = -(log_p_RV.gather(1, ids) * weights).sum()
        gradient_RV = log_p_RV.exp_()
        if target is not None:
            gradient_RV.scatter_add_(1, ids, weights * -share)
        gradient_RV.scatter_add_(1, places, torch.full_like(places, share - 1, dtype=gradient_RV.dtype))
    tile.logits_RV.copy_(_through_softcap(gradient_RV, z_RV, softcap))
    return torch.stack([share * soft + (1 - share) * hard, hard, soft])


def _divergence(log_p_RV: torch.Tensor, log_q_RV: torch.Tensor, kind: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over rows of a divergence of the student p from the teacher q, and its gradient with respect to the
    logits of p; ``log_q_RV`` may be overwritten."""
    if kind == "forward_kl":
        q_RV = log_q_RV.exp()
        total = torch.dot(q_RV.view(-1), log_q_RV.sub_(log_p_RV).view(-1))
        return total, torch.exp(log_p_RV, out=log_q_RV).sub_(q_RV)
    p_RV = log_p_RV.exp()
    if kind == "reverse_kl":
        ratio_RV = log_q_RV.neg_().add_(log_p_RV)
        of_rows = (p_RV * ratio_RV).sum(dim=-1, keepdim=True)
        return of_rows.sum(), ratio_RV.sub_(of_rows).mul_(p_RV)
    assert kind == "jensen_shannon"
    q_RV = log_q_RV.exp()
    log_m_RV = torch.logaddexp(log_p_RV, log_q_RV).sub_(0.6931471805599453)
    of_teacher = torch.dot(q_RV.view(-1), log_q_RV.sub_(log_m_RV).view(-1))
    ratio_RV = log_m_RV.neg_().add_(log_p_RV)
    of_rows = (p_RV * ratio_RV).sum(dim=-1, keepdim=True)
    return (of_rows.sum() + of_teacher) / 2, ratio_RV.sub_(of_rows).mul_(p_RV).div_(2)


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """In place. softcap * tanh(x / softcap) = 2 * softcap * sigmoid(2 * x / softcap) - softcap, and on a CPU a sigmoid
    takes a third of the time of a tanh."""
    return logits if softcap is None else logits.mul_(2 / softcap).sigmoid_().mul_(2 * softcap).sub_(softcap)


def _through_softcap(gradient: torch.Tensor, capped: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The gradient before the softcap from that after it; overwrites both."""
    if softcap is None:
        return gradient
    # The slope of the softcap: 1 - tanh(x)^2.
    return gradient.mul_(capped.div_(softcap).square_().neg_().add_(1))


def _add_product(
    total: torch.Tensor | None, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, dtype: torch.dtype, single: bool
) -> torch.Tensor:
    """Add a chunk's gradient of the weight. Sums of several chunks are kept in float32 where the weight is not."""
    if single:
        return grad_CV.T @ hidden_CD
    if total is None:
        total = torch.zeros(
            (grad_CV.shape[1], hidden_CD.shape[1]),
            dtype=torch.promote_types(torch.float32, dtype),
            device=grad_CV.device,
        )
    if total.dtype == grad_CV.dtype:
        return total.addmm_(grad_CV.T, hidden_CD)
    return total.add_(grad_CV.T @ hidden_CD)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _count(kept: torch.Tensor, given: torch.Tensor | int | None, device: torch.device) -> torch.Tensor | int:
    count = kept.sum().clamp(min=1) if given is None else given
    return count.to(device) if torch.is_tensor(count) else count


def _rows_of_a_chunk(rows: int, weight: torch.Tensor, head_gradient: bool) -> int:
    """So many that the chunks of ``rows`` have about the same size."""
    size = CHUNK_BYTES if head_gradient else CHUNK_BYTES // 4
    if head_gradient and weight.element_size() < 4:
        size = size * 4 // 3
    most = max(1, size // (len(weight) * weight.element_size()))
    return max(1, math.ceil(rows / math.ceil(rows / most))) if rows else 1


def _slices(length: int, size: int) -> Iterator[slice]:
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))


def _tiles(logits: torch.Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if logits.device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS
    return _slices(len(logits), max(1, elements // logits.shape[1]))


def _check(target: Target | None, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    if target is None:
        return
    rows = len(target.ids if isinstance(target, SampledTarget) else target.hidden)
    if rows != len(hidden):
        raise ValueError(
            f"The target has {rows} rows and {len(hidden)} labels are not ignored: give one row for each."
        )
    if isinstance(target, TeacherTarget) and len(target.weight) != len(weight):
        raise ValueError(
            f"The teacher knows {len(target.weight)} words and the student {len(weight)}: distillation needs one "
            "vocabulary. Take a teacher with the student's tokenizer, or resize its embeddings."
        )
