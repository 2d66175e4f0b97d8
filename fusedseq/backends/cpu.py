"""The compiled core for CPUs: adapts tensors to `fusedseq._cpu` and says what it supports.

The core takes addresses, sizes and strides; allocation, density of the last dimension and the thread count are settled
here. Every output is written by the core, so nothing is zeroed first except what lies beyond a row's length.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedseq import config
from fusedseq.backends.cpu_attention import attention_backward, attention_forward, plain_attention
from fusedseq.backends.cpu_rows import (
    bias_activation_backward,
    bias_activation_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from fusedseq.backends.reference import Save, reserve_columns, reserve_like
from fusedseq.backends.tensors import CELLS as _CELLS
from fusedseq.backends.tensors import DTYPES as _DTYPES
from fusedseq.backends.tensors import GATES as _GATES
from fusedseq.backends.tensors import dense as _dense
from fusedseq.backends.tensors import dense_rows as _dense_rows
from fusedseq.backends.tensors import pointer as _pointer
from fusedseq.backends.tensors import rows as _rows
from fusedseq.backends.tensors import sizes as _sizes

if TYPE_CHECKING:
    from fusedseq.registry import Call

__all__ = [
    "attention_backward", "attention_forward", "bias_activation_backward", "bias_activation_forward", "cell_backward",
    "cell_forward", "device", "layer_norm_backward", "layer_norm_forward", "missing", "name", "plain_attention",
    "scan_backward",
    "scan_forward", "step", "supports",
]  # fmt: skip

name = "cpu"
device = "cpu"

_core: Any
try:
    from fusedseq import _cpu as _core
except ImportError as error:
    _core = None
    _why_missing = f"the compiled core fusedseq._cpu does not load ({error})"
else:
    _why_missing = ""
    if config.settings.isa in _core.isas():  # a cap above what the machine has caps nothing
        _core.set_isa(config.settings.isa)

_threads = torch.get_num_threads


class _Local(threading.local):
    """Each thread's calls share one scratch."""

    def __init__(self) -> None:
        self.scratch = _core.Scratch(config.settings.scratch_mb << 20)


_local: Any = _Local() if _core is not None else None


def missing() -> str | None:
    return _why_missing or None


def supports(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it runs on the CPU, the tensors are on {call.device}"
    if call.dtype not in _DTYPES:
        return f"it has no kernel for {call.dtype}"
    return None


def _weights(weights: Sequence[Tensor], directions: int) -> tuple[tuple[int | None, ...], ...]:
    """Per direction the addresses of w_ih, w_hh, b_ih, b_hh, w_hr; see the contract for which are there."""
    count = len(weights) // directions
    bias, projection = count >= 4, count in (3, 5)
    table = []
    for d in range(directions):
        w = weights[d * count : (d + 1) * count]
        table.append((
            w[0].data_ptr(), w[1].data_ptr(),
            w[2].data_ptr() if bias else None, w[3].data_ptr() if bias else None,
            w[-1].data_ptr() if projection else None,
        ))  # fmt: skip
    return tuple(table)


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
    panels: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    directions = 2 if bidirectional else 1
    packed = batch_sizes is not None
    sizes = _sizes(cell, x, h0, weights, directions, batch_first, batch_sizes)
    _, batch, _, hidden, state, _ = sizes
    x, weights = _dense_rows(x), _dense(weights)
    h0, c0 = (None if s is None else s.contiguous() for s in (h0, c0))
    # Rows past a length are not visited.
    make = x.new_empty if lengths is None else x.new_zeros
    y = make((*x.shape[:-1], directions * state))
    c_all = make((*x.shape[:-1], directions * hidden)) if cells else None
    h_n = x.new_empty((directions, batch, state))
    c_n = x.new_empty((directions, batch, hidden)) if cell == "lstm" else None
    reserve = reserve_like(cell, x, weights, bidirectional, save) if save else None
    _core.scan_forward(
        _local.scratch, _CELLS[cell], _DTYPES[x.dtype], _threads(), sizes, _rows(x, packed, batch_first),
        _pointer(h0), _pointer(c0),
        _weights(weights, directions), _pointer(lengths), _pointer(batch_sizes), _rows(resets, packed, batch_first),
        _rows(y, packed, batch_first), _rows(c_all, packed, batch_first), _pointer(h_n), _pointer(c_n),
        _pointer(reserve), save == Save.STATES, panels,
    )  # fmt: skip
    return y, h_n, c_n, c_all, reserve


def pack(cell: str, weights: Sequence[Tensor], bidirectional: bool) -> Any:
    """The weights of one layer as forward scans read them, for `scan_forward` as long as they are what they were.

    None where the core packs on every call: weights that are not dense.
    """
    if any(not w.is_contiguous() for w in weights):
        return None
    directions = 2 if bidirectional else 1
    (gh, inputs), state = weights[0].shape, weights[1].shape[1]
    sizes = (2, 1, inputs, gh // _GATES[cell], state, directions)
    return _core.Panels(_CELLS[cell], _DTYPES[weights[0].dtype], _threads(), sizes, _weights(weights, directions))


def cell_forward(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], save: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, inputs = x.shape
    hidden, state = weights[1].shape[0] // _GATES[cell], weights[1].shape[1]
    x, weights = _dense_rows(x), _dense(weights)
    if h is not None and not h.is_contiguous():
        h = h.contiguous()
    if c is not None and not c.is_contiguous():
        c = c.contiguous()
    # empty_like takes half the time of new_empty.
    h_new = x.new_empty((batch, state)) if h is None else torch.empty_like(h)
    c_new = None
    if cell == "lstm":
        c_new = x.new_empty((batch, hidden)) if c is None else torch.empty_like(c)
    reserve = reserve_like(cell, x.unsqueeze(0), weights, False) if save else None
    out = h_new.data_ptr()
    _core.scan_forward(
        _local.scratch, _CELLS[cell], _DTYPES[x.dtype], _threads(), (1, batch, inputs, hidden, state, 1),
        (x.data_ptr(), 0, x.stride(0)), _pointer(h), _pointer(c), _weights(weights, 1), None, None, None,
        (out, 0, state), None, out, _pointer(c_new), _pointer(reserve), False, None,
    )  # fmt: skip
    return h_new, c_new, reserve


def cell_backward(
    cell: str,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    h_new: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    batch, inputs = x.shape
    hidden, state = weights[1].shape[0] // _GATES[cell], weights[1].shape[1]
    x, weights = _dense_rows(x), _dense(weights)
    h, c, dh, dc = (None if s is None else s.contiguous() for s in (h, c, dh, dc))
    dx = x.new_empty(x.shape) if need_dx else None
    dh0 = torch.empty_like(h_new)
    dc0 = x.new_empty((batch, hidden)) if cell == "lstm" else None
    dweights = _weight_grads(x, weights) if need_dw else []
    _core.scan_backward(
        _local.scratch, _CELLS[cell], _DTYPES[x.dtype], _threads(), (1, batch, inputs, hidden, state, 1),
        (x.data_ptr(), 0, x.stride(0)), _pointer(h), _pointer(c), _weights(weights, 1), None, None, None,
        (h_new.data_ptr(), 0, state), _pointer(reserve), False, None, None, _pointer(dh), _pointer(dc),
        (dx.data_ptr(), 0, inputs) if dx is not None else None, dh0.data_ptr(), _pointer(dc0),
        _weights(dweights, 1) if need_dw else (),
    )  # fmt: skip
    return dx, dh0, dc0, _stored(dweights, x.dtype)


def step(cell: str, x: Tensor, weights: Sequence[Tensor], layers: int, bidirectional: bool) -> Any:
    """One step of a stack of layers, for calls that repeat; x is [B, I]. None: strides too unusual.

    What comes back is a `_cpu.Step`: its `run`, called with threads, x, h0, c0, y, h_n, c_n, weights and reserve of the
    very same shapes and strides, takes the step. With one layer and direction its `backward` is that of
    `cell_backward`, in types that need no conversion. All but x are dense.
    """
    directions = 2 if bidirectional else 1
    per = len(weights) // (layers * directions)
    if any(not w.is_contiguous() for w in weights) or _dense_rows(x) is not x:
        return None
    sizes = (1, *x.shape, weights[1].shape[0] // _GATES[cell], weights[1].shape[1], directions)
    return _core.Step(_local, _CELLS[cell], _DTYPES[x.dtype], sizes, x.stride(0), layers, per >= 4, per in (3, 5))


def _weight_grads(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Room for the weight gradients, which the core writes in the type it computes in."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype is compute:
        return [torch.empty_like(w) for w in weights]
    return [w.new_empty(w.shape, dtype=compute) for w in weights]


def _stored(grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return grads if not grads or grads[0].dtype == dtype else [g.to(dtype) for g in grads]


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
    directions = 2 if bidirectional else 1
    packed = batch_sizes is not None
    sizes = _sizes(cell, x, h0, weights, directions, batch_first, batch_sizes)
    _, batch, _, hidden, state, _ = sizes
    x, y = _dense_rows(x), _dense_rows(y)
    dy, dc_all = (None if g is None else _dense_rows(g) for g in (dy, dc_all))
    weights = _dense(weights)
    h0, c0, dh_n, dc_n = (None if s is None else s.contiguous() for s in (h0, c0, dh_n, dc_n))
    make = x.new_empty if lengths is None else x.new_zeros
    dx = make(x.shape) if need_dx else None
    dh0 = x.new_empty((directions, batch, state))
    dc0 = x.new_empty((directions, batch, hidden)) if cell == "lstm" else None
    dweights = _weight_grads(x, weights) if need_dw else []
    _core.scan_backward(
        _local.scratch, _CELLS[cell], _DTYPES[x.dtype], _threads(), sizes, _rows(x, packed, batch_first),
        _pointer(h0), _pointer(c0),
        _weights(weights, directions), _pointer(lengths), _pointer(batch_sizes), _rows(resets, packed, batch_first),
        _rows(y, packed, batch_first), _pointer(reserve),
        reserve.shape[2] != reserve_columns(cell, weights, Save.GATES),
        _rows(dy, packed, batch_first), _rows(dc_all, packed, batch_first), _pointer(dh_n), _pointer(dc_n),
        _rows(dx, packed, batch_first), _pointer(dh0), _pointer(dc0),
        _weights(dweights, directions) if need_dw else (),
    )  # fmt: skip
    return dx, dh0, dc0, _stored(dweights, x.dtype)
