"""How attention's tensors [B, H, N, E] lie in memory: as strides, and as the descriptors by which Hopper's copy engine
(TMA) moves whole tiles; part of the backend `triton`."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16  # bytes: what the base and every stride must be a multiple of
FARTHEST = 2**40  # bytes: no stride may be as large


def dense(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def broadcast(t: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a table [1|B, 1|Hq, 1|L, 1|S], 0 where it is broadcast."""
    if t is None:
        return 0, 0, 0, 0
    sb, sh, sl, ss = (0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return sb, sh, sl, ss


def like(t: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An unwritten [B, H, N, width] that lies in memory as t does."""
    B, H, N, _ = t.shape
    if H > 1 and N > 1 and t.stride(1) < t.stride(2):
        return t.new_empty((B, N, H, width), dtype=dtype).transpose(1, 2)
    return t.new_empty((B, H, N, width), dtype=dtype)


def describable(t: Tensor) -> bool:
    """Whether a descriptor can hold the layout: elements of a row side by side, all else aligned, nothing expanded."""
    size = t.element_size()
    if t.numel() == 0 or t.data_ptr() % ALIGNED or (t.stride(3) != 1 and t.shape[3] > 1):
        return False
    steps = [stride * size for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1]
    return all(step % ALIGNED == 0 and 0 < step < FARTHEST for step in steps)


def describe(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """For tiles [1, 1, rows, width]; what lies behind the last row or element reads as 0."""
    # Where there is one entry only, its stride says nothing and may be anything.
    lone = -(-t.shape[3] * t.element_size() // ALIGNED) * ALIGNED // t.element_size()
    steps = [stride if n > 1 else lone for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*steps, 1], [1, 1, rows, width])
