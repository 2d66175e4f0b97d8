"""The math of each cell in Triton: what `csrc/cells` states for C++, saving the same values in the same form.

Everything is float32. exp, sigmoid and tanh are formed as in csrc/cells/math.h, and so keep their digits near 0 and in
the tails, which neither the hardware's approximations nor 2 sigmoid(2x) - 1 do.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HI = tl.constexpr(float.fromhex("0x1.62e4p-1"))  # so short that its product with a whole number is exact
_LN2_LO = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no digit behind the point
_Q0 = tl.constexpr(0.5)
_Q1 = tl.constexpr(float.fromhex("0x1.5554aep-3"))
_Q2 = tl.constexpr(float.fromhex("0x1.555484p-5"))
_Q3 = tl.constexpr(float.fromhex("0x1.12296ep-7"))
_Q4 = tl.constexpr(float.fromhex("0x1.6d9b08p-10"))
_EXP_FLOOR = tl.constexpr(-87.0)  # e^x is subnormal below
_TANH_CEIL = tl.constexpr(20.0)  # tanh(x) rounds to 1 for 2 x above


@triton.jit
def _expm1_reduced(x):
    """e^r - 1 and 2^n, such that e^x = 2^n e^r; 2^n must be a normal number."""
    n = (x * _LOG2E + _ROUND) - _ROUND
    r = (x - n * _LN2_HI) - n * _LN2_LO
    q = (((_Q4 * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0
    return r * r * q + r, ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_negative(x):
    """e^x for x <= 0; 0 where that is subnormal."""
    small = x < _EXP_FLOOR
    e, scale = _expm1_reduced(tl.where(small, _EXP_FLOOR, x))
    return tl.where(small, 0.0, e * scale + scale)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), through t = e^-|x|."""
    t = exp_negative(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def tanh(x):
    """m / (m + 2) with m = e^2|x| - 1."""
    a = 2.0 * tl.abs(x)
    e, scale = _expm1_reduced(tl.where(a > _TANH_CEIL, _TANH_CEIL, a))
    m = scale * e + (scale - 1.0)
    y = m / (m + 2.0)
    return tl.where(x < 0, -y, y)


@triton.jit
def d_sigmoid(y):
    return y - y * y


@triton.jit
def d_tanh(y):
    return 1.0 - y * y


@triton.jit
def lstm_fwd(i, f, g, o, c_prev):
    """Pre-activations to i, f, g, o (activated), c and h."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_bwd(i, f, g, o, c, c_prev, dh, dc):
    """Gradients of the four pre-activations and of c_prev; dc is what reaches c from later steps."""
    tc = tanh(c)
    d = dh * o * d_tanh(tc) + dc
    return d * g * d_sigmoid(i), d * c_prev * d_sigmoid(f), d * i * d_tanh(g), dh * tc * d_sigmoid(o), d * f


@triton.jit
def gru_fwd(r, z, xn, hn, h_prev):
    """Reset after the product, hn = W_hn h + b_hn: r, z, n (activated) and h."""
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(r * hn + xn)
    return r, z, n, gru_blend(z, n, h_prev)


@triton.jit
def gru_blend(z, n, h_prev):
    return z * (h_prev - n) + n


@triton.jit
def gru_bwd(r, z, n, hn, h_prev, dh):
    """Gradients of r, z, n (pre-activations), of hn, and of h_prev as far as it bypasses the products."""
    dn, dz, dh_prev = gru_before_bwd(z, n, h_prev, dh)
    return dn * hn * d_sigmoid(r), dz, dn, dn * r, dh_prev


@triton.jit
def gru_before_bwd(z, n, h_prev, dh):
    """Reset before the product: gradients of n, z and h_prev that need no product; dr is in gru_before_bwd_reset."""
    return (dh - dh * z) * d_tanh(n), dh * (h_prev - n) * d_sigmoid(z), dh * z


@triton.jit
def gru_before_bwd_reset(r, h_prev, drh, dh_prev):
    """dr and the whole of dh_prev from the gradient of r h_prev, which is dn W_hn."""
    return drh * h_prev * d_sigmoid(r), drh * r + dh_prev


@triton.jit
def rnn_fwd(a, RELU: tl.constexpr):
    # Not maximum(), which on a GPU would turn NaN into 0.
    return tl.where(a < 0, 0.0, a) if RELU else tanh(a)


@triton.jit
def rnn_bwd(h, dh, RELU: tl.constexpr):
    return dh * tl.where(h <= 0, 0.0, 1.0) if RELU else dh * d_tanh(h)
