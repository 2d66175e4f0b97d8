"""How the tensors of a scan become what a compiled core takes: numbers, addresses, strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CELLS = {"lstm": 0, "gru": 1, "gru_reset_before": 2, "rnn_tanh": 3, "rnn_relu": 4}
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def rows(x: Tensor | None, packed: bool, batch_first: bool) -> tuple[int, int, int] | None:
    """Address, time stride, batch stride of a tensor whose last dimension is dense (or, for a mask, absent)."""
    if x is None:
        return None
    stride = x.stride()
    if packed:
        return x.data_ptr(), 0, stride[0]
    return (x.data_ptr(), stride[1], stride[0]) if batch_first else (x.data_ptr(), stride[0], stride[1])


def dense_rows(x: Tensor) -> Tensor:
    """x with a dense last dimension; anything may be broadcast or strided before it."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def matmul_tf32() -> bool:
    """Whether torch's matrix products may round float32 to TF32: `torch.backends.cuda.matmul.fp32_precision`, before
    torch 2.9 `allow_tf32`, which must not be read where the new one was set."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(torch.backends.cuda.matmul.allow_tf32) if precision is None else precision == "tf32"


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def dense(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w if w.is_contiguous() else w.contiguous() for w in weights]


def sizes(
    cell: str, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], directions: int, batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """T, B, I, H, R, D."""
    hidden, state = weights[1].shape[0] // GATES[cell], weights[1].shape[1]
    if batch_sizes is not None:
        batch = h0.shape[1] if h0 is not None else int(batch_sizes[0]) if len(batch_sizes) else 0
        return len(batch_sizes), batch, x.shape[1], hidden, state, directions
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    return steps, batch, x.shape[2], hidden, state, directions


def listed(table: Tensor) -> tuple[Tensor, Tensor]:  # bool [1|B, S] -> int32 [1|B, S], int32 [1|B, S + 1]
    """Positions that are true, in order, with those that are not behind them; and how many stand before each."""
    positions = torch.argsort(table.logical_not().to(torch.uint8), dim=1, stable=True).to(torch.int32)
    ranks = torch.zeros((table.shape[0], table.shape[1] + 1), dtype=torch.int32, device=table.device)
    torch.cumsum(table, 1, dtype=torch.int32, out=ranks[:, 1:])
    return positions, ranks


def batch_stride(table: Tensor) -> int:
    """From one batch row to the next, 0 where there is one for all."""
    return 0 if table.shape[0] == 1 else table.stride(0)
