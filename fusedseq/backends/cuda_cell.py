"""One step of a cell: the products by torch, all that is pointwise by one kernel; part of the backend `cuda`.

`pointwise_forward` and `pointwise_backward` are the kernels with their launch: from pre-activations of the gates, in
any strides, to the states and back. S is the type that is computed in, float32 for half types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedseq.backends import cuda_products as products
from fusedseq.backends import cuda_scan as scans
from fusedseq.backends import tensors
from fusedseq.backends.one_step import cells

# Values saved of each unit.
KEPT = {"lstm": 5, "gru": 4, "gru_reset_before": 3, "rnn_tanh": 0, "rnn_relu": 0}

scan_cell_forward, scan_cell_backward = cells(scans.scan_forward, scans.scan_backward)


class Step(NamedTuple):
    """What enters the pointwise part of a step. G gates; a tensor that is None is zero."""

    cell: str
    gx: Tensor  # [B, G H] S: x W_ih'
    gh: Tensor | None  # [B, G H] S: h W_hh'; [B, 2 H] for "gru_reset_before"
    b_ih: Tensor | None  # [G H]
    b_hh: Tensor | None  # [G H]
    h: Tensor | None  # [B, H]
    c: Tensor | None  # [B, H]


class Gradients(NamedTuple):
    """What comes out of it."""

    gates: Tensor  # [B, G H] of x W_ih' + b_ih
    inner: Tensor  # [B, G H] of h W_hh' + b_hh; the same tensor but for "gru"
    h: Tensor | None  # [B, H] S, GRU only: what reaches h past the products
    c: Tensor | None  # [B, H] LSTM only
    wide: bool  # whether the kernels moved 16 bytes at a time


class States(NamedTuple):
    h: Tensor  # [B, H]
    c: Tensor | None  # [B, H] LSTM only
    kept: Tensor | None  # [B, S H] S: what backward needs, if it is to be saved
    wide: bool  # whether the kernels moved 16 bytes at a time


def _matrix(t: Tensor | None) -> tuple[int, int, int] | None:
    """Address and strides."""
    return None if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def _bias(b: Tensor | None) -> tuple[int, int, int] | None:
    return None if b is None else (b.data_ptr(), 0, b.stride(0))


def _expect(t: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The kernels take addresses: what is wrong must be said before."""
    if t is not None and (t.shape != shape or t.dtype != dtype):
        raise ValueError(f"{name}: expected {dtype} of shape {list(shape)}, got {t.dtype} of shape {list(t.shape)}")


def pointwise_forward(step: Step, w_hn: Tensor | None, dtype: torch.dtype, save: bool) -> States:
    """The new states, in `dtype`, that of biases and states. `w_hn` [H, H] is the product in the middle of
    "gru_reset_before". Raises ValueError for a tensor of another shape or dtype."""
    cell, gx = step.cell, step.gx
    G, S = tensors.GATES[cell], products.compute(dtype)
    before = cell == "gru_reset_before"
    B, H = gx.shape[0], gx.shape[1] // G
    for name, t, shape, kind in (
        ("gx", gx, (B, G * H), S), ("gh", step.gh, (B, (2 if before else G) * H), S),
        ("b_ih", step.b_ih, (G * H,), dtype), ("b_hh", step.b_hh, (G * H,), dtype),
        ("h", step.h, (B, H), dtype), ("c", step.c, (B, H), dtype),
    ):  # fmt: skip
        _expect(t, name, shape, kind)
    h_new = gx.new_empty((B, H), dtype=dtype)
    c_new = torch.empty_like(h_new) if cell == "lstm" else None
    kept = gx.new_empty((B, KEPT[cell] * H), dtype=S) if (save or before) and KEPT[cell] else None
    core, wide = scans._core(), True

    def launch(gh: Tensor | None, out: Tensor, phase: int) -> bool:
        if B == 0 or H == 0:
            return True
        done: bool = core.cell_forward(
            tensors.CELLS[cell], tensors.DTYPES[dtype], phase, B, H,
            {
                "gx": _matrix(gx), "gh": _matrix(gh), "b_ih": _bias(step.b_ih), "b_hh": _bias(step.b_hh),
                "h": _matrix(step.h) if cell.startswith("gru") else None,
                "c": _matrix(step.c) if cell == "lstm" else None, "h_new": _matrix(out), "c_new": _matrix(c_new),
                "kept": _matrix(kept), "stream": stream,
            },
        )  # fmt: skip
        return done

    with scans._on(gx) as stream:
        if before:
            reset = torch.empty_like(h_new)
            wide = launch(step.gh, reset, 0)
            assert w_hn is not None
            wide &= launch(None if step.h is None else products.product_of(reset, w_hn.t(), S), h_new, 1)
        else:
            wide = launch(step.gh, h_new, 0)
    return States(h_new, c_new, kept if save else None, wide)


def pointwise_backward(
    step: Step, w_hn: Tensor | None, kept: Tensor | None, h_new: Tensor, dh: Tensor | None, dc: Tensor | None,
    exact: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of both products and of the states, those of the products in the dtype of `h_new` [B, H]. An RNN reads
    the state after, from `exact` [B, H] S if that is given; others what was `kept`. Of `step` only the states before
    are read. Raises ValueError for a tensor of another shape or dtype."""
    cell = step.cell
    B, H = h_new.shape
    dtype, G = h_new.dtype, tensors.GATES[cell]
    S = products.compute(dtype)
    for name, t, shape, kind in (
        ("kept", kept, (B, KEPT[cell] * H), S), ("h", step.h, (B, H), dtype), ("c", step.c, (B, H), dtype),
        ("dh", dh, (B, H), dtype), ("dc", dc, (B, H), dtype), ("exact", exact, (B, H), S),
    ):  # fmt: skip
        _expect(t, name, shape, kind)
    gates = h_new.new_empty((B, G * H))
    inner = torch.empty_like(gates) if cell == "gru" else gates
    dh_past = h_new.new_empty((B, H), dtype=S) if cell.startswith("gru") else None
    dc_past = h_new.new_empty((B, H)) if cell == "lstm" else None
    y = None if not cell.startswith("rnn") else h_new.to(S) if exact is None else exact
    core = scans._core()

    def launch(drh: Tensor | None, phase: int) -> bool:
        if B == 0 or H == 0:
            return True
        done: bool = core.cell_backward(
            tensors.CELLS[cell], tensors.DTYPES[dtype], phase, B, H,
            {
                "kept": _matrix(kept), "y": _matrix(y),
                "h": _matrix(step.h) if cell.startswith("gru") else None,
                "c": _matrix(step.c) if cell == "lstm" else None,
                "dc": _matrix(dc) if cell == "lstm" else None, "dh": _matrix(dh),
                "drh": _matrix(drh), "dgates": _matrix(gates), "dinner": _matrix(inner) if cell == "gru" else None,
                "dh_past": _matrix(dh_past), "dc_past": _matrix(dc_past), "stream": stream,
            },
        )  # fmt: skip
        return done

    with scans._on(h_new) as stream:
        wide = launch(None, 0)
        if cell == "gru_reset_before":
            assert w_hn is not None
            wide &= launch(products.product_of(gates[:, 2 * H :], w_hn, S), 1)
    return Gradients(gates, inner, dh_past, dc_past, wide)


def _recurrent(cell: str, w_hh: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of W_hh that meet h, and those that meet r h instead."""
    n = 2 * w_hh.shape[1]
    return (w_hh[:n], w_hh[n:]) if cell == "gru_reset_before" else (w_hh, None)


def cell_forward(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], save: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    p = scans._Parameters.of(weights, 1)
    if p.w_hr:  # a projection makes another product of what this kernel would end with
        out: tuple[Tensor, Tensor | None, Tensor | None] = scan_cell_forward(cell, x, h, c, weights, save)
        return out
    S, core = products.compute(x.dtype), scans._core()
    with scans._on(x) as stream:
        w_hh, w_hn = _recurrent(cell, p.w_hh[0])
        gh = None if h is None else products.product_of(h, w_hh.t(), S, core, stream)
        b_ih, b_hh = (p.b_ih[0], p.b_hh[0]) if p.b_ih else (None, None)
        step = Step(cell, products.product_of(x, p.w_ih[0].t(), S, core, stream), gh, b_ih, b_hh, h, c)
        new = pointwise_forward(step, w_hn, x.dtype, bool(save))
    if not save:
        return new.h, new.c, None
    # An RNN keeps nothing, in the shape that says so.
    kept = x.new_empty((1, x.shape[0], 0), dtype=S) if new.kept is None else new.kept.unsqueeze(0)
    return new.h, new.c, kept


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
    p = scans._Parameters.of(weights, 1)
    if p.w_hr:
        out: tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]] = scan_cell_backward(
            cell, dh, dc, x, h, c, weights, h_new, reserve, need_dx, need_dw
        )
        return out
    kept = reserve[0] if KEPT[cell] else None
    with scans._on(x) as stream:
        w_hh, w_hn = _recurrent(cell, p.w_hh[0])
        exact = _unrounded(x, h, p) if cell == "rnn_tanh" and x.dtype != products.compute(x.dtype) else None
        d = pointwise_backward(Step(cell, x, None, None, None, h, c), w_hn, kept, h_new, dh, dc, exact)
        S = products.compute(x.dtype)
        back = products.product_of(d.inner[:, : w_hh.shape[0]], w_hh, S, scans._core(), stream)
        dh_prev = (back if d.h is None else back.add_(d.h)).to(x.dtype)
        dx = products.product_of(d.gates, p.w_ih[0], x.dtype) if need_dx else None
        return dx, dh_prev, d.c, _weight_gradients(cell, x, h, p, d, kept) if need_dw else []


def _unrounded(x: Tensor, h: Tensor | None, p: scans._Parameters) -> Tensor:
    """The state after a step of "rnn_tanh" in float32, formed again: 1 - h^2 keeps few digits of an h near 1 that has
    been rounded to a half type."""
    gx, gh = (
        None if t is None else products.product_of(t, w[0].t(), torch.float32) for t, w in ((x, p.w_ih), (h, p.w_hh))
    )
    assert gx is not None
    b_ih, b_hh = (b[0].float() if b else None for b in (p.b_ih, p.b_hh))
    return pointwise_forward(Step("rnn_tanh", gx, gh, b_ih, b_hh, None, None), None, torch.float32, False).h


def _weight_gradients(
    cell: str, x: Tensor, h: Tensor | None, p: scans._Parameters, d: Gradients, kept: Tensor | None
) -> list[Tensor]:
    """In the order of the flat list. Sums over the rows in an order that does not change: products, and torch's sums in
    S."""
    dtype, H = x.dtype, p.w_hh[0].shape[1]

    def total(gradients: Tensor) -> Tensor:
        return gradients.sum(0, dtype=products.compute(dtype)).to(dtype)

    if h is None:
        d_hh = torch.zeros_like(p.w_hh[0])
    elif cell == "gru_reset_before":
        assert kept is not None
        rh = (kept[:, :H] * h).to(dtype)
        pairs = (d.inner[:, : 2 * H], h), (d.inner[:, 2 * H :], rh)
        d_hh = torch.cat([products.product_of(g.t(), entered, dtype) for g, entered in pairs])
    else:
        d_hh = products.product_of(d.inner.t(), h, dtype)
    d_ih = products.product_of(d.gates.t(), x, dtype)
    if not p.b_ih:
        return [d_ih, d_hh]
    b_ih = total(d.gates)
    return [d_ih, d_hh, b_ih, b_ih.clone() if d.inner is d.gates else total(d.inner)]
