"""Products around and within the scans of the CUDA backend that torch's library forms, and the types they are in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedseq.backends import tensors

HALF = (torch.bfloat16, torch.float16)
WORKSPACE_UNIT = 256
# Weights of a direction from which on tier step has torch's library form its products: a call of it costs some 90 us on
# the host, the kernel's own product as much with so many weights.
LIBRARY = 2**21


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32(dtype: torch.dtype) -> bool:
    """Whether the products of the recurrence may round their operands to TF32: 10 bits of mantissa, float32 sums.

    What torch's own recurrent layers ask on a GPU: `torch.backends.cudnn.rnn.fp32_precision`, and before torch 2.9
    `torch.backends.cudnn.allow_tf32`. Read by every call, forward and backward alike.
    """
    if dtype != torch.float32:
        return False
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


@functools.cache
def _wide_products() -> bool:
    """Whether torch multiplies halves into float32."""
    return hasattr(torch.ops.aten.mm, "dtype")


def product_of(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # [M, K] x [K, N]
    """a b in `dtype`, summed in float32 at least and rounded once."""
    if a.dtype not in HALF:
        return a @ b
    if a.is_cuda and a.dtype == dtype:
        return a @ b
    if a.is_cuda and _wide_products():
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


def products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # [D, M, K] x [D, K, N]
    if a.dtype in HALF and a.is_cuda and _wide_products():
        return torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def product_of_steps(
    core: Any, cell: str, chosen: Any, workspace: Tensor, weights: list[Tensor], B: int, backward: bool, rounded: bool
) -> Callable[[int], int] | None:
    """Tier `step`: the recurrent product of a turn by torch's library, its address; None where the kernel forms it.

    weights: W_hh [G*H, R] of each direction.
    """
    single = weights[0].dtype == torch.float32
    if core.tiers[chosen.tier] != "step" or cell == "gru_reset_before" or weights[0].numel() < LIBRARY:
        return None
    if single and not rounded and weights[0].is_cuda and tensors.matmul_tf32():
        return None  # torch would round what must not be rounded
    D, K = len(weights), weights[0].shape[0 if backward else 1]
    first = aligned(workspace) - workspace.data_ptr()
    size = D * B * K * weights[0].element_size()
    fed = [
        workspace[first + at : first + at + size].view(weights[0].dtype).view(D, B, K) for at in (0, chosen.second_fed)
    ]
    factors = [w if backward else w.t() for w in weights]
    factor = factors[0] if D == 1 else torch.stack(factors)
    S = compute(factor.dtype)
    kept: list[Tensor] = []

    def product(turn: int) -> int:
        state = fed[turn & 1]
        made = product_of(state[0], factor, S) if D == 1 else products(state, factor, S)
        kept[:] = [made]  # until the next launch is enqueued
        return made.data_ptr()

    return product


def aligned(memory: Tensor) -> int:
    return -(-memory.data_ptr() // WORKSPACE_UNIT) * WORKSPACE_UNIT
