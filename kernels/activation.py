"""Activations of feed-forward networks, value and derivative: what csrc/cells/activation.h states for C++."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels.cells import exp_negative, sigmoid

# F(-a) = e^(-a^2/2) q p(2 q - 1) with q = 1 / (1 + a/4): see csrc/cells/activation.h.
_P0 = tl.constexpr(float.fromhex("0x1.82b4bcp-3"))
_P1 = tl.constexpr(float.fromhex("0x1.373e38p-3"))
_P2 = tl.constexpr(float.fromhex("0x1.8c6d90p-4"))
_P3 = tl.constexpr(float.fromhex("0x1.7dffeep-5"))
_P4 = tl.constexpr(float.fromhex("0x1.eed8f4p-7"))
_P5 = tl.constexpr(float.fromhex("0x1.ed2f4ep-10"))
_P6 = tl.constexpr(float.fromhex("-0x1.cd803ep-11"))
_P7 = tl.constexpr(float.fromhex("-0x1.9abfa6p-12"))
_P8 = tl.constexpr(float.fromhex("0x1.8c5abcp-15"))
_P9 = tl.constexpr(float.fromhex("0x1.0750a6p-15"))
_C = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_C3 = tl.constexpr(1.5957691216057308 * 0.044715)
_BELL = tl.constexpr(0.39894228040143268)  # 1 / sqrt(2 pi)


@triton.jit
def _normal(x):
    """The normal distribution function of x, and e^(-x^2/2)."""
    q = 1.0 / (tl.abs(x) * 0.25 + 1.0)
    t = q + q - 1.0
    p = ((((_P9 * t + _P8) * t + _P7) * t + _P6) * t + _P5) * t + _P4
    p = (((p * t + _P3) * t + _P2) * t + _P1) * t + _P0
    bell = exp_negative(x * x * -0.5)
    tail = bell * (q * p)
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def forward(x, NAME: tl.constexpr):
    if NAME == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays
    if NAME == "gelu":
        cumulative, _ = _normal(x)
        return x * cumulative
    if NAME == "gelu_tanh":
        return x * sigmoid(x * (x * x * _C3 + _C))
    if NAME == "silu":
        return x * sigmoid(x)
    return x


@triton.jit
def backward(x, NAME: tl.constexpr):
    """The derivative at x."""
    if NAME == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    if NAME == "gelu":
        cumulative, bell = _normal(x)
        return x * _BELL * bell + cumulative
    if NAME == "gelu_tanh":
        s = sigmoid(x * (x * x * _C3 + _C))
        return x * (x * x * (3.0 * _C3) + _C) * (s - s * s) + s
    if NAME == "silu":
        s = sigmoid(x)
        return x * (s - s * s) + s
    return x * 0.0 + 1.0
