"""Residual connection, dropout and layer normalisation (Ba et al. 2016, arXiv:1607.06450), as they follow each other in
a Transformer's layer (Vaswani et al. 2017, arXiv:1706.03762, section 5.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedseq.reference.dropout import dropout_scale


class Problem(NamedTuple):
    """One call, validated; what backends are given. All tensors but the seed have the dtype of x."""

    x: Tensor  # [..., d]
    residual: Tensor | None = None  # [..., d]
    weight: Tensor | None = None  # [d]
    bias: Tensor | None = None  # [d]
    seed: Tensor | None = None  # one int64, given if dropout_p > 0
    eps: float = 1e-5
    dropout_p: float = 0.0
    return_sum: bool = False


def _compute(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _scale(p: Problem, dtype: torch.dtype) -> Tensor | None:
    if not p.dropout_p:
        return None
    assert p.seed is not None
    return dropout_scale(p.x.shape, p.dropout_p, p.seed.to(p.x.device), dtype)


def _sum(p: Problem, dtype: torch.dtype) -> Tensor:
    """residual + dropout(x)."""
    scale, s = _scale(p, dtype), p.x.to(dtype)
    if scale is not None:
        s = torch.where(scale == 0, 0.0, s * scale)
    return s if p.residual is None else s + p.residual.to(dtype)


def _normalize(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # n [..., d], 1 / sqrt(var + eps) [..., 1]
    if s.shape[-1] == 0:
        return s, s.new_ones((*s.shape[:-1], 1))
    centred = s - s.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left of a mean far from 0
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def forward(p: Problem, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """out [..., d], and the sum [..., d] that was normalised if it is wanted."""
    dtype = compute_dtype or _compute(p.x)
    s = _sum(p, dtype)
    out, _ = _normalize(s, p.eps)
    if p.weight is not None:
        out = out * p.weight.to(dtype)
    if p.bias is not None:
        out = out + p.bias.to(dtype)
    return out.to(p.x.dtype), s.to(p.x.dtype) if p.return_sum else None


def backward(
    p: Problem, dout: Tensor | None, dsum: Tensor | None, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, residual, weight and bias, by hand; in turn differentiable.

    With g = weight dout and n the normalised sum, that of the sum is rstd (g - mean(g) - n mean(g n)) + dsum.
    """
    dtype = compute_dtype or _compute(p.x)
    n, rstd = _normalize(_sum(p, dtype), p.eps)
    over = tuple(range(p.x.dim() - 1))
    ds, dy = torch.zeros_like(n), torch.zeros_like(n)
    if dout is not None and p.x.shape[-1]:
        dy = dout.to(dtype)
        g = dy if p.weight is None else dy * p.weight.to(dtype)
        ds = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    if dsum is not None:
        ds = ds + dsum.to(dtype)
    scale = _scale(p, dtype)
    dx = ds if scale is None else torch.where(scale == 0, 0.0, ds * scale)
    # A sum over no dimensions would be one over all of them.
    dweight = None if p.weight is None else ((dy * n).sum(over) if over else dy * n).to(p.x.dtype)
    dbias = None if p.bias is None else (dy.sum(over) if over else dy).to(p.x.dtype)
    return dx.to(p.x.dtype), ds.to(p.x.dtype), dweight, dbias
