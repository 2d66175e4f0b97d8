"""The specification as a backend: slow, right, on any device and for any input that `ops` lets through."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedseq.backends.one_step import cells
from fusedseq.reference import attention, bias_activation, layer_norm, scan

if TYPE_CHECKING:
    from fusedseq.registry import Call

name = "reference"


class Save(enum.IntEnum):
    """What a forward pass keeps for the backward pass."""

    NOTHING = 0
    GATES = 1  # all that backward needs
    STATES = 2  # what cannot be formed again from x, y and the weights: an LSTM's cell states


# Columns of the reserve per hidden unit.
_RESERVE = {"lstm": 5, "gru": 4, "gru_reset_before": 3, "rnn_tanh": 0, "rnn_relu": 0}


def missing() -> str | None:
    return None


def supports(call: Call) -> str | None:
    return None


def as_told(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The specification computes in the dtype it is given; autocast has had its say before."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def scan_forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    cells: bool,
    save: int,
    panels: object = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    with as_told(x):
        y, h_n, c_n, c_all = scan.forward(
            cell, x, h0, c0, weights,
            bidirectional=bidirectional, batch_first=batch_first,
            lengths=lengths, batch_sizes=batch_sizes, resets=resets, cells=cells,
        )  # fmt: skip
    c_all = None if c_all is None else c_all.contiguous()
    # Zeros, not whatever the memory held: the outputs of an operator are compared between runs.
    reserve = reserve_like(cell, x, weights, bidirectional, save).zero_() if save else None
    return y.contiguous(), h_n, c_n, c_all, reserve


def reserve_columns(cell: str, weights: Sequence[Tensor], save: int) -> int:
    gates = 4 if cell == "lstm" else 3 if cell.startswith("gru") else 1
    per_unit = int(cell == "lstm") if save == Save.STATES else _RESERVE[cell]
    return per_unit * (weights[1].shape[0] // gates)


def reserve_like(
    cell: str, x: Tensor, weights: Sequence[Tensor], bidirectional: bool, save: int = Save.GATES
) -> Tensor:
    """An unwritten reserve of the contract's shape [D, rows, S]; the specification itself keeps nothing in it."""
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2 if bidirectional else 1, rows, reserve_columns(cell, weights, save)), dtype=dtype)


def scan_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    with as_told(x):
        dx, dh0, dc0, dweights = scan.backward(
            cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights,
            bidirectional=bidirectional, batch_first=batch_first,
            lengths=lengths, batch_sizes=batch_sizes, resets=resets, cells=dc_all is not None,
        )  # fmt: skip
    return dx.contiguous() if need_dx else None, dh0, dc0, dweights if need_dw else []


cell_forward, cell_backward = cells(scan_forward, scan_backward)


def attention_forward(p: attention.Problem) -> tuple[Tensor, Tensor]:
    with as_told(p.q):
        return attention.forward(p)


def attention_backward(
    p: attention.Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],  # of q, k, v, bias, alibi_slopes, sinks
) -> tuple[Tensor | None, ...]:
    with as_told(p.q):
        grads = attention.backward(p, dout, dlse)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def layer_norm_forward(p: layer_norm.Problem) -> tuple[Tensor, Tensor | None]:
    with as_told(p.x):
        return layer_norm.forward(p)


def layer_norm_backward(
    p: layer_norm.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    with as_told(p.x):
        grads = layer_norm.backward(p, upstream[0], upstream[1])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def bias_activation_forward(p: bias_activation.Problem, out: Tensor | None = None) -> tuple[Tensor]:
    with as_told(p.x):
        return bias_activation.forward(p)


def bias_activation_backward(
    p: bias_activation.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    assert upstream[0] is not None
    with as_told(p.x):
        grads = bias_activation.backward(p, upstream[0])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
