"""Every backend against the plain one, and the table that says which may be used."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import modeling_t5gemma as m
from modeling_t5gemma.attention import BACKENDS, Needs, attention, capability_table, resolve_backend
from modeling_t5gemma.flash_attention import flash_attention
from modeling_t5gemma.masks import AttentionPattern, ends_of_source, join, positions_in_segments
from tests.selections import pairwise
from tests.tiny import t5gemma, tokens

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = WIDTH**-0.5
RUN_HERE = [name for name in BACKENDS if not name.startswith("flash")]


def lengths_mask(length: int, lengths: list[int], side: str) -> torch.Tensor:
    index = torch.arange(length)
    rows = [index < n if side == "right" else index >= length - n for n in lengths]
    return torch.stack(rows)


def patterns() -> dict[str, AttentionPattern]:
    """Every kind of attention in the package, by name; two rows."""
    index = torch.arange(30)[None]
    valid = lengths_mask(30, [30, 17], "right")
    left = lengths_mask(30, [30, 17], "left")
    nothing = lengths_mask(30, [30, 0], "right")
    segments = torch.tensor([[1] * 10 + [2] * 15 + [0] * 5, [1] * 3 + [2] * 3 + [3] * 24])
    targets = torch.tensor([[1] * 4 + [2] * 7 + [0], [1] * 2 + [2] * 9 + [3]])
    positions = positions_in_segments(segments)
    target_positions = positions_in_segments(targets) + ends_of_source(positions, None, segments, targets)
    target_index = torch.arange(12)[None]
    cross = AttentionPattern(target_index, index, key_valid=valid)
    packed_cross = AttentionPattern(
        target_positions, positions, key_valid=segments != 0, query_segments=targets, key_segments=segments
    )
    packed_own = AttentionPattern(
        target_positions, target_positions, True, 7, targets != 0, targets, targets, targets != 0
    )
    ends = ends_of_source(index, valid, None, None)
    goes_on = AttentionPattern(target_index + ends, index.expand(2, -1), key_valid=valid)
    own = AttentionPattern(target_index + ends, target_index + ends, causal=True, window=9)
    return {
        "all": AttentionPattern(index, index),
        "causal": AttentionPattern(index, index, causal=True),
        "window": AttentionPattern(index, index, window=5),
        "causal window, padded right": AttentionPattern(index, index, True, 5, valid, query_valid=valid),
        "bidirectional, padded left": AttentionPattern(index, index, False, None, left, query_valid=left),
        "window, padded left": AttentionPattern(index, index, False, 5, left, query_valid=left),
        "packed": AttentionPattern(positions, positions, False, 4, segments != 0, segments, segments, segments != 0),
        "cross": cross,
        "cross, packed": packed_cross,
        "cross, a row without a key": AttentionPattern(target_index, index, key_valid=nothing),
        "joined": join(goes_on, own),
        "joined, packed": join(packed_cross, packed_own),
        "one step": AttentionPattern(torch.tensor([[20]]), torch.arange(10, 21)[None], causal=True, window=8),
    }


def inputs(pattern: AttentionPattern, dtype: torch.dtype, kv_heads: int = KV_HEADS) -> list[torch.Tensor]:
    queries, keys = pattern.query_positions.shape[1], pattern.key_positions.shape[1]
    shapes = ((2, HEADS, queries, WIDTH), (2, kv_heads, keys, WIDTH), (2, kv_heads, keys, WIDTH))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(q, k, v, pattern: AttentionPattern, softcap: float | None) -> torch.Tensor:
    """Row by row in float64, straight from the rule's words."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    rows, heads, length, _ = q.shape
    at = lambda table, b, i: None if table is None else table[min(b, len(table) - 1), i].item()  # noqa: E731
    for b, n, t in product(range(rows), range(heads), range(length)):
        g = n // (heads // k.shape[1])
        seen = []
        for s in range(k.shape[2]):
            distance = at(pattern.query_positions, b, t) - at(pattern.key_positions, b, s)
            seen.append(
                (not pattern.causal or distance >= 0)
                and (pattern.window is None or abs(distance) < pattern.window)
                and at(pattern.key_valid, b, s) in (None, True)
                and at(pattern.query_segments, b, t) == at(pattern.key_segments, b, s)
            )
        if any(seen):
            scores = k[b, g] @ q[b, n, t] * SCALE
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            out[b, n, t] = scores.masked_fill(~torch.tensor(seen), -torch.inf).softmax(0) @ v[b, g]
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", patterns())
def test_eager_is_the_rule(kind, softcap):
    pattern = patterns()[kind]
    q, k, v = inputs(pattern, torch.float64)
    got, weights = attention(q, k, v, pattern, backend="eager", scale=SCALE, softcap=softcap, need_weights=True)
    torch.testing.assert_close(got, oracle(q, k, v, pattern, softcap), atol=1e-12, rtol=1e-9)
    assert weights.shape == (2, HEADS, q.shape[2], k.shape[2])


@pytest.mark.parametrize(
    ("kind", "backend", "softcap", "dtype"),
    pairwise(
        patterns(),
        RUN_HERE,
        (None, 0.7),
        (torch.float32, torch.bfloat16),
        # The sdpa backend has no softcap; flex_attention's reference takes a second a call.
        allowed=lambda _, backend, softcap, dtype: (
            not ((backend == "sdpa" and softcap) or (backend == "flex_attention" and dtype == torch.bfloat16))
        ),
    ),
)
def test_backends_agree_with_eager(backend, kind, softcap, dtype):
    pattern = patterns()[kind]
    trains = BACKENDS[backend].refusal(Needs(training=True)) is None
    q, k, v = (x.requires_grad_(trains) for x in inputs(pattern, dtype))
    got, _ = attention(q, k, v, pattern, backend=backend, scale=SCALE, softcap=softcap)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = attention(*wide, pattern, backend="eager", scale=SCALE, softcap=softcap)
    assert got.dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    if trains:
        upstream = torch.randn_like(got)
        gradients = torch.autograd.grad(got, (q, k, v), upstream)
        reference = torch.autograd.grad(expected, wide, upstream.double())
        for gradient, expected_gradient in zip(gradients, reference, strict=True):
            torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


def varlen_reference(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    softcap,
    dropout_p,
):
    """What flash_attn documents: sequences end to end, the last query aligned with the last key, a window of
    (left, right) around it, -1 for no limit, 0 where a query sees no key."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        n, s = rows.stop - rows.start, keys.stop - keys.start
        assert n <= max_seqlen_q and s <= max_seqlen_k
        if not n or not s:
            continue
        distance = torch.arange(s)[None] - (torch.arange(n)[:, None] + s - n)
        left, right = window_size[0], 0 if causal else window_size[1]
        seen = torch.ones(n, s, dtype=torch.bool)
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        scores = torch.einsum("nhd,shd->hns", q[rows], k[keys].repeat_interleave(groups, 1)) * softmax_scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
        out[rows] = torch.einsum("hns,shd->nhd", weights, v[keys].repeat_interleave(groups, 1))
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", patterns())
def test_flash_layout(kind, softcap):
    """The layout handed to FlashAttention's kernels, with a reference of their documented meaning in their place."""
    pattern = patterns()[kind]
    q, k, v = inputs(pattern, torch.float64)
    got = flash_attention(q, k, v, pattern, scale=SCALE, softcap=softcap, kernel=varlen_reference)
    expected = oracle(q, k, v, pattern, softcap)
    real = torch.ones(2, q.shape[2], dtype=torch.bool) if pattern.query_valid is None else pattern.query_valid
    real = real.expand(2, -1)[:, None, :, None]
    torch.testing.assert_close(got * real, expected * real, atol=1e-12, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.needs("flash_attn")
@pytest.mark.parametrize("kind", patterns())
def test_flash_attention_2_on_a_gpu(kind):
    pattern = patterns()[kind]
    on_gpu = AttentionPattern(
        **{
            name: value.cuda() if torch.is_tensor(value) else value
            for name, value in vars(pattern).items()
            if not name.startswith("_")
        }
    )
    q, k, v = (x.cuda().bfloat16() for x in inputs(pattern, torch.float32))
    got, _ = attention(q, k, v, on_gpu, backend="flash_attention_2", scale=SCALE, softcap=30.0)
    expected = oracle(q.cpu(), k.cpu(), v.cpu(), pattern, 30.0)
    real = torch.ones(2, q.shape[2], dtype=torch.bool) if pattern.query_valid is None else pattern.query_valid
    real = real.expand(2, -1)[:, None, :, None]
    torch.testing.assert_close(got.cpu().double() * real, expected * real, atol=3e-2, rtol=3e-2)


def test_the_best_legal_backend_is_taken():
    assert resolve_backend(None, Needs()) == "sdpa"
    assert resolve_backend("auto", Needs(softcap=True)) == "blocked"
    assert resolve_backend(None, Needs(softcap=True, weights=True)) == "eager"
    assert resolve_backend(None, Needs(softcap=True, dropout=True)) == "eager"
    assert resolve_backend(None, Needs(softcap=True, device="cuda", dtype=torch.float32)) == "flex_attention"
    assert resolve_backend(None, Needs(few_queries=True)) == "dense"
    assert resolve_backend(None, Needs(few_queries=True, softcap=True, training=True)) == "blocked"
    assert resolve_backend(None, Needs(few_queries=True, device="cuda", dtype=torch.float32)) == "sdpa"


@pytest.mark.parametrize(
    ("name", "needs", "reason"),
    [
        ("sdpa", Needs(softcap=True), "cannot cap attention scores"),
        ("blocked", Needs(dropout=True), "cannot drop attention weights"),
        ("blocked", Needs(weights=True), "one block at a time"),
        ("flex_attention", Needs(training=True), "no backward on cpu"),
        ("flash_attention_2", Needs(), "not installed|runs on cuda only"),
        ("nonsense", Needs(), "Unknown attention implementation 'nonsense'"),
    ],
)
def test_refusals_say_why_and_name_one_that_can(name, needs, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        resolve_backend(name, needs)
    assert "'eager'" in str(refused.value)


def test_a_model_refuses_a_backend_its_config_forbids(tmp_path):
    model = t5gemma()
    with pytest.raises(ValueError, match="'blocked'"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot cap attention scores"):
        m.T5GemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa")
    loaded = m.T5GemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="blocked")
    assert loaded.config.decoder._attn_implementation == "blocked"
    with pytest.raises(ValueError, match="return attention weights"):
        loaded(input_ids=tokens(1, 4), decoder_input_ids=tokens(1, 2), output_attentions=True)
    loaded.set_attn_implementation({"encoder": "eager", "decoder": "blocked"})
    assert loaded.config.encoder._attn_implementation == "eager"


def test_the_table_lists_every_backend():
    assert [row["name"] for row in capability_table()] == list(BACKENDS)
