"""`torch.nn.functional.linear`, on our packed products where these are faster and nobody can tell.

Layers call it in place of torch's function. What it takes are eager calls on the CPU in float32 and float64, with
enough rows to pay for packing the weight; all else, and whatever is watched, traced, cast or transformed, is torch's.
A row of the result does not depend on how many others there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq import registry
from fusedseq.backends import cpu_rows
from fusedseq.ops.derivative import is_watched
from fusedseq.ops.rows import is_ordinary
from fusedseq.ops.scan import _is_grad_enabled, is_autocasting

# Taken at import: once somebody has put ours in its place, looking it up would find ourselves.
_torch_linear = F.linear
_DTYPES = (torch.float32, torch.float64)
_ROWS = 64
_MULTIPLY_ADDS = 1 << 19  # below, calling costs more than is gained


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is computed here. False also for what torch would refuse, so that torch says so."""
    if registry.forced() not in ("", "cpu") or registry.backends()["cpu"].missing() is not None:
        return False
    if not isinstance(x, Tensor) or not is_ordinary((x, weight, bias)) or is_autocasting():
        return False
    dtype = x.dtype
    if dtype not in _DTYPES or not (x.is_cpu and weight.is_cpu) or weight.dtype is not dtype or weight.dim() != 2:
        return False
    N, K = weight.shape
    if bias is not None and (bias.dtype is not dtype or bias.shape != (N,) or not bias.is_cpu):
        return False
    if x.dim() < 2 or x.shape[-1] != K or not N or not K:
        return False
    rows = x.numel() // K
    return rows >= _ROWS and rows * N * K >= _MULTIPLY_ADDS


class _Linear(torch.autograd.Function):
    apply: Any

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return cpu_rows.linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not is_watched(dy) and is_ordinary((dy, x, weight)):
            return cpu_rows.linear_backward(dy, x, weight, needs)
        rows = dy.reshape(-1, weight.shape[0])
        dx = dy @ weight if needs[0] else None
        dw = rows.transpose(0, 1) @ x.reshape(-1, weight.shape[1]) if needs[1] else None
        return dx, dw, rows.sum(0) if needs[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, x [..., K], weight [N, K] and bias [N]; arguments, results and errors are torch's."""
    if not takes(x, weight, bias):
        return _torch_linear(x, weight, bias)
    if _is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    return cpu_rows.linear_forward(x, weight, bias)
