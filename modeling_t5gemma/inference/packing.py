"""A model's weights laid out for generating on a CPU.

A step of decoding reads every weight once and computes little with it: it takes as long as reading takes, if nothing
else costs time. oneDNN reads a matrix about twice as fast in a layout of its own as torch does row by row, and one of
8-bit integers four times as fast as one of float32, if the processor has instructions for them (VNNI); where it has
none, FBGEMM does so with states of 7 bits. What else a step does is many small operations, so matrices with
the same input become one, and what is the same at every step is computed once.

Shapes: B batch, T length, N query heads, G key/value heads, H head_dim, D width, V vocabulary; K columns and M rows of
a matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..blocks import T5GemmaSelfAttention
from ..cache import KeyValues
from ..errors import UserError
from ..layers import GatedMLP, LMHead, RMSNorm, Rope, apply_rope
from ..modeling_t5gemma import T5GemmaForConditionalGeneration

Pack = Callable[..., nn.Module]

# The number of rows that oneDNN is told to expect. Its layout for several is the faster one for a single row too.
ROWS = 8
LARGEST = 127  # the range is symmetric: -128 is left out
ZERO = 128  # what stands for 0 in the unsigned integers that oneDNN multiplies by signed ones
NARROW_LARGEST, NARROW_ZERO = 63, 64  # the same for 7 bits
TINY = torch.finfo(torch.float32).tiny


def pack_weights(model: T5GemmaForConditionalGeneration, *, int8: bool = False) -> T5GemmaForConditionalGeneration:
    """Make a model fit for generating on a CPU, in place, and for nothing else.

    Without ``int8`` it computes what it did but for rounding. With it, each row of a matrix is rounded to 255 values
    by its largest, the language-model head's too, and so is each token's state wherever it meets a matrix (to 127
    values on a processor without VNNI). Embeddings stay as they are: a head that is tied to them is held once more.

    Args:
        model: float32 or bfloat16, on the CPU, without an adapter. With ``int8``, float32 is the faster one.
        int8: round weights to 8 bits.

    Returns:
        The same model, in evaluation mode. It can no longer be trained, saved or moved.

    Raises:
        UserError: the model is none of these, or this processor or build of torch cannot do it.
    """
    _check(model)
    _replace(model, _pack_for(model.dtype, int8))
    model.register_state_dict_pre_hook(_refuse_to_save)
    return model.requires_grad_(False).eval()


class PackedLinear(nn.Module):
    """Linear layers with one input as one, in oneDNN's layout: (..., K) to (..., M)."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = _joined(layers)
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.multiply(x, self.weight, self.bias, "none", [], "")
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantizedLinear(nn.Module):
    """Linear layers with one input as one, in 8-bit integers: (..., K) to (..., M), in the dtype of the input.

    A row of the matrix has a scale of its own, found here, and so has a token, found at each call.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = _joined(layers)
        self.out_features, self.in_features = weight.shape
        rounded, self.scales = _rounded(weight)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [ROWS, self.in_features])
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.half_up = torch.tensor(ZERO + 0.5)  # what follows cuts off
        self.multiply = torch.ops.onednn.qlinear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = _largest(x)
        rounded = torch.addcdiv(self.half_up, x, largest, value=LARGEST).to(torch.uint8)
        weight = (self.weight, self.scales, self.zeros)
        y = self.multiply(rounded, 1 / LARGEST, ZERO, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        y = y.mul_(largest)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class NarrowLinear(nn.Module):
    """``QuantizedLinear`` on processors without VNNI, where a sum of two products of 8-bit integers is cut off at 16
    bits: a token's state has 7 bits, with which it cannot come so far."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = _joined(layers)
        self.out_features, self.in_features = weight.shape
        rounded, scales = _rounded(weight)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        with warnings.catch_warnings():
            # Tensors of these types are to leave torch one day; the probe tells when there are none any more.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            made = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(made, None)
        self.multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = _largest(x)
        y = self.multiply(x / largest, 1 / NARROW_LARGEST, NARROW_ZERO, self.weight).mul_(largest)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedNorm(nn.Module):
    """Root-mean-square norm over the last dimension, x gain sqrt(D) / hypot(|x|, sqrt(eps D)), in float32.

    Args:
        gain: float32, (D,) or more dimensions.
        eps: added to the mean square.
    """

    def __init__(self, gain: torch.Tensor, eps: float) -> None:
        super().__init__()
        width = gain.shape[-1]
        self.gain = gain * width**0.5
        self.least = torch.tensor((eps * width) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.least) * self.gain).to(x.dtype)


class PackedSelfAttention(T5GemmaSelfAttention):
    """Self-attention with queries, keys and values as one product, queries and keys normed and rotated as one."""

    def __init__(self, attention: T5GemmaSelfAttention, pack: Pack) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scale, self.softcap = attention.head_dim, attention.scale, attention.softcap
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (layer.out_features // self.head_dim for layer in layers)
        self.sizes = (queries + keys, values)
        self.queries_and_keys = (queries, keys)
        self.qkv_proj = pack(*layers)
        self.o_proj = pack(attention.o_proj)  # type: ignore[assignment]  # called, and nothing else
        self.qk_norm: nn.Module = nn.Identity()
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            gains = (_gain(attention.q_norm).expand(queries, 1, -1), _gain(attention.k_norm).expand(keys, 1, -1))
            self.qk_norm = PackedNorm(torch.cat(gains), attention.q_norm.eps)

    def project(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, KeyValues]:
        both, values_BGTH = self.split_heads(self.qkv_proj(x)).split(self.sizes, dim=1)
        q_BNTH, keys_BGTH = apply_rope(self.qk_norm(both), rope).split(self.queries_and_keys, dim=1)
        return q_BNTH, (keys_BGTH, values_BGTH)

    def rotated_key_values(self, x: torch.Tensor, rope: Rope) -> KeyValues:
        return self.project(x, rope)[1]


class PackedMLP(nn.Module):
    """A ``GatedMLP`` whose gate and up projections are one product."""

    def __init__(self, mlp: GatedMLP, pack: Pack) -> None:
        super().__init__()
        self.gate_up_proj = pack(mlp.gate_proj, mlp.up_proj)
        self.down_proj = pack(mlp.down_proj)
        self.act_fn = mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        hidden: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return hidden


class PackedHead(nn.Module):
    """Hidden states (..., D) to float32 logits (..., V), softcapped by a sigmoid, which is several times as fast as
    tanh: c tanh(y / c) = 2 c sigmoid(2 y / c) - c."""

    def __init__(self, head: LMHead, pack: Pack) -> None:
        super().__init__()
        assert head.softcap is not None
        self.softcap = head.softcap
        self.dtype = head.out_proj.weight.dtype if pack is PackedLinear else torch.float32
        self.least = torch.tensor(-head.softcap)
        self.out_proj = pack(head.out_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out_proj(x.to(self.dtype)).float()
        logits.mul_(2 / self.softcap).sigmoid_()
        return torch.add(self.least, logits, alpha=2 * self.softcap, out=logits)


def _replace(module: nn.Module, pack: Pack) -> None:
    """Replace everything below a module, one after the other: only one is there twice at any time."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, pack(child))
        elif type(child) is RMSNorm:
            setattr(module, name, PackedNorm(_gain(child), child.eps))
        elif type(child) is T5GemmaSelfAttention:
            setattr(module, name, PackedSelfAttention(child, pack))
        elif type(child) is GatedMLP:
            setattr(module, name, PackedMLP(child, pack))
        elif type(child) is LMHead and child.softcap is not None:
            setattr(module, name, PackedHead(child, pack))
        else:
            _replace(child, pack)


def _gain(norm: RMSNorm) -> torch.Tensor:
    return norm.offset + norm.weight.detach().float()


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (M, K) as 8-bit integers, and what each row was divided by, float32 (M,)."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp(min=TINY) / LARGEST
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each token's state, float32 (..., 1), above 0."""
    return torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=TINY)


def _joined(layers: tuple[nn.Linear, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (M, K) and bias (M,); all layers have a bias or none has."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _refuse_to_save(*args: Any) -> None:
    raise UserError("A model whose weights were packed cannot be saved. Save it before, or load the checkpoint again.")


def _check(model: nn.Module) -> None:
    if not isinstance(model, T5GemmaForConditionalGeneration):
        raise UserError(f"{type(model).__name__} cannot be packed: only an encoder-decoder that generates can.")
    with torch.device("meta"):
        expected = _kinds(type(model)(model.config))
    changed = [name for name, kind in _kinds(model).items() if kind is not expected.get(name)]
    if changed:
        raise UserError(
            f"{changed[0]} is not what it is in a plain model: an adapter has to be merged first, and weights that "
            "are quantised or packed already cannot be packed."
        )
    kinds = {f"{p.dtype} {type(p.data).__name__} on {p.device.type}" for p in model.parameters()}
    if kinds not in ({"torch.float32 Tensor on cpu"}, {"torch.bfloat16 Tensor on cpu"}):
        raise UserError(
            f"Only weights of one dtype, float32 or bfloat16, on the CPU can be packed; these are "
            f"{', '.join(sorted(kinds))}. Load them with dtype=torch.float32 and device='cpu'."
        )


def _kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _pack_for(dtype: torch.dtype, int8: bool) -> Pack:
    """The first way that this processor and this build of torch can go.

    Raises:
        UserError: there is none.
    """
    ways: tuple[Pack, ...] = (QuantizedLinear, NarrowLinear) if int8 else (PackedLinear,)
    for pack in ways:
        if multiplies(pack, dtype):
            return pack
    what = "8-bit integers" if int8 else f"packed {dtype}"
    advice = "Load float32 weights, or generate without packing."
    if int8 or dtype == torch.float32:
        advice = "Generate without packing."
    raise UserError(f"This processor, or this build of torch, cannot multiply {what}. {advice}")


def multiplies(pack: Pack, dtype: torch.dtype) -> bool:
    """Whether its products come out right here. Some processors cut off sums of two products of 8-bit integers."""
    layer = nn.Linear(64, 16, bias=False, dtype=dtype)
    layer.weight.data.fill_(1.0)
    try:
        return bool((pack(layer)(torch.ones(1, 64, dtype=dtype)) == 64).all())
    except (AttributeError, RuntimeError):
        return False
