"""The one door to attention: what each backend can do, which one is taken, and how it is called.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn import functional as F

from .blocked_attention import blocked_attention
from .dense_attention import dense_attention
from .flash_attention import flash_attention
from .flex_attention import flex_attention
from .masks import AttentionPattern
from .packed_attention import by_document

AUTO = "auto"
Attended = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Needs:
    """What one call asks of a backend.

    Attributes:
        few_queries: so few that their scores take no more room than the keys; a step of decoding is of this kind.
    """

    softcap: bool = False
    dropout: bool = False
    weights: bool = False
    training: bool = False
    device: str = "cpu"
    dtype: torch.dtype | None = None
    few_queries: bool = False


@dataclass(frozen=True)
class Backend:
    """What a backend can do. Windows, packing and padding are honoured by every one of them.

    Attributes:
        softcap, dropout, weights: whether it can cap scores, drop weights, return weights.
        training: the device types on which it has a backward.
        devices, dtypes: the device types and dtypes on which it runs; empty for all.
        package: what has to be installed.
        why: why it cannot do what it cannot, for the error message.
    """

    name: str
    softcap: bool
    dropout: bool
    weights: bool
    training: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    package: str | None = None
    why: str = ""

    def refusal(self, needs: Needs) -> str | None:
        """Why this backend cannot serve these needs, or None."""
        if self.package is not None and find_spec(self.package) is None:
            return f"the package {self.package!r} is not installed"
        if self.devices and needs.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} only, not on {needs.device}"
        if self.dtypes and needs.dtype is not None and needs.dtype not in self.dtypes:
            return f"it computes in {' and '.join(map(str, self.dtypes))} only, not in {needs.dtype}"
        if needs.training and self.training and needs.device not in self.training:
            return f"it has no backward on {needs.device}"
        for feature, words in (
            ("softcap", "cap attention scores (attn_logit_softcapping)"),
            ("dropout", "drop attention weights (attention_dropout)"),
            ("weights", "return attention weights (output_attentions)"),
        ):
            if getattr(needs, feature) and not getattr(self, feature):
                return f"it cannot {words}{self.why and ': '}{self.why}"
        return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager", softcap=True, dropout=True, weights=True),
        Backend("sdpa", softcap=False, dropout=True, weights=False, why="torch's fused kernel has no such option"),
        Backend("blocked", softcap=True, dropout=False, weights=False, why="weights exist one block at a time"),
        Backend("dense", softcap=True, dropout=False, weights=False, why="it is made for decoding"),
        Backend(
            "flex_attention",
            softcap=True,
            dropout=False,
            weights=False,
            training=("cuda", "xpu"),
            why="the compiled kernel never holds the weights",
        ),
        Backend(
            "flash_attention_2",
            softcap=True,
            dropout=True,
            weights=False,
            devices=("cuda",),
            dtypes=(torch.float16, torch.bfloat16),
            package="flash_attn",
            why="the kernel never holds the weights",
        ),
        Backend(
            "flash_attention_3",
            softcap=True,
            dropout=False,
            weights=False,
            devices=("cuda",),
            dtypes=(torch.float16, torch.bfloat16),
            package="flash_attn_interface",
            why="the kernel never holds the weights",
        ),
    )
}


def resolve_backend(requested: str | None, needs: Needs) -> str:
    """The backend to use: the one requested if it can, the best legal one without a request.

    Args:
        requested: a key of ``BACKENDS``, or None or "auto" to choose.
        needs: what the call asks for.

    Raises:
        ValueError: an unknown name, or one that cannot serve the needs; the message says why and names those that can.
    """
    if requested in (None, AUTO):
        return next(name for name in _preference(needs) if BACKENDS[name].refusal(needs) is None)
    if requested not in BACKENDS:
        raise ValueError(f"Unknown attention implementation {requested!r}; there are {AUTO!r}, {_names(BACKENDS)}.")
    reason = BACKENDS[requested].refusal(needs)
    if reason is not None:
        legal = [name for name, backend in BACKENDS.items() if backend.refusal(needs) is None]
        raise ValueError(f"Attention {requested!r} cannot serve here: {reason}. These can: {_names(legal)}.")
    assert requested is not None
    return requested


def capability_table() -> list[dict[str, str]]:
    """One row a backend, for the docs and the command line."""
    return [
        {field.name: str(getattr(backend, field.name)) for field in fields(backend)} for backend in BACKENDS.values()
    ]


def attention(
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: AttentionPattern,
    *,
    backend: str | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Attended:
    """softmax(cap(scale * q k)) v over the keys that ``pattern`` lets each query see.

    Args:
        q_BNTH: queries (B, N, T, H), float.
        k_BGSH, v_BGSH: keys and values (B, G, S, H) of the same dtype; N is a multiple of G.
        pattern: which key each query sees.
        backend: a name from ``BACKENDS``; None or "auto" takes the best legal one.
        scale: factor on the scores before the cap.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        dropout: probability of dropping a weight; pass 0 outside training.
        need_weights: also return the weights (B, N, T, S).
        before: keys and values that stand before the others in ``pattern`` and lie elsewhere.

    Returns:
        (B, N, T, H) in the dtype of the queries, and the weights or None. A query that sees no key gives 0.

    Raises:
        ValueError: the backend cannot do what is asked.
    """
    device = q_BNTH.device.type
    needs = Needs(
        softcap=softcap is not None,
        dropout=dropout > 0,
        weights=need_weights,
        training=torch.is_grad_enabled() and (q_BNTH.requires_grad or k_BGSH.requires_grad),
        device=device,
        dtype=q_BNTH.dtype,
        few_queries=not is_compiling() and not torch.is_autocast_enabled(device) and _few(q_BNTH, k_BGSH),
    )
    name = resolve_backend(backend, needs)
    if name == "dense":
        parts = [(k_BGSH, v_BGSH)] if before is None else [before, (k_BGSH, v_BGSH)]
        return dense_attention(q_BNTH, parts, pattern, scale=scale, softcap=softcap), None
    if before is not None:
        k_BGSH, v_BGSH = torch.cat([before[0], k_BGSH], dim=2), torch.cat([before[1], v_BGSH], dim=2)
    call = _CALLS[name]
    if pattern.query_segments is None or name not in _BY_DOCUMENT or needs.device != "cpu" or is_compiling():
        return call(q_BNTH, k_BGSH, v_BGSH, pattern, scale, softcap, dropout)
    out_BNTH = by_document(
        q_BNTH, k_BGSH, v_BGSH, pattern, lambda q, k, v, each: call(q, k, v, each, scale, softcap, dropout)[0]
    )
    return out_BNTH, None


def _few(q_BNTH: torch.Tensor, k_BGSH: torch.Tensor) -> bool:
    """Whether the scores (N * T for each key of a row) take no more room than the keys (G * H for each)."""
    return q_BNTH.shape[1] * q_BNTH.shape[2] <= k_BGSH.shape[1] * k_BGSH.shape[3]


def _preference(needs: Needs) -> tuple[str, ...]:
    if needs.device == "cuda":
        return ("flash_attention_3", "flash_attention_2", "sdpa", "flex_attention", "blocked", "eager")
    decoding = needs.few_queries and not needs.training and needs.device == "cpu"
    return ("dense", "sdpa", "blocked", "eager") if decoding else ("sdpa", "blocked", "eager")


def _names(names: object) -> str:
    return ", ".join(repr(name) for name in names)  # type: ignore[attr-defined]


def _eager(
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Attended:
    """The oracle: dense scores, as stock transformers computes them."""
    groups = q_BNTH.shape[1] // k_BGSH.shape[1]
    k_BNSH = k_BGSH.repeat_interleave(groups, dim=1) if groups > 1 else k_BGSH
    v_BNSH = v_BGSH.repeat_interleave(groups, dim=1) if groups > 1 else v_BGSH
    scores_BNTS = q_BNTH @ k_BNSH.transpose(2, 3) * scale
    if softcap is not None:
        scores_BNTS = torch.tanh(scores_BNTS / softcap) * softcap
    visible = pattern.visible()
    if visible is not None:
        scores_BNTS = scores_BNTS.masked_fill(~visible, torch.finfo(scores_BNTS.dtype).min)
    weights_BNTS = scores_BNTS.softmax(dim=-1, dtype=_softmax_dtype(q_BNTH))
    if visible is not None:
        # A row that sees nothing is uniform after the softmax; it has to be 0.
        weights_BNTS = weights_BNTS.masked_fill(~visible, 0.0)
    weights_BNTS = F.dropout(weights_BNTS.to(q_BNTH.dtype), dropout)
    return weights_BNTS @ v_BNSH, weights_BNTS


def _softmax_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sdpa(
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Attended:
    assert softcap is None, "refused by resolve_backend"
    visible = pattern.visible()
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BGSH, v_BGSH, visible, dropout, scale=scale, enable_gqa=q_BNTH.shape[1] != k_BGSH.shape[1]
    )
    if visible is not None:
        out_BNTH = out_BNTH.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out_BNTH, None


def _without_weights(kernel: Callable[..., torch.Tensor], **fixed: Any) -> Callable[..., Attended]:
    """A kernel that returns the output alone. Those without dropout are refused before they could be asked for it."""

    def call(
        q_BNTH: torch.Tensor,
        k_BGSH: torch.Tensor,
        v_BGSH: torch.Tensor,
        pattern: AttentionPattern,
        scale: float,
        softcap: float | None,
        dropout: float,
    ) -> Attended:
        options = {"dropout": dropout, **fixed} if dropout else fixed
        return kernel(q_BNTH, k_BGSH, v_BGSH, pattern, scale=scale, softcap=softcap, **options), None

    return call


# Kernels that on a CPU are faster with documents side by side than in rows. What they are depends on values, which a
# compiled graph does not know.
_BY_DOCUMENT = ("sdpa", "blocked")

_CALLS: dict[str, Callable[..., Attended]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "blocked": _without_weights(blocked_attention),
    "flex_attention": _without_weights(flex_attention),
    "flash_attention_2": _without_weights(flash_attention, version=2),
    "flash_attention_3": _without_weights(flash_attention, version=3),
}
