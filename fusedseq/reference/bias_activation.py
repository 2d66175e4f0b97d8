"""Bias, activation, dropout and residual connection: what follows the linear layers of a feed-forward network.

GELU: Hendrycks & Gimpel 2016 (arXiv:1606.08415), exact and by tanh; SiLU: Elfwing et al. 2018 (arXiv:1702.03118).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedseq.reference.dropout import dropout_scale

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


class Problem(NamedTuple):
    """One call, validated; what backends are given. All tensors but the seed have the dtype of x."""

    x: Tensor  # [..., d]
    bias: Tensor | None = None  # [d]
    residual: Tensor | None = None  # [..., d]
    seed: Tensor | None = None  # one int64, given if dropout_p > 0
    activation: str = "identity"
    dropout_p: float = 0.0


def _compute(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _tanh_argument(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + _tanh_argument(x).tanh())
    return x * x.sigmoid() if name == "silu" else x


def derivative(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return torch.where(x <= 0, 0.0, torch.ones_like(x))  # of a NaN 1, as torch has it
    if name == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        t = _tanh_argument(x).tanh()
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    if name == "silu":
        s = x.sigmoid()
        return s + x * s * (1 - s)
    return torch.ones_like(x)


def _input(p: Problem, dtype: torch.dtype) -> Tensor:
    x = p.x.to(dtype)
    return x if p.bias is None else x + p.bias.to(dtype)


def _drop(p: Problem, t: Tensor) -> Tensor:
    if not p.dropout_p:
        return t
    assert p.seed is not None
    scale = dropout_scale(p.x.shape, p.dropout_p, p.seed.to(t.device), t.dtype)
    return torch.where(scale == 0, 0.0, t * scale)


def forward(p: Problem, compute_dtype: torch.dtype | None = None) -> tuple[Tensor]:
    """out [..., d] = residual + dropout(activation(x + bias))."""
    dtype = compute_dtype or _compute(p.x)
    y = _drop(p, activate(p.activation, _input(p, dtype)))
    return ((y if p.residual is None else y + p.residual.to(dtype)).to(p.x.dtype),)


def backward(
    p: Problem, dout: Tensor, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, bias and residual, by hand; in turn differentiable."""
    dtype = compute_dtype or _compute(p.x)
    dx = _drop(p, dout.to(dtype)) * derivative(p.activation, _input(p, dtype))
    over = tuple(range(p.x.dim() - 1))
    # A sum over no dimensions would be one over all of them.
    dbias = None if p.bias is None else (dx.sum(over) if over else dx).to(p.x.dtype)
    return dx.to(p.x.dtype), dbias, dout.to(p.x.dtype)
