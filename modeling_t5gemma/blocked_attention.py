"""Attention in tiles: memory linear in the sequence length, with softcap and window inside and its own backward.

The queries are cut into blocks. A block visits only the spans of keys that it may see, and of each span one tile of
scores is made, used and overwritten, so that nothing of size T x S exists at any time, in the forward pass or in the
backward pass. What is kept for the backward pass is q, k, v, the output and one number a query (the logarithm of its
softmax's denominator), from which a tile's probabilities are made once more. This is the scheme of FlashAttention-2
(Dao 2023, arXiv 2307.08691, section 3.1), with tiles sized for the caches of a CPU. It runs on any device.

Two identities keep the element-wise work small, which on a CPU costs as much as the matrix products:

* softcap * tanh(s / softcap) = softcap - 2 * softcap * sigmoid(-2 * s / softcap), and a softmax does not see the
  constant. A sigmoid is six times as fast as a tanh. Close to 0 it rounds at 4e-6 of a logit for a softcap of 50, in
  float32, which is where the rounding of the scores themselves is from a score of about 30 on.
* Logits are in units of log 2, since exp2 is three times as fast as exp.

Shape legend: B batch, T queries, S keys, N query heads, G key/value heads, H head_dim. In a tile: R rows of the batch,
P pairs of a row and a key/value head, U the queries of all heads that share a key/value head (N / G times the block),
C the keys of a span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionPattern, reach

# What was fastest on a CPU with 1 MiB of level-2 cache a core; results don't depend on it. Whether keys are hidden is
# found out by the block; a tile takes in a span of blocks.
QUERY_BLOCK = 256
KEY_BLOCK = 64
KEY_SPAN = 512
TILE_ELEMENTS = 2**20
# So many scores are one tile: finding out which may be left out would cost more than it saves.
SMALL_WORK = 2**18
LOG2_E = math.log2(math.e)


def blocked_attention(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    pattern: AttentionPattern,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(cap(scale * q k)) v over the keys that ``pattern`` lets each query see, in memory linear in T + S.

    Query head n reads key/value head n // (N / G). Scores, softmax and sums are float32 (float64 for float64 inputs)
    whatever the inputs are; bfloat16 probabilities multiply bfloat16 values. Gradients are for q, k and v, once: there
    is no second derivative. Autocast casts the inputs, and torch.compile and torch.export see one operator.

    Args:
        q_BNTH: queries (B, N, T, H), floating point.
        k_BGSH, v_BGSH: keys and values (B, G, S, H) of the same dtype; N is a multiple of G.
        pattern: which key each query sees.
        scale: factor on the scores before the cap.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.

    Returns:
        (B, N, T, H) in the dtype of the queries. A query that sees no key gives 0, and gets and gives no gradient.

    Raises:
        ValueError: shapes or dtypes that don't fit, or a softcap that is not positive.
    """
    q_BNTH, k_BGSH, v_BGSH = (_autocast(x) for x in (q_BNTH, k_BGSH, v_BGSH))
    _check(q_BNTH, k_BGSH, v_BGSH, pattern, softcap)
    out_BNTH: Tensor = torch.ops.t5gemma.blocked_attention(q_BNTH, k_BGSH, v_BGSH, *_rule(pattern, scale, softcap))[0]
    return out_BNTH


def _rule(pattern: AttentionPattern, scale: float, softcap: float | None) -> tuple[Any, ...]:
    """What the operators take besides q, k and v, in the order of ``_RULE``."""
    return (
        pattern.query_positions,
        pattern.key_positions,
        pattern.key_valid,
        pattern.query_segments,
        pattern.key_segments,
        pattern.causal,
        pattern.window,
        scale,
        softcap,
    )


def _autocast(x: Tensor) -> Tensor:
    """What autocast does for torch's own attention."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, pattern: AttentionPattern, softcap: float | None) -> None:
    rows, heads, queries, width = q_BNTH.shape
    kv_heads, keys = k_BGSH.shape[1:3]
    if k_BGSH.shape != v_BGSH.shape or k_BGSH.shape[::3] != (rows, width) or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(q_BNTH.shape)}, keys {tuple(k_BGSH.shape)} and values {tuple(v_BGSH.shape)} don't fit: "
            "they have to be (B, N, T, H), (B, G, S, H) and (B, G, S, H) with N a multiple of G"
        )
    if not (q_BNTH.dtype == k_BGSH.dtype == v_BGSH.dtype and q_BNTH.is_floating_point()):
        raise ValueError(
            f"queries, keys and values have to be of one floating-point dtype, and are {q_BNTH.dtype}, "
            f"{k_BGSH.dtype} and {v_BGSH.dtype}; cast them before the call"
        )
    if (pattern.query_positions.shape[1], pattern.key_positions.shape[1]) != (queries, keys):
        raise ValueError(
            f"the pattern has {pattern.query_positions.shape[1]} queries and {pattern.key_positions.shape[1]} keys, "
            f"and there are {queries} and {keys}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap has to be positive, or None for no cap; it is {softcap}")


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# What a block of queries may see


def _bounds(positions: Tensor, segments: Tensor | None, valid: Tensor | None, size: int) -> Tensor:
    """The lowest and the highest position, segment and validity in each block: int64 (2, 3, blocks), on the CPU."""
    facts = torch.broadcast_tensors(
        positions,
        torch.zeros_like(positions) if segments is None else segments,
        torch.ones_like(positions) if valid is None else valid.to(positions.dtype),
    )
    length = positions.shape[1]
    # The last block is filled up with its last element, which changes no bound.
    index = torch.arange(-(-length // size) * size, device=positions.device).clamp(max=length - 1)
    blocks = torch.stack(facts)[:, :, index].unflatten(2, (-1, size))
    return torch.stack((blocks.amin((1, 3)), blocks.amax((1, 3)))).cpu()


@dataclass(frozen=True)
class _Span:
    """Keys of one tile, and the runs among them in which some key is hidden from some query."""

    keys: slice
    partial: tuple[slice, ...]


def _blocks(pattern: AttentionPattern) -> Iterator[tuple[slice, list[_Span]]]:
    """Each block of queries with the spans it visits; a span that any row may see is visited for all."""
    q_low, q_high = _bounds(pattern.query_positions, pattern.query_segments, None, QUERY_BLOCK)
    k_low, k_high = _bounds(pattern.key_positions, pattern.key_segments, pattern.key_valid, KEY_BLOCK)
    queries, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    for index, query in enumerate(zip(q_low.T.tolist(), q_high.T.tolist())):
        possible, whole = _reach(pattern, query, (k_low, k_high))
        sight = (possible.int() + (possible & whole).int()).tolist()
        yield _cut(index, index + 1, QUERY_BLOCK, queries), list(_spans(sight, keys))


def _reach(
    pattern: AttentionPattern, query: tuple[list[int], list[int]], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of each block of keys: whether a query of the block may see any of it, and whether all see all of it."""
    (low, low_segment, _), (high, high_segment, _) = query
    (k_low, k_low_segment, k_all_valid), (k_high, k_high_segment, k_any_valid) = key
    possible, whole = k_any_valid.bool(), k_all_valid.bool()
    if pattern.causal:
        possible, whole = possible & (k_low <= high), whole & (k_high <= low)
    if pattern.window is not None:
        far = reach(pattern.window)
        possible = possible & (k_low <= high + far) & (k_high >= low - far)
        whole = whole & (k_low >= high - far) & (k_high <= low + far)
    if pattern.query_segments is not None:
        possible = possible & (k_low_segment <= high_segment) & (k_high_segment >= low_segment)
        whole = whole & (k_low_segment == high_segment) & (k_high_segment == low_segment)
    return possible, whole


def _spans(sight: list[int], keys: int) -> Iterator[_Span]:
    """Spans of nearly equal length in each run of visible blocks; sight is 0 hidden, 1 in part, 2 whole."""
    for start, stop in _runs([seen > 0 for seen in sight]):
        pieces = -(-(stop - start) * KEY_BLOCK // KEY_SPAN)
        edges = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        for first, last in pairwise(edges):
            partial = _runs([seen == 1 for seen in sight[first:last]])
            yield _Span(
                _cut(first, last, KEY_BLOCK, keys),
                tuple(_cut(first + a, first + b, KEY_BLOCK, keys) for a, b in partial),
            )


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each run of true flags."""
    runs = []
    stop = 0
    for flag, group in groupby(flags):
        start, stop = stop, stop + len(list(group))
        if flag:
            runs.append((start, stop))
    return runs


def _cut(first: int, last: int, size: int, length: int) -> slice:
    """The elements of the blocks from first to before last."""
    return slice(first * size, min(last * size, length))


# Strips: the queries of one block in some rows and heads


@dataclass(frozen=True)
class _Visit:
    """Keys of one tile, and what to add to parts of its logits: 0 for a visible key, -inf for a hidden one."""

    keys: slice
    biases: list[tuple[slice, Tensor]]


@dataclass(frozen=True)
class _Strip:
    """Some rows, some heads and one block of queries, with the keys they visit."""

    rows: slice
    heads: slice
    kv_heads: slice
    queries: slice
    visits: list[_Visit]

    def of_queries(self, x_BNTH: Tensor) -> Tensor:
        """(B, N, T, H) to (P, U, H), or (B, N, T) to (P, 1, U)."""
        x_RNTH = x_BNTH[self.rows, self.heads, self.queries]
        pairs = x_RNTH.shape[0] * (self.kv_heads.stop - self.kv_heads.start)
        return x_RNTH.reshape(pairs, -1, x_BNTH.shape[3]) if x_BNTH.ndim == 4 else x_RNTH.reshape(pairs, 1, -1)

    def put_queries(self, x_BNTH: Tensor, x_PUH: Tensor) -> None:
        """The way back."""
        target = x_BNTH[self.rows, self.heads, self.queries]
        target.copy_(x_PUH.reshape(target.shape))

    def by_head(self, x_PCU: Tensor) -> Tensor:
        """A view (R, G, C, N / G, T) of a tile (P, C, U)."""
        rows, queries = self.rows.stop - self.rows.start, self.queries.stop - self.queries.start
        return x_PCU.view(rows, -1, x_PCU.shape[1], x_PCU.shape[2] // queries, queries)

    def of_keys(self, x_BGSH: Tensor, keys: slice) -> Tensor:
        """(B, G, S, H) to (P, C, H)."""
        return x_BGSH[self.rows, self.kv_heads, keys].flatten(0, 1)

    def add_to_keys(self, x_BGSH: Tensor, keys: slice, x_PCH: Tensor) -> None:
        """Adds in place."""
        target = x_BGSH[self.rows, self.kv_heads, keys]
        target.add_(x_PCH.view(target.shape))


class _Call:
    """What the forward and the backward pass of one call have in common: the rule, the numbers, how work is divided.

    The parameters are those of the operators from the fourth on.
    """

    def __init__(
        self,
        q_BNTH: Tensor,
        k_BGSH: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        key_valid: Tensor | None,
        query_segments: Tensor | None,
        key_segments: Tensor | None,
        causal: bool,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.batch, self.heads, self.queries, _ = q_BNTH.shape
        self.kv_heads, self.keys = k_BGSH.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.pattern = AttentionPattern(
            query_positions, key_positions, causal, window, key_valid, query_segments, key_segments
        )
        self.softcap = softcap
        self.device = q_BNTH.device
        self.dtype = _sum_dtype(q_BNTH)
        # What multiplies probabilities or gradients is bfloat16 if the inputs are; float16 would lose small ones.
        self.operand_dtype = torch.bfloat16 if q_BNTH.dtype == torch.bfloat16 else self.dtype
        self.query_factor = scale * (LOG2_E if softcap is None else -2 / softcap)
        self.slope = 1.0 if softcap is None else -2 * softcap * LOG2_E
        # Derivatives of a capped score by q k, and by it times query_factor, but for sigmoid' (1 - tanh^2 is 4 of it).
        self.score_slope = scale if softcap is None else 4 * scale
        self.scaled_score_slope = 1 / LOG2_E if softcap is None else -2 * softcap
        self._buffers: dict[str, Tensor] = {}
        self._divide()

    def buffer(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Room for one tile, which every tile of the call overwrites."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.tile_elements, dtype=dtype or self.dtype, device=self.device)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def _divide(self) -> None:
        self.small = self.batch * self.heads * self.queries * self.keys <= SMALL_WORK
        if self.small:
            self.pairs = self.batch * self.kv_heads
            self.tile_elements = self.batch * self.heads * self.queries * self.keys
            return
        of_pair = self.groups * min(QUERY_BLOCK, self.queries) * min(KEY_SPAN, self.keys)
        self.pairs = min(max(1, TILE_ELEMENTS // of_pair), self.batch * self.kv_heads)
        self.tile_elements = self.pairs * of_pair

    def strips(self) -> Iterator[_Strip]:
        """All the work. Rows are taken together only if all their heads are."""
        for rows in _slices(self.batch, max(1, self.pairs // self.kv_heads)):
            pattern = _of_rows(self.pattern, rows)
            for queries, spans in self._blocks(pattern):
                if not spans:
                    continue
                visits = [_Visit(span.keys, self._biases(pattern, queries, span)) for span in spans]
                for kv_heads in _slices(self.kv_heads, self.pairs):
                    heads = slice(kv_heads.start * self.groups, kv_heads.stop * self.groups)
                    yield _Strip(rows, heads, kv_heads, queries, visits)

    def _blocks(self, pattern: AttentionPattern) -> Iterator[tuple[slice, list[_Span]]]:
        if not self.small:
            return _blocks(pattern)
        keys = slice(0, self.keys)
        return iter([(slice(0, self.queries), [_Span(keys, () if pattern.sees_everything else (keys,))])])

    def _biases(self, pattern: AttentionPattern, queries: slice, span: _Span) -> list[tuple[slice, Tensor]]:
        """Biases (R or 1, 1, C, 1, T), to broadcast over the heads."""
        biases = []
        for keys in span.partial:
            visible_R1TC = _part(pattern, queries, keys).visible()
            assert visible_R1TC is not None
            bias_R1TC = visible_R1TC.to(self.dtype).log_()
            part = slice(keys.start - span.keys.start, keys.stop - span.keys.start)
            biases.append((part, bias_R1TC.mT.contiguous()[:, :, :, None]))
        return biases


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _of_rows(pattern: AttentionPattern, rows: slice) -> AttentionPattern:
    def cut(x: Tensor) -> Tensor:
        return x[rows] if x.shape[0] > 1 else x

    return _map(pattern, cut, cut)


def _part(pattern: AttentionPattern, queries: slice, keys: slice) -> AttentionPattern:
    return _map(pattern, lambda x: x[:, queries], lambda x: x[:, keys])


def _map(
    pattern: AttentionPattern, of_queries: Callable[[Tensor], Tensor], of_keys: Callable[[Tensor], Tensor]
) -> AttentionPattern:
    """The pattern with its tensors changed by a function of those of queries and one of those of keys."""
    return AttentionPattern(
        of_queries(pattern.query_positions),
        of_keys(pattern.key_positions),
        pattern.causal,
        pattern.window,
        None if pattern.key_valid is None else of_keys(pattern.key_valid),
        None if pattern.query_segments is None else of_queries(pattern.query_segments),
        None if pattern.key_segments is None else of_keys(pattern.key_segments),
    )


# Tiles


def _activations(call: _Call, q_PUH: Tensor, k_PCH: Tensor) -> Tensor:
    """What the logits (P, C, U) of a tile are a multiple of: the scores, or a sigmoid of them if they are capped."""
    x_PCU = call.buffer("activations", (*k_PCH.shape[:2], q_PUH.shape[1]))
    torch.bmm(k_PCH, q_PUH.mT, out=x_PCU)
    return x_PCU if call.softcap is None else torch.sigmoid(x_PCU, out=x_PCU)


def _logits(call: _Call, strip: _Strip, visit: _Visit, x_PCU: Tensor, out_PCU: Tensor) -> Tensor:
    """Logits in units of log 2, -inf for a hidden key. Scores without a cap are logits already, and x is out."""
    if call.softcap is not None:
        torch.mul(x_PCU, call.slope, out=out_PCU)
    for part, bias in visit.biases:
        strip.by_head(out_PCU)[:, :, part].add_(bias)
    return out_PCU


def _as_operand(call: _Call, x: Tensor) -> Tensor:
    """x in the dtype of the operands: itself, or a copy that the next one overwrites."""
    return x if x.dtype == call.operand_dtype else call.buffer("operand", x.shape, call.operand_dtype).copy_(x)


def _product(call: _Call, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of operands, in ``out``; bmm itself does not widen bfloat16."""
    if left.dtype == out.dtype:
        return torch.bmm(left, right, out=out)
    return out.copy_(torch.bmm(left, right, out=call.buffer("operand", out.shape, left.dtype)))


@dataclass
class _Softmax:
    """Over some keys: the sum of values weighted by exp2(logit - top), the sum of the weights, the greatest logit."""

    sum_PUH: Tensor
    total_P1U: Tensor
    top_P1U: Tensor

    def merge(self, other: _Softmax) -> _Softmax:
        """Over the keys of both; takes the place of self."""
        top_P1U = torch.maximum(self.top_P1U, other.top_P1U)
        mine_P1U, theirs_P1U = torch.exp2(self.top_P1U - top_P1U), torch.exp2(other.top_P1U - top_P1U)
        self.sum_PUH.mul_(mine_P1U.mT).addcmul_(other.sum_PUH, theirs_P1U.mT)
        self.total_P1U.mul_(mine_P1U).addcmul_(other.total_P1U, theirs_P1U)
        return _Softmax(self.sum_PUH, self.total_P1U, top_P1U)

    def result(self) -> tuple[Tensor, Tensor]:
        """Output (P, U, H) and log2 of the denominator (P, 1, U): 0 and inf for a query that sees nothing."""
        # The greatest term of a denominator is 1, so one below 1 is 0.
        out_PUH = self.sum_PUH.div_(self.total_P1U.clamp(min=1).mT)
        return out_PUH, torch.where(self.total_P1U > 0, self.total_P1U.log2().add_(self.top_P1U), math.inf)


def _softmax(call: _Call, strip: _Strip, visit: _Visit, q_PUH: Tensor, k_PCH: Tensor, v_PCH: Tensor) -> _Softmax:
    x_PCU = _activations(call, q_PUH, k_PCH)
    logits_PCU = _logits(call, strip, visit, x_PCU, x_PCU)
    # Finite, so that a query that sees nothing is not -inf - -inf.
    top_P1U = logits_PCU.amax(1, keepdim=True).clamp_(min=torch.finfo(call.dtype).min)
    p_PCU = logits_PCU.sub_(top_P1U).exp2_()
    sum_PUH = torch.bmm(_as_operand(call, p_PCU).mT, v_PCH).to(call.dtype)
    return _Softmax(sum_PUH, p_PCU.sum(1, keepdim=True), top_P1U)


def _forward(call: _Call, q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, N, T, H) and log2 of the softmax's denominator (B, N, T)."""
    out_BNTH, log_total_BNT = _empty_outputs(q_BNTH)
    out_BNTH.zero_()
    log_total_BNT.fill_(math.inf)
    k_BGSH, v_BGSH = k_BGSH.to(call.dtype), v_BGSH.to(call.operand_dtype)
    for strip in call.strips():
        q_PUH = strip.of_queries(q_BNTH).to(call.dtype) * call.query_factor
        parts = (
            _softmax(call, strip, visit, q_PUH, strip.of_keys(k_BGSH, visit.keys), strip.of_keys(v_BGSH, visit.keys))
            for visit in strip.visits
        )
        out_PUH, log_total_P1U = reduce(_Softmax.merge, parts).result()
        strip.put_queries(out_BNTH, out_PUH)
        strip.put_queries(log_total_BNT, log_total_P1U)
    return out_BNTH, log_total_BNT


@dataclass
class _Queries:
    """What the backward pass knows of the queries of a strip; delta is the sum over H of output times gradient.

    The scaled queries are there twice: exact for scores, and as operands like the gradient.
    """

    exact_q_PUH: Tensor
    q_PUH: Tensor
    grad_PUH: Tensor
    delta_P1U: Tensor
    log_total_P1U: Tensor


def _queries(
    call: _Call, strip: _Strip, grad_BNTH: Tensor, out_BNTH: Tensor, log_total_BNT: Tensor, q_BNTH: Tensor
) -> _Queries:
    exact_q_PUH = strip.of_queries(q_BNTH).to(call.dtype) * call.query_factor
    grad_PUH = strip.of_queries(grad_BNTH)
    delta_PU = (grad_PUH.to(call.dtype) * strip.of_queries(out_BNTH)).sum(2)
    return _Queries(
        exact_q_PUH,
        exact_q_PUH.to(call.operand_dtype),
        grad_PUH.to(call.operand_dtype),
        delta_PU[:, None],
        strip.of_queries(log_total_BNT),
    )


def _gradients_of_tile(
    call: _Call, strip: _Strip, visit: _Visit, queries: _Queries, k_PCH: Tensor, v_PCH: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities (P, C, U), and the gradients of q k but for the factor ``call.score_slope``."""
    x_PCU = _activations(call, queries.exact_q_PUH, k_PCH)
    logits_PCU = x_PCU if call.softcap is None else call.buffer("logits", x_PCU.shape)
    p_PCU = _logits(call, strip, visit, x_PCU, logits_PCU).sub_(queries.log_total_P1U).exp2_()
    dp_PCU = _product(call, v_PCH, queries.grad_PUH.mT, call.buffer("gradients", x_PCU.shape))
    ds_PCU = dp_PCU.sub_(queries.delta_P1U).mul_(p_PCU)
    if call.softcap is not None:
        torch.ops.aten.sigmoid_backward.grad_input(ds_PCU, x_PCU, grad_input=ds_PCU)
    return p_PCU, ds_PCU


def _backward(
    call: _Call,
    grad_BNTH: Tensor,
    out_BNTH: Tensor,
    log_total_BNT: Tensor,
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq_BNTH = torch.zeros_like(q_BNTH)
    dk_BGSH, dv_BGSH = (torch.zeros_like(x, dtype=call.dtype) for x in (k_BGSH, v_BGSH))
    exact_k_BGSH = k_BGSH.to(call.dtype)
    operand_k_BGSH, operand_v_BGSH = k_BGSH.to(call.operand_dtype), v_BGSH.to(call.operand_dtype)
    for strip in call.strips():
        queries = _queries(call, strip, grad_BNTH, out_BNTH, log_total_BNT, q_BNTH)
        # Transposed, as the product with a transposed tile on the left would be slower.
        dq_PHU = torch.zeros_like(queries.exact_q_PUH.mT)
        for visit in strip.visits:
            k_PCH, v_PCH = strip.of_keys(exact_k_BGSH, visit.keys), strip.of_keys(operand_v_BGSH, visit.keys)
            p_PCU, ds_PCU = _gradients_of_tile(call, strip, visit, queries, k_PCH, v_PCH)
            strip.add_to_keys(dv_BGSH, visit.keys, torch.bmm(_as_operand(call, p_PCU), queries.grad_PUH))
            ds_PCU = _as_operand(call, ds_PCU)
            strip.add_to_keys(dk_BGSH, visit.keys, torch.bmm(ds_PCU, queries.q_PUH))
            dq_PHU.add_(torch.bmm(strip.of_keys(operand_k_BGSH, visit.keys).mT, ds_PCU))
        strip.put_queries(dq_BNTH, dq_PHU.mT * call.score_slope)
    dk_BGSH.mul_(call.scaled_score_slope)
    return dq_BNTH, dk_BGSH.to(k_BGSH.dtype), dv_BGSH.to(v_BGSH.dtype)


def _empty_outputs(q_BNTH: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BNTH), q_BNTH.new_empty(q_BNTH.shape[:3], dtype=_sum_dtype(q_BNTH))


# The operators, which tracing does not look into: how much work there is depends on the values of the pattern

_RULE = (
    "Tensor query_positions, Tensor key_positions, Tensor? key_valid, Tensor? query_segments, Tensor? key_segments, "
    "bool causal, int? window, float scale, float? softcap"
)
_TENSORS_OF_RULE = 5


def _register() -> None:
    forward_op = torch.library.custom_op(
        "t5gemma::blocked_attention",
        _run_forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor)",
    )
    forward_op.register_fake(_shape_of_forward)
    forward_op.register_autograd(_differentiate, setup_context=_save)
    backward_op = torch.library.custom_op(
        "t5gemma::blocked_attention_backward",
        _run_backward,
        mutates_args=(),
        schema=(
            f"(Tensor grad, Tensor out, Tensor log_total, Tensor q, Tensor k, Tensor v, {_RULE})"
            " -> (Tensor, Tensor, Tensor)"
        ),
    )
    backward_op.register_fake(_shape_of_backward)


def _run_forward(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(q_BNTH.device.type, enabled=False):
        return _forward(_Call(q_BNTH, k_BGSH, *rule), q_BNTH, k_BGSH, v_BGSH)


def _shape_of_forward(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q_BNTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_k_v, tensors, numbers = inputs[:3], inputs[3 : 3 + _TENSORS_OF_RULE], inputs[3 + _TENSORS_OF_RULE :]
    ctx.save_for_backward(*output, *q_k_v, *tensors)
    ctx.numbers = numbers


def _differentiate(ctx: Any, grad_BNTH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.t5gemma.blocked_attention_backward(grad_BNTH, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * (_TENSORS_OF_RULE + len(ctx.numbers)))


def _run_backward(
    grad_BNTH: Tensor,
    out_BNTH: Tensor,
    log_total_BNT: Tensor,
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q_BNTH.device.type, enabled=False):
        return _backward(_Call(q_BNTH, k_BGSH, *rule), grad_BNTH, out_BNTH, log_total_BNT, q_BNTH, k_BGSH, v_BGSH)


def _shape_of_backward(
    grad_BNTH: Tensor,
    out_BNTH: Tensor,
    log_total_BNT: Tensor,
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BNTH), torch.empty_like(k_BGSH), torch.empty_like(v_BGSH)


# A checkpoint on the Hub carries a copy of this file, which may be imported beside the installed one. Both copies then
# use the operators of the first; operators of another schema need another name.
if not hasattr(torch.ops.t5gemma, "blocked_attention"):
    _register()
