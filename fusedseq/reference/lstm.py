"""One step of the long short-term memory.

Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers, Schmidhuber & Cummins (2000)
and, optionally, the recurrent projection of Sak, Senior & Beaufays (2014). No peepholes; gates in the order i, f, g, o.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def step(
    gx: Tensor,  # [B, 4H]  W_ih x + b_ih
    h: Tensor,  # [B, R]
    c: Tensor,  # [B, H]
    w_hh: Tensor,  # [4H, R]
    b_hh: Tensor | None = None,  # [4H]
    w_hr: Tensor | None = None,  # [R, H]
) -> tuple[Tensor, Tensor, Saved]:  # h' [B, R], c' [B, H], saved: five of [B, H]
    """Advance one step (Gers et al. 2000, section 3; Sak et al. 2014, equations 1 to 6).

    Saved for the backward step: the activated gates i, f, g, o and the new cell state.
    """
    i, f, g, o = (gx + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_new = f * c + i * g
    m = hidden(o, c_new)
    h_new = m if w_hr is None else F.linear(m, w_hr)
    return h_new, c_new, (i, f, g, o, c_new)


def hidden(o: Tensor, c_new: Tensor) -> Tensor:  # [B, H], [B, H] -> [B, H]
    """The cell's output before the projection."""
    return o * c_new.tanh()


def step_backward(
    dh_new: Tensor,  # [B, R]
    dc_new: Tensor,  # [B, H]
    saved: Saved,
    c: Tensor,  # [B, H]  the cell state before the step
    w_hh: Tensor,  # [4H, R]
    w_hr: Tensor | None = None,  # [R, H]
) -> tuple[Tensor, Tensor, Tensor]:  # dgates [B, 4H], dh [B, R], dc [B, H]
    """Reverse `step`. `dgates` is the gradient of the pre-activations, so of gx and of W_hh h + b_hh alike."""
    i, f, g, o, c_new = saved
    tanh_c = c_new.tanh()
    dm = dh_new if w_hr is None else dh_new @ w_hr
    dc_new = dc_new + dm * o * (1 - tanh_c * tanh_c)
    di = dc_new * g * i * (1 - i)
    df = dc_new * c * f * (1 - f)
    dg = dc_new * i * (1 - g * g)
    do = dm * tanh_c * o * (1 - o)
    dgates = torch.cat([di, df, dg, do], dim=-1)
    return dgates, dgates @ w_hh, dc_new * f
