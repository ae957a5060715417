"""Tiled attention equals dense attention in float64, forward and backward, and never holds a T x S tensor."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_t5gemma import blocked_attention as kernel
from modeling_t5gemma.blocked_attention import blocked_attention
from modeling_t5gemma.masks import AttentionPattern, join
from tests.selections import pairwise

SCALE = 0.3
# So small that short sequences have every kind of tile.
SMALL_TILES = {"QUERY_BLOCK": 8, "KEY_BLOCK": 4, "KEY_SPAN": 12, "TILE_ELEMENTS": 200, "SMALL_WORK": 0}


@contextmanager
def sizes(**values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(kernel, name, value)
        yield


@pytest.fixture
def small_tiles():
    with sizes(**SMALL_TILES):
        yield


def seen_BTS(pattern: AttentionPattern, rows: int) -> torch.Tensor:
    """The rule in the words of AttentionPattern's docstring, one condition a line."""
    t, s = pattern.query_positions[:, :, None], pattern.key_positions[:, None, :]
    conditions = [torch.ones(rows, t.shape[1], s.shape[2], dtype=torch.bool)]
    if pattern.causal:
        conditions.append(s <= t)
    if pattern.window is not None:
        conditions.append((t - s).abs() < pattern.window)
    if pattern.key_valid is not None:
        conditions.append(pattern.key_valid[:, None, :])
    if pattern.query_segments is not None:
        conditions.append(pattern.query_segments[:, :, None] == pattern.key_segments[:, None, :])
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = torch.logical_and(seen, condition)
    return seen


def dense(q, k, v, pattern, softcap):
    """The oracle, written out without a softmax: weights are exp(score) over their sum, 0 without a visible key."""
    groups = q.shape[1] // k.shape[1]
    head = torch.arange(q.shape[1]) // groups
    scores = torch.einsum("bnth,bnsh->bnts", q, k[:, head]) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = seen_BTS(pattern, q.shape[0])[:, None]
    limits = torch.finfo(scores.dtype)
    shift = scores.detach().masked_fill(~seen, limits.min).amax(-1, keepdim=True)
    weights = torch.where(seen, torch.exp(torch.where(seen, scores - shift, 0.0)), 0.0)
    return torch.einsum("bnts,bnsh->bnth", weights / weights.sum(-1, keepdim=True).clamp(min=limits.tiny), v[:, head])


def tensors(rows, heads, kv_heads, queries, keys, width=8, dtype=torch.float64, spread=2.0):
    """q, k, v and a gradient, laid out as a model's projections are: (rows, length, heads, width) in memory."""
    q, grad = (torch.randn(rows, queries, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(rows, keys, kv_heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    return spread * q, k, v, grad


def results(function, q, k, v, grad):
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def both(q, k, v, grad, pattern, softcap):
    """Results of the kernel, and of the oracle in float64 on the same numbers."""
    got = results(lambda *x: blocked_attention(*x, pattern, scale=SCALE, softcap=softcap), q, k, v, grad)
    expected = results(lambda *x: dense(*x, pattern, softcap), *(x.double() for x in (q, k, v, grad)))
    return got, expected


def relative_errors(got, expected):
    return [float((x.double() - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(got, expected)]


def line(*lengths):
    """Positions 0, 1, 2, ... of one row for all."""
    return [torch.arange(length)[None] for length in lengths]


def lengths_valid(lengths, total, side):
    index = torch.arange(total).expand(len(lengths), -1)
    lengths = torch.tensor(lengths)[:, None]
    return index < lengths if side == "right" else index >= total - lengths


def packed(documents, total):
    """Segment ids and positions of one row: documents of these lengths, then padding."""
    segments, positions = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
    start = 0
    for number, length in enumerate(documents, start=1):
        segments[start : start + length] = number
        positions[start : start + length] = torch.arange(length)
        start += length
    return segments, positions


def packed_pattern(queries, keys, total_queries, total_keys, **rule):
    (q_segments, q_positions), (k_segments, k_positions) = (
        [torch.stack(parts) for parts in zip(*(packed(row, total) for row in rows))]
        for rows, total in ((queries, total_queries), (keys, total_keys))
    )
    return AttentionPattern(
        q_positions, k_positions, key_valid=k_segments > 0, query_segments=q_segments, key_segments=k_segments, **rule
    )


def left_padded(lengths, total, **rule):
    valid = lengths_valid(lengths, total, "left")
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    return AttentionPattern(positions, positions, key_valid=valid, **rule)


def joined():
    source_valid = lengths_valid([26, 9], 26, "right")
    own_positions = source_valid.sum(1, keepdim=True) + torch.arange(33)
    source = AttentionPattern(own_positions, *line(26), key_valid=source_valid)
    return join(source, AttentionPattern(own_positions, own_positions, causal=True, window=14))


DOCUMENTS = [[11, 3, 17], [25]], [[9, 8, 13], [31]]
PATTERNS = {
    "bidirectional": lambda: AttentionPattern(*line(37, 37)),
    "window": lambda: AttentionPattern(*line(37, 37), window=6),
    "window of 1": lambda: AttentionPattern(*line(37, 37), window=1),
    "causal": lambda: AttentionPattern(*line(37, 37), causal=True),
    "causal window": lambda: AttentionPattern(*line(45, 45), causal=True, window=9),
    "causal with a cache": lambda: AttentionPattern(torch.arange(20, 29)[None], *line(29), causal=True, window=11),
    "cross": lambda: AttentionPattern(*line(19, 41)),
    "cross, few keys": lambda: AttentionPattern(*line(41, 3)),
    "one query": lambda: AttentionPattern(torch.tensor([[30]]), *line(31), causal=True),
    "padded right": lambda: AttentionPattern(*line(33, 33), key_valid=lengths_valid([33, 10], 33, "right"), window=12),
    "padded left": lambda: left_padded([33, 10], 33, causal=True),
    "a row of padding": lambda: AttentionPattern(*line(33, 33), key_valid=lengths_valid([0, 30], 33, "right")),
    "packed": lambda: packed_pattern(DOCUMENTS[0], DOCUMENTS[0], 37, 37),
    "packed, causal window": lambda: packed_pattern(DOCUMENTS[0], DOCUMENTS[0], 37, 37, causal=True, window=7),
    "packed cross": lambda: packed_pattern(*DOCUMENTS, 37, 35),
    "joined": joined,
    "slots not yet written": lambda: AttentionPattern(torch.tensor([[4], [17]]), *line(40), causal=True),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_dense(name, softcap, heads):
    pattern = PATTERNS[name]()
    queries, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    got, expected = both(*tensors(2, *heads, queries, keys), pattern, softcap)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("length", "rule", "softcap"),
    pairwise([255, 256, 257, 513, 640], [{}, {"causal": True}, {"window": 70}], [None, 50.0]),
    ids=str,
)
def test_sizes_around_those_of_the_blocks(length, rule, softcap):
    pattern = AttentionPattern(*line(length, length), **rule)
    got, expected = both(*tensors(1, 16, 8, length, length, 16, torch.float32), pattern, softcap)
    assert max(relative_errors(got, expected)) < 4e-6


@pytest.mark.parametrize("rows", [1, 3])
def test_cross_attention_longer_than_a_span(rows):
    pattern = AttentionPattern(*line(150, 1100), key_valid=lengths_valid([1100, 400, 0][:rows], 1100, "right"))
    got, expected = both(*tensors(rows, 2, 1, 150, 1100, 16, torch.float32), pattern, 50.0)
    assert max(relative_errors(got, expected)) < 4e-6


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str)
def test_half_precision(dtype, tolerance, softcap):
    """As accurate as the dtype's rounding allows, and more accurate than dense attention in that dtype."""
    pattern = AttentionPattern(*line(300, 700), causal=True)
    inputs = tensors(1, 4, 2, 300, 700, 64, dtype)
    got, expected = both(*inputs, pattern, softcap)
    assert all(x.dtype == dtype for x in got)
    errors = relative_errors(got, expected)
    assert max(errors) < tolerance
    plain = results(lambda *x: dense(*x, pattern, softcap).to(dtype), *inputs)
    assert all(ours < theirs for ours, theirs in zip(errors, relative_errors(plain, expected)))


def test_autocast():
    """Its dtype is that of the products; sums stay float32, in the forward pass and in a backward pass under it."""
    pattern = AttentionPattern(*line(200, 200))
    q, k, v, grad = tensors(1, 4, 2, 200, 200, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(lambda *x: blocked_attention(*x, pattern, scale=SCALE, softcap=50.0), q, k, v.bfloat16(), grad)
    q, k, v, grad = (x.bfloat16() for x in (q, k, v, grad))
    expected = results(lambda *x: blocked_attention(*x, pattern, scale=SCALE, softcap=50.0), q, k, v, grad)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x.bfloat16(), y, atol=0, rtol=0)


def test_small_scores_under_a_large_cap():
    """The cap is computed in a way that rounds small scores most; it must not show in float32."""
    pattern = AttentionPattern(*line(256, 600))
    got, expected = both(*tensors(1, 4, 4, 256, 600, 64, torch.float32, spread=0.1), pattern, 50.0)
    assert (got[0] - expected[0]).abs().max() < 1e-6


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_scores(softcap):
    """Scores of thousands neither overflow nor drown the sum; nor do those of keys that are hidden."""
    pattern = AttentionPattern(*line(150, 150), causal=True)
    inputs = tensors(2, 4, 4, 150, 150, 16, torch.float32, spread=1e4)
    got, expected = both(*inputs, pattern, softcap)
    assert relative_errors(got, expected)[0] < 1e-3
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("work", [0, 2**18], ids=["tiles", "one tile"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_nothing(softcap, work):
    """It gives exactly 0 and neither gets nor gives a gradient, in a row of padding as well as in a row with keys."""
    positions = torch.arange(40)[None]
    valid = lengths_valid([0, 40], 40, "right")
    pattern = AttentionPattern(positions, positions + 5, causal=True, key_valid=valid)
    q, k, v, grad = tensors(2, 4, 2, 40, 40, dtype=torch.float32)
    with sizes(SMALL_WORK=work):
        out, dq, dk, dv = results(
            lambda *x: blocked_attention(*x, pattern, scale=SCALE, softcap=softcap), q, k, v, grad
        )
    for x in (out, dq):
        assert torch.equal(x[0], torch.zeros_like(x[0]))
        assert torch.equal(x[1, :, :5], torch.zeros_like(x[1, :, :5]))
        assert (x[1, :, 6:] != 0).any()
    for x in (dk, dv):
        assert torch.equal(x[0], torch.zeros_like(x[0]))
        assert x[1].isfinite().all()


@st.composite
def patterns(draw):
    rows, queries, keys = (draw(st.integers(1, most)) for most in (3, 30, 40))

    def integers(length, high, count):
        values = st.lists(st.integers(0, high), min_size=length, max_size=length)
        return torch.tensor([draw(values) for _ in range(count)])

    def positions(length):
        count = draw(st.sampled_from([1, rows]))
        if draw(st.booleans()):
            return integers(length, 50, count)
        return torch.arange(length) + integers(1, 20, count)

    def segments(length):
        return integers(length, 3, rows).sort(1).values

    with_segments = draw(st.booleans())
    return rows, AttentionPattern(
        positions(queries),
        positions(keys),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 40)),
        key_valid=integers(keys, 1, rows).bool() if draw(st.booleans()) else None,
        query_segments=segments(queries) if with_segments else None,
        key_segments=segments(keys) if with_segments else None,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(patterns(), st.sampled_from([None, 2.0]), st.sampled_from([(2, 2), (4, 2)]))
def test_any_pattern(rows_and_pattern, softcap, heads):
    rows, pattern = rows_and_pattern
    queries, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    with sizes(**SMALL_TILES):
        got, expected = both(*tensors(rows, *heads, queries, keys, 4), pattern, softcap)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    pattern = AttentionPattern(*line(11, 14), causal=True, window=9)
    q, k, v, _ = tensors(1, 4, 2, 11, 14, 3, spread=1.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: blocked_attention(*x, pattern, scale=SCALE, softcap=softcap), leaves)


def test_a_second_derivative_is_an_error():
    q, k, v, grad = (x.requires_grad_() for x in tensors(1, 2, 2, 5, 5))
    out = blocked_attention(q, k, v, AttentionPattern(*line(5, 5)), scale=SCALE)
    (dq,) = torch.autograd.grad(out, q, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


def test_gradients_and_layouts_of_any_kind():
    """An expanded gradient, contiguous and sliced inputs give what the usual layout gives, and only what is asked."""
    pattern = AttentionPattern(*line(200, 200), window=50)
    q, k, v, _ = tensors(2, 4, 2, 200, 200, dtype=torch.float32)
    grad = torch.ones(()).expand(q.shape)
    expected = results(lambda *x: blocked_attention(*x, pattern, scale=SCALE), q, k, v, grad)
    wide = [torch.cat([x, x], dim=-1).contiguous() for x in (q, k, v)]
    got = results(lambda *x: blocked_attention(*(w[..., :8] for w in x), pattern, scale=SCALE), *wide, grad)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x[..., :8], y)
    only_v = v.clone().requires_grad_()
    blocked_attention(q, k, only_v, pattern, scale=SCALE).sum().backward()
    torch.testing.assert_close(only_v.grad, expected[3])


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returns, and of all results of bmm together."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
                self.products += x.numel() if func.overloadpacket is torch.ops.aten.bmm else 0
        return out


def sizes_of(pattern, softcap=None, width=8):
    """Of the forward and of the backward pass, run in the open instead of behind their operators."""
    queries, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    q, k, v, grad = tensors(1, 2, 2, queries, keys, width, torch.float32)
    rule = kernel._rule(pattern, SCALE, softcap)
    with Sizes() as forward:
        out, log_total = kernel._run_forward(q, k, v, *rule)
    with Sizes() as backward:
        kernel._run_backward(grad, out, log_total, q, k, v, *rule)
    return forward, backward


@pytest.mark.parametrize("rule", [{}, {"causal": True}, {"window": 90}], ids=str)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_no_tensor_is_larger_than_a_tile_or_an_input(rule, softcap):
    length = 1500
    with sizes(KEY_SPAN=128):
        for seen in sizes_of(AttentionPattern(*line(length, length), **rule), softcap):
            assert seen.largest == max(2 * length * 8, 2 * kernel.QUERY_BLOCK * kernel.KEY_SPAN)


def test_nothing_of_size_queries_times_keys_is_saved():
    queries, keys, width = 600, 900, 8
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 2, 2, queries, keys, width, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        blocked_attention(q, k, v, AttentionPattern(*line(queries, keys), window=90), scale=SCALE, softcap=50.0)
    heads = 2
    assert {tuple(x.shape) for x in saved} >= {(1, heads, queries, width), (1, heads, keys, width)}
    of_inputs = heads * width * (2 * queries + 2 * keys)
    assert sum(x.numel() for x in saved) <= of_inputs + heads * queries + 2 * (queries + keys)


def score_elements(pattern):
    """How many scores the forward pass makes, and few more: a tile's other product has a column to 64 keys or more."""
    return sizes_of(pattern, width=1)[0].products


def test_hidden_keys_are_not_visited():
    length, window, documents = 3000, 200, [[1000, 800, 1200]]
    everything = score_elements(AttentionPattern(*line(length, length)))
    assert score_elements(AttentionPattern(*line(length, length), causal=True)) < 0.55 * everything
    assert score_elements(AttentionPattern(*line(length, length), window=window)) < 0.25 * everything
    assert score_elements(packed_pattern(documents, documents, length, length)) < 0.45 * everything
    valid = lengths_valid([700], length, "right")
    assert score_elements(AttentionPattern(*line(length, length), key_valid=valid)) < 0.27 * everything


def test_a_mask_is_made_only_where_keys_are_hidden(monkeypatch):
    """A full row of valid keys needs none, and a window needs two edges a block."""
    made = []
    build = AttentionPattern._build_visible
    monkeypatch.setattr(AttentionPattern, "_build_visible", lambda self: made.append(build(self)) or made[-1])
    length, window = 1024, 256
    sizes_of(AttentionPattern(*line(length, length), key_valid=torch.ones(1, length, dtype=torch.bool)))
    assert not made
    sizes_of(AttentionPattern(*line(length, length), window=window))
    passes, edges = 2, 2 * (kernel.QUERY_BLOCK + kernel.KEY_BLOCK)
    assert 0 < sum(mask.numel() for mask in made) <= passes * length * edges


def example(softcap=50.0, **rule):
    q, k, v, _ = tensors(2, 4, 2, 150, 300, 16, torch.float32)
    pattern = AttentionPattern(*line(150, 300), key_valid=lengths_valid([300, 40], 300, "right"), **rule)
    return (q, k, v, *kernel._rule(pattern, SCALE, softcap))


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_operator_keeps_torchs_rules(softcap):
    """Schema, shapes and strides without data, autograd registration, and tracing of forward and backward."""
    q, k, v, *rule = example(softcap, causal=True, window=100)
    arguments = (*(x.requires_grad_() for x in (q, k, v)), *rule)
    torch.library.opcheck(torch.ops.t5gemma.blocked_attention.default, arguments)


class Attend(torch.nn.Module):
    def forward(self, q, k, v, valid):
        positions = torch.arange(q.shape[2])[None]
        pattern = AttentionPattern(positions, positions, window=40, key_valid=valid)
        return blocked_attention(q, k, v, pattern, scale=SCALE, softcap=50.0).transpose(1, 2).flatten(2)


def compiled_example():
    q, k, v, _ = tensors(2, 4, 2, 150, 150, 16, torch.float32)
    return q, k, v, lengths_valid([150, 40], 150, "right")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    q, k, v, valid = compiled_example()
    grad = torch.randn(2, 150, 64)
    compiled = torch.compile(Attend(), fullgraph=True, backend=backend)
    expected = results(lambda *leaves: Attend()(*leaves, valid), q, k, v, grad)
    for x, y in zip(results(lambda *leaves: compiled(*leaves, valid), q, k, v, grad), expected):
        torch.testing.assert_close(x, y)


def test_exports():
    inputs = compiled_example()
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, {2: length}, {1: length})
    program = torch.export.export(Attend(), inputs, dynamic_shapes=shapes)
    shorter = [x[:, :, :90] for x in inputs[:3]] + [inputs[3][:, :90]]
    for arguments in (inputs, shorter):
        torch.testing.assert_close(program.module()(*arguments), Attend()(*arguments))


def test_a_second_copy_of_the_file_uses_the_operators_of_the_first(monkeypatch):
    """As when a Hub checkpoint brings its own copy."""
    spec = importlib.util.spec_from_file_location("modeling_t5gemma.copy_of_blocked_attention", kernel.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    q, k, v, _ = tensors(1, 2, 2, 9, 9)
    pattern = AttentionPattern(*line(9, 9))
    for module in (copy, kernel):
        torch.testing.assert_close(
            module.blocked_attention(q, k, v, pattern, scale=SCALE), dense(q, k, v, pattern, None)
        )


def test_errors_say_what_is_wrong():
    q, k, v, _ = tensors(1, 4, 2, 9, 9)
    pattern = AttentionPattern(*line(9, 9))
    with pytest.raises(ValueError, match="multiple of G"):
        blocked_attention(q[:, :3], k, v, pattern, scale=SCALE)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        blocked_attention(q, k.float(), v, pattern, scale=SCALE)
    with pytest.raises(ValueError, match="9 queries and 9 keys"):
        blocked_attention(q[:, :, :8], k, v, pattern, scale=SCALE)
    with pytest.raises(ValueError, match="has to be positive"):
        blocked_attention(q, k, v, pattern, scale=SCALE, softcap=0.0)
