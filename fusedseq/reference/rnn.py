"""One step of the simple recurrent network: Elman, "Finding Structure in Time" (1990), with tanh or ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step(
    gx: Tensor,  # [B, H]  W_ih x + b_ih
    h: Tensor,  # [B, H]
    w_hh: Tensor,  # [H, H]
    b_hh: Tensor | None = None,  # [H]
    *,
    relu: bool = False,
) -> Tensor:  # h' [B, H], which is all that the backward step needs
    """Advance one step: h' = act(W_ih x + b_ih + W_hh h + b_hh)."""
    a = gx + F.linear(h, w_hh, b_hh)
    return a.relu() if relu else a.tanh()


def step_backward(
    dh_new: Tensor,  # [B, H]
    h_new: Tensor,  # [B, H]
    w_hh: Tensor,  # [H, H]
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:  # dgates [B, H], dh [B, H]
    """Reverse `step`; at the kink of the ReLU the derivative is 0, as in torch."""
    dgates = torch.where(h_new > 0, dh_new, 0.0) if relu else dh_new * (1 - h_new * h_new)
    return dgates, dgates @ w_hh
