"""Normalisation, bias and activation, linear layers on the compiled core for CPUs; part of the backend `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedseq.reference import bias_activation, layer_norm
from fusedseq.reference.attention import threshold

_core: Any
try:
    from fusedseq import _cpu as _core
except ImportError:
    _core = None

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {name: i for i, name in enumerate(bias_activation.ACTIVATIONS)}
_threads = torch.get_num_threads


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Dtype, rows, d."""
    d = x.shape[-1]
    return _DTYPES[x.dtype], x.numel() // d if d else 0, d


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, float, int] | None:
    if not dropout_p or seed is None:
        return None
    scale = 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    return threshold(dropout_p), scale, int(seed) & 0xFFFFFFFFFFFFFFFF


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _sum(x: Tensor) -> Tensor:
    """An unwritten sum over the rows of x, in the type that the core computes in."""
    return x.new_empty(x.shape[-1:], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def layer_norm_forward(p: layer_norm.Problem) -> tuple[Tensor, Tensor | None]:
    tensors = [_dense(t) for t in p[:4]]
    out, total = _like(p.x), _like(p.x) if p.return_sum else None
    _core.layer_norm_forward(
        _threads(), *_sizes(p.x), p.eps, _dropout(p.dropout_p, p.seed), tuple(map(_pointer, tensors)), out.data_ptr(),
        _pointer(total),
    )  # fmt: skip
    return out, total


def layer_norm_backward(
    p: layer_norm.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias. Without dropout those of x and residual are one tensor."""
    tensors = [_dense(t) for t in p[:4]]
    upstream = [_dense(t) for t in upstream]
    # Without dropout one gradient serves both.
    dx = _like(p.x) if needs[0] or (needs[1] and not p.dropout_p) else None
    dresidual = _like(p.x) if needs[1] and p.dropout_p else None
    dweight, dbias = (_sum(p.x) if need else None for need in needs[2:])
    grads = (dx, dresidual, dweight, dbias)
    _core.layer_norm_backward(
        _threads(), *_sizes(p.x), p.eps, _dropout(p.dropout_p, p.seed), tuple(map(_pointer, tensors)),
        tuple(map(_pointer, upstream)), tuple(map(_pointer, grads)),
    )  # fmt: skip
    return (
        dx if needs[0] else None,
        (dresidual if p.dropout_p else dx) if needs[1] else None,
        None if dweight is None else dweight.to(p.x.dtype),
        None if dbias is None else dbias.to(p.x.dtype),
    )


def bias_activation_forward(p: bias_activation.Problem, out: Tensor | None = None) -> tuple[Tensor]:
    """`out`, if given, is written to where possible; it may be x itself."""
    tensors = [_dense(t) for t in p[:3]]
    out = _like(p.x) if out is None or not out.is_contiguous() else out
    dtype, rows, d = _sizes(p.x)
    _core.bias_activation_forward(
        _threads(), dtype, rows, d, _ACTIVATIONS[p.activation], _dropout(p.dropout_p, p.seed),
        tuple(map(_pointer, tensors)), out.data_ptr(),
    )  # fmt: skip
    return (out,)


def bias_activation_backward(
    p: bias_activation.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and residual; the last is the upstream one itself."""
    dout = _dense(upstream[0])
    assert dout is not None
    dx, dbias = _like(p.x) if needs[0] else None, _sum(p.x) if needs[1] else None
    if dx is not None or dbias is not None:
        tensors = [_dense(t) for t in p[:3]]
        dtype, rows, d = _sizes(p.x)
        _core.bias_activation_backward(
            _threads(), dtype, rows, d, _ACTIVATIONS[p.activation], _dropout(p.dropout_p, p.seed),
            tuple(map(_pointer, tensors)), dout.data_ptr(), _pointer(dx), _pointer(dbias),
        )  # fmt: skip
    return dx, None if dbias is None else dbias.to(p.x.dtype), dout if needs[2] else None


def _matrix(t: Tensor) -> Tensor:
    """[..., n] as rows [M, n] that are dense in themselves."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] weight^T + bias, with weight [N, K]; all of one dtype, float32 or float64, and none of them empty."""
    rows, weight, bias = _matrix(x), weight.contiguous(), _dense(bias)
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    _core.linear_forward(
        _threads(), _DTYPES[x.dtype], (rows.shape[0], N, K), rows.data_ptr(), rows.stride(0), weight.data_ptr(),
        _pointer(bias), y.data_ptr(),
    )  # fmt: skip
    return y


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias."""
    upstream, rows, weight = _matrix(dy), _matrix(x), weight.contiguous()
    N, K = weight.shape
    dx = _like(x) if needs[0] else None
    dw = weight.new_empty((N, K)) if needs[1] else None
    db = weight.new_empty(N) if needs[2] else None
    _core.linear_backward(
        _threads(), _DTYPES[x.dtype], (rows.shape[0], N, K), rows.data_ptr(), rows.stride(0), weight.data_ptr(),
        upstream.data_ptr(), upstream.stride(0), _pointer(dx), _pointer(dw), _pointer(db),
    )  # fmt: skip
    return dx, dw, db
