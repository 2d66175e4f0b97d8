"""One step of the gated recurrent unit, in both of its forms; gates in the order r, z, n.

`step` applies the reset gate after the recurrent product (Cho et al. 2014, arXiv:1406.1078v1, and torch, cuDNN);
`step_reset_before` applies it to the state before the product (Cho et al. 2014, arXiv:1406.1078v3, equation 8, and
Keras v1).
Both use the torch convention h' = (1 - z) n + z h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = tuple[Tensor, ...]


def step(
    gx: Tensor,  # [B, 3H]  W_ih x + b_ih
    h: Tensor,  # [B, H]
    w_hh: Tensor,  # [3H, H]
    b_hh: Tensor | None = None,  # [3H]
) -> tuple[Tensor, Saved]:  # h' [B, H], saved: four of [B, H]
    """Advance one step. Saved: the activated r, z, n and q = W_hn h + b_hn, the product that r scales."""
    xr, xz, xn = gx.chunk(3, dim=-1)
    hr, hz, q = F.linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r = (xr + hr).sigmoid()
    z = (xz + hz).sigmoid()
    n = (xn + r * q).tanh()
    return (1 - z) * n + z * h, (r, z, n, q)


def step_backward(
    dh_new: Tensor,  # [B, H]
    saved: Saved,
    h: Tensor,  # [B, H]  the state before the step
    w_hh: Tensor,  # [3H, H]
) -> tuple[Tensor, Tensor, Tensor]:  # dgx [B, 3H], dgh [B, 3H], dh [B, H]
    """Reverse `step`. `dgx` belongs to gx and `dgh` to W_hh h + b_hh: they differ in the n gate by the factor r."""
    r, z, n, q = saved
    dn = dh_new * (1 - z) * (1 - n * n)
    dz = dh_new * (h - n) * z * (1 - z)
    dr = dn * q * r * (1 - r)
    dgx = torch.cat([dr, dz, dn], dim=-1)
    dgh = torch.cat([dr, dz, dn * r], dim=-1)
    return dgx, dgh, dh_new * z + dgh @ w_hh


def step_reset_before(
    gx: Tensor,  # [B, 3H]  W_ih x + b_ih
    h: Tensor,  # [B, H]
    w_hh: Tensor,  # [3H, H]
    b_hh: Tensor | None = None,  # [3H]
) -> tuple[Tensor, Saved]:  # h' [B, H], saved: three of [B, H]
    """Advance one step; the n gate sees W_hn (r h) + b_hn. Saved: the activated r, z, n."""
    H = h.shape[-1]
    x_rz, xn = gx[..., : 2 * H], gx[..., 2 * H :]
    b_rz, b_n = (None, None) if b_hh is None else (b_hh[: 2 * H], b_hh[2 * H :])
    r, z = (x_rz + F.linear(h, w_hh[: 2 * H], b_rz)).sigmoid().chunk(2, dim=-1)
    n = (xn + F.linear(r * h, w_hh[2 * H :], b_n)).tanh()
    return (1 - z) * n + z * h, (r, z, n)


def step_reset_before_backward(
    dh_new: Tensor,  # [B, H]
    saved: Saved,
    h: Tensor,  # [B, H]  the state before the step
    w_hh: Tensor,  # [3H, H]
) -> tuple[Tensor, Tensor]:  # dgates [B, 3H], dh [B, H]
    """Reverse `step_reset_before`. The weight gradient of the n gate pairs with r h, that of r and z with h."""
    r, z, n = saved
    H = h.shape[-1]
    dn = dh_new * (1 - z) * (1 - n * n)
    dz = dh_new * (h - n) * z * (1 - z)
    drh = dn @ w_hh[2 * H :]
    dr = drh * h * r * (1 - r)
    dgates = torch.cat([dr, dz, dn], dim=-1)
    return dgates, dh_new * z + drh * r + dgates[..., : 2 * H] @ w_hh[: 2 * H]
