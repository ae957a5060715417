"""The parts stacks and models are made of: RMSNorm, rotary embedding, gated MLP, heads.

Shapes: B batch, T length, N heads, H head_dim, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_t5gemma import StackConfig, rope_parameters_of

Rope = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        unit_offset: the gain is 1 + weight (Gemma), with weights that begin at 0; otherwise it is the weight, from 1.
    """

    def __init__(self, dim: int, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if unit_offset else 0.0
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - self.offset))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _RMSNorm.apply(x, self.weight, self.offset, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, unit_offset={bool(self.offset)}"


class _RMSNorm(torch.autograd.Function):
    """The norm with its own backward pass.

    Left to itself, autograd keeps two float32 arrays of the input's size for it, a fifth of all that a layer keeps;
    this keeps the input, which the residual keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale * (offset + weight.float())).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).type_as(weight)
        grad = grad * (ctx.offset + weight.float())
        grad_x = grad.sub_(normed.mul_((grad * normed).mean(-1, keepdim=True))).mul_(scale)
        return grad_x.type_as(x), grad_weight, None, None


def dropout(rate: float) -> nn.Module:
    """What drops that share of its input in training, where any is to be dropped."""
    return nn.Dropout(rate) if rate else nn.Identity()


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with dropout before the last projection."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_activation]
        self.dropout = dropout(config.dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        return hidden


class RotaryEmbedding(nn.Module):
    """Cosines and sines for one layer type.

    The frequencies are a few hundred numbers that follow from the config, so they are computed where they are needed:
    no buffer can be lost on the meta device or rounded by a cast of the model to bfloat16.
    """

    def __init__(self, config: StackConfig, layer_type: str) -> None:
        super().__init__()
        self.config = config
        self.layer_type = layer_type
        self.parameters_of_rope = rope_parameters_of(config, layer_type)

    def frequencies(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, float32 (H / 2,), and the factor on cosines and sines."""
        rope = self.parameters_of_rope
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float32)
            return 1.0 / (rope["rope_theta"] ** (exponents / self.config.head_dim)), 1.0
        nested = self.layer_type in (self.config.rope_parameters or {})
        kwargs: dict[str, Any] = {"layer_type": self.layer_type} if nested else {}
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device, **kwargs)
        return frequencies, factor

    @torch.no_grad()
    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Rope:
        """Cosines and sines, (B or 1, 1, T, H) in the dtype of ``x``, for int64 ``positions`` (B or 1, T)."""
        frequencies, factor = self.frequencies(x.device)
        angles = positions[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def apply_rope(x_BNTH: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the pairs (h, h + H/2) of each head by their position's angles."""
    cos, sin = rope
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat((-second, first), dim=-1) * sin


class LMHead(nn.Module):
    """Hidden states (..., D) to logits over the vocabulary (..., V), softcapped."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.softcap = config.final_logit_softcapping

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out_proj(x)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class ClassificationHead(nn.Module):
    """Dropout and one projection to the labels."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(width, num_labels)

    def reset_parameters(self, initializer_range: float) -> None:
        nn.init.normal_(self.out_proj.weight, std=initializer_range * self.out_proj.out_features**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.out_proj(self.dropout(x))
        return scores
